"""Tasks and circuits: on a model whose circuit was made by hand, against slow code, and on tokenizers that cannot."""

import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.tasks import greater_than, induction, ioi
from saescale.trainers.tasks.circuit import circuit
from saescale.trainers.tasks.heads import scores_by_attention, scores_of_names
from saescale.trainers.tasks.patching import Effect, Part, Patched, patch_parts
from saescale.trainers.tasks.task import METRIC, TASKS, Prompts, find_task, measure_task, read
from tests.trainers.slow_circuit import WIDTH, ByHand, by_hand, recomputed


@pytest.fixture(scope="module")
def subject() -> ByHand:
    return by_hand()


@pytest.fixture(scope="module")
def prompts(subject: ByHand) -> Prompts:
    return induction.prompts(subject, number=6, seed=3)


def slow_metric(prompts: Prompts, number: int, logits: np.ndarray) -> float:
    """Nats a token of the first time less those of the second, token by token."""
    ids = prompts.ids[number].tolist()
    losses = []
    for place in prompts.reads[number].tolist():
        chances = np.exp(logits[place]) / np.exp(logits[place]).sum()
        losses.append(-np.log(chances[ids[place + 1]]))
    half = len(losses) // 2
    return float(np.mean(losses[:half]) - np.mean(losses[half:]))


def test_patching_is_that_of_slow_code_and_finds_the_circuit(subject: ByHand, prompts: Prompts) -> None:
    found = patch_parts(subject, find_task("induction"), prompts)
    rows = range(len(prompts.ids))
    clean = [recomputed(subject.model, prompts.ids[row].tolist()) for row in rows]
    corrupt = [recomputed(subject.model, prompts.corrupt[row].tolist()) for row in rows]

    def mean(ids: torch.Tensor, put: list[dict] | None = None) -> float:
        logits = [recomputed(subject.model, ids[row].tolist(), put and put[row])[0] for row in rows]
        return float(np.mean([slow_metric(prompts, row, logits[row]) for row in rows]))

    whole, nothing = mean(prompts.ids), mean(prompts.corrupt)
    assert found.clean == pytest.approx(whole, abs=1e-4)
    assert found.corrupt == pytest.approx(nothing, abs=1e-4)
    assert whole > nothing + 1
    for part, effect in found.effects.items():
        if part.head is None:
            assert (effect.noising, effect.denoising, effect.direct) == pytest.approx((0, 0, 0), abs=1e-6)
            continue
        where = part.layer, part.head
        noised = mean(prompts.ids, [{where: given[where]} for _, given in corrupt])
        denoised = mean(prompts.corrupt, [{where: given[where]} for _, given in clean])
        assert effect.noising == pytest.approx((whole - noised) / (whole - nothing), abs=1e-4)
        assert effect.denoising == pytest.approx((denoised - nothing) / (whole - nothing), abs=1e-4)
    # The head that foresees gives all of it straight, the one before it all of it through that head; others nothing.
    assert found.effects[Part(1, 0)].noising > 0.9
    assert found.effects[Part(0, 0)].noising > 0.5
    assert abs(found.effects[Part(0, 0)].direct) < 0.15  # by the last norm alone
    for idle in (Part(0, 1), Part(1, 1)):
        assert found.effects[idle] == pytest.approx((0, 0, 0), abs=1e-6)


def test_a_part_that_goes_straight_to_the_logits_does_so_by_its_derivative(subject: ByHand, prompts: Prompts) -> None:
    """`direct` is a derivative of the metric: held to differences of it."""
    task, site = find_task("induction"), Site(layer=1, positions="all")
    (last,) = subject.run(prompts.ids, [site]).resid
    (other,) = subject.run(prompts.corrupt, [site]).resid

    def metric(stream: torch.Tensor) -> float:
        return float(task.score(prompts, _read(subject, prompts, site, stream))[METRIC].double().mean())

    # All that differs at the end came from heads and from the embeddings; the latter are read by nobody.
    step = 1e-2
    slope = (metric(last + step * (last - other)) - metric(last - step * (last - other))) / (2 * step)
    found = patch_parts(subject, task, prompts)
    straight = sum(effect.direct for effect in found.effects.values()) * (found.clean - found.corrupt)
    embedded = subject.model.transformer.wte(prompts.ids) - subject.model.transformer.wte(prompts.corrupt)
    slope_of_embeddings = (metric(last + step * embedded) - metric(last - step * embedded)) / (2 * step)
    assert straight + slope_of_embeddings == pytest.approx(slope, rel=0.02)


def test_with_the_stream_of_the_corrupted_prompts_a_task_is_measured_as_on_them(
    subject: ByHand, prompts: Prompts
) -> None:
    task, site = find_task("induction"), Site(layer=1, positions="all")
    (other,) = subject.run(prompts.corrupt, [site]).resid
    found = measure_task(subject, task, prompts, prompts.ids, {site: lambda stream: other})
    for name, value in measure_task(subject, task, prompts, prompts.corrupt).items():
        torch.testing.assert_close(found[name], value)
    assert (found[METRIC] - measure_task(subject, task, prompts, prompts.ids)[METRIC]).abs().min() > 0.1


def _read(subject: ByHand, prompts: Prompts, site: Site, stream: torch.Tensor) -> torch.Tensor:
    return read(prompts, subject.resume(prompts.ids, site, stream, prompts.last))


def test_a_massive_first_token_hides_no_block_in_bfloat16_that_gives_something_else() -> None:
    """As of SmolLM2, whose first token is a hundred times as long as others: what rounding does to it is no mistake."""
    model = by_hand().model
    model.transformer.wte.weight[0, WIDTH - 1] = 3_000.0
    subject = ByHand("by hand", model.to(torch.bfloat16), "by hand")
    prompts, task = induction.prompts(subject, number=3, seed=3), find_task("induction")
    assert patch_parts(subject, task, prompts).effects[Part(1, 0)].noising > 0.9

    def more(module: Any, given: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        stream[:, 1:] += 0.2
        return output

    model.transformer.h[1].register_forward_hook(more)
    with pytest.raises(SaescaleError, match="block 1 give is not what it adds to the stream"):
        patch_parts(subject, task, prompts)


def test_heads_are_what_they_were_made_for(subject: ByHand) -> None:
    scores = scores_by_attention(subject)
    best = {kind: max(of, key=of.__getitem__) for kind, of in scores.items()}
    assert best == {"previous_token": Part(0, 0), "duplicate_token": Part(0, 1), "induction": Part(1, 0)}
    for kind, part in best.items():
        assert scores[kind][part] > (0.25 if kind == "duplicate_token" else 0.9)
        assert all(score < scores[kind][part] - 0.1 for other, score in scores[kind].items() if other != part)


def test_a_gradient_at_the_site_is_that_of_differences(prompts: Prompts) -> None:
    subject, draw = by_hand(), torch.Generator().manual_seed(0)
    for parameter in subject.model.parameters():  # that by hand is all edges
        parameter.normal_(std=0.15, generator=draw)
    task, site = find_task("induction"), Site(layer=0, positions="all")
    (resid,) = subject.run(prompts.ids, [site]).resid
    x = resid.clone().requires_grad_()
    metric = task.score(prompts, _read(subject, prompts, site, x))[METRIC].sum()
    (gradient,) = torch.autograd.grad(metric, x)
    for _ in range(3):
        way = torch.randn(resid.shape, generator=draw)
        ends = [
            task.score(prompts, _read(subject, prompts, site, resid + sign * 1e-2 * way))[METRIC] for sign in (1, -1)
        ]
        assert float((gradient * way).sum()) == pytest.approx(
            float((ends[0] - ends[1]).double().sum()) / 2e-2, rel=0.01, abs=1e-3
        )
    last = subject.resume(prompts.ids, site, resid, prompts.last)
    whole = subject.resume(prompts.ids, site, resid)
    torch.testing.assert_close(last, whole[:, -prompts.last :], rtol=1e-5, atol=1e-5)


SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LAYOUTS: dict[str, tuple[Callable[[], Any], int]] = {
    "gpt2": (lambda: tf.GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=64), 6),
    "llama": (lambda: tf.LlamaConfig(**SHAPE, num_key_value_heads=1), 6),
    "side by side": (lambda: tf.GPTNeoXConfig(**SHAPE), 6),
    "experts": (lambda: tf.MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2), 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_other_layouts_are_found(save_subject: Callable[..., str], layout: str) -> None:
    make, parts = LAYOUTS[layout]
    subject = get_subject(save_subject("model", make()), dtype="float32")
    prompts = induction.prompts(subject, 2, 0)
    found = patch_parts(subject, find_task("induction"), prompts)  # type: ignore[arg-type]
    assert len(found.effects) == parts
    assert all(effect.noising != 0 for part, effect in found.effects.items() if part.layer == 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: tf.BloomConfig(vocab_size=512, hidden_size=16, n_layer=2, n_head=2),
            "parts of Bloom.* cannot be patched",
        ),
        (
            lambda: tf.MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, state_size=4),
            "cannot tell where the heads of block 0 are",
        ),
    ],
    ids=["an MLP that gives the stream", "no heads"],
)
def test_parts_that_cannot_be_told_are_one_line(save_subject: Callable[..., str], make: Any, said: str) -> None:
    subject = get_subject(save_subject("model", make()), dtype="float32")
    with pytest.raises(SaescaleError, match=said):
        circuit(subject, "induction", number=2)


# --- prompts


class Spelling:
    """A subject that only spells, by a pattern of its tokens."""

    name, bos_token_id, eos_token_id = "spelling", 0, None

    def __init__(self, pattern: str) -> None:
        self.pattern, self.known = re.compile(pattern), {"<bos>": 0}

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [
            np.array([self.known.setdefault(word, len(self.known)) for word in self.pattern.findall(text)], np.int32)
            for text in texts
        ]

    def text(self, ids: Iterable[int]) -> str:
        words = list(self.known)
        return "".join(words[each] for each in ids if each)


WORDS, DIGITS, PAIRS = r" ?[A-Za-z]+|\d|[^\w]", r" ?[A-Za-z]+| ?\d|[^\w]", r" ?[A-Za-z]+| ?\d\d|[^\w]"


def test_prompts_of_ioi_name_who_they_should() -> None:
    subject = Spelling(WORDS)
    found = ioi.prompts(subject, 64, seed=1)  # type: ignore[arg-type]
    again = ioi.prompts(subject, 64, seed=1)  # type: ignore[arg-type]
    assert torch.equal(found.ids, again.ids)
    assert not torch.equal(found.ids, ioi.prompts(subject, 64, seed=2).ids)  # type: ignore[arg-type]
    for row in range(64):
        length = int(found.lengths[row])
        said, corrupt = (subject.text(ids[row, :length].tolist()) for ids in (found.ids, found.corrupt))
        io, s = (list(subject.known)[token].strip() for token in found.answers[row].tolist())
        assert (said.count(f" {io} "), said.count(f" {s} ")) == (1, 2)
        assert (said.index(f" {io} ") < said.index(f" {s} ")) == (found.attributes["order"][row] == 0)
        assert said.endswith(" to")
        names = [name for name in ioi.NAMES if re.search(rf"\b{name}\b", corrupt)]
        assert len(names) == 3
        assert not {io, s} & set(names)
        # Besides the names nothing differs.
        assert int((found.ids[row] != found.corrupt[row]).sum()) == 3
        assert all(int(found.ids[row, found.places[place][row]]) == found.answers[row, 1] for place in ("s1", "s2"))
        assert found.places["s1"][row] < found.places["s2"][row] < found.places["end"][row] == length - 1
    assert 16 < int(found.attributes["order"].sum()) < 48


def test_heads_of_names_are_told_by_where_they_look_and_what_they_give() -> None:
    places = {"io": torch.tensor([2, 4]), "s2": torch.tensor([6, 7]), "end": torch.tensor([8, 9])}
    prompts: Any = SimpleNamespace(ids=torch.zeros(2, 10), places=places)
    attention = torch.full((2, 2, 3, 10, 10), 0.01)
    at = {Part(0, 0): "io", Part(0, 1): "io", Part(1, 0): "s2", Part(1, 1): "s2", Part(1, 2): "s2"}
    for (layer, head), place in at.items():
        attention[layer, torch.arange(2), head, places["end"], places[place]] = torch.tensor([0.6, 0.8])
    attention[0, :, 2, 5, 2] = 0.9  # from elsewhere than the end
    straight = {Part(0, 0): 0.5, Part(0, 1): -0.4, Part(0, 2): 0.9, Part(1, 0): 0.3, Part(1, 2): 0.0}
    effects = {part: Effect(0.35, 0, straight.get(part, 0.0)) for part in (*at, Part(0, 2))} | {
        Part(1, None): Effect(2, 2, 2)
    }
    found = scores_of_names(SimpleNamespace(attention=lambda ids: attention), prompts, Patched(1, 0, effects))  # type: ignore[arg-type]
    assert {kind: max(of, key=of.__getitem__) for kind, of in found.items()} == {
        "name_mover": Part(0, 0), "s_suppression": Part(1, 0), "s_inhibition": Part(1, 1),
    }  # fmt: skip
    assert found["name_mover"][Part(0, 0)] == pytest.approx(0.7 * 0.5)
    assert found["name_mover"][Part(0, 1)] == 0  # it gives the other name
    assert found["s_suppression"][Part(1, 0)] == pytest.approx(0.7 * 0.3)
    assert found["s_inhibition"][Part(1, 0)] == pytest.approx(0.7 * 0.05)


@pytest.mark.parametrize(("pattern", "reads"), [(DIGITS, 2), (PAIRS, 1)], ids=["digits", "pairs"])
def test_greater_than_is_the_mass_of_later_years(pattern: str, reads: int) -> None:
    """Whatever the tokens of years: held to a sum over all of them, by a model that says what it likes."""
    subject = Spelling(pattern)
    found = greater_than.prompts(subject, 32, seed=0)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(32, reads, len(subject.known), generator=draw)
    scored = greater_than.score(found, logits)
    table = {name.strip(): token for name, token in subject.known.items()}
    for row in range(32):
        said = subject.text(found.ids[row, : int(found.lengths[row])].tolist())
        century, year, after = re.match(r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d+)", said).groups()  # type: ignore[union-attr]
        assert after == century + (year[0] if reads == 2 else "")
        corrupt = subject.text(found.corrupt[row, : int(found.lengths[row])].tolist())
        assert corrupt == said.replace(f"{century}{year} ", f"{century}01 ", 1)
        above = others = 0.0
        for later in range(100):
            text = f"{later:02}"
            if reads == 1:
                p = float(logits[row, 0].softmax(dim=0)[table[text]])
            else:
                p = float(logits[row, 0].softmax(dim=0)[table[text[0]]])
                if text[0] == year[0]:  # else the second digit decides nothing
                    p *= float(logits[row, 1][[table[str(digit)] for digit in range(10)]].softmax(dim=0)[int(text[1])])
                else:
                    p /= 10
            if text > year:
                above += p
            else:
                others += p
        assert float(scored["above"][row]) == pytest.approx(above, abs=1e-5)
        assert float(scored[METRIC][row]) == pytest.approx(above - others, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "pattern", "said"),
    [
        (ioi, r".", "ioi needs 6 names that are one token each, and the tokenizer of spelling has 0 of"),
        (greater_than, r" ?[A-Za-z]+| ?\d+|[^\w]", "greater_than needs years whose last two digits, or each of them"),
        (
            greater_than,
            r" ?[A-Za-z]+| ?\d{1,3}|[^\w]",
            "greater_than needs years whose last two digits, or each of them",
        ),
        (induction, r".", "tasks are run on causal models of transformers, and spelling is none"),
    ],
    ids=["letters", "numbers", "threes", "no model"],
)
def test_a_tokenizer_that_cannot_is_one_line(task: ModuleType, pattern: str, said: str) -> None:
    with pytest.raises(SaescaleError, match=said) as told:
        task.prompts(Spelling(pattern), 8, 0)
    assert "\n" not in str(told.value)


def test_a_subject_without_text_or_of_short_contexts_is_one_line(subject: ByHand) -> None:
    with pytest.raises(SaescaleError, match="the subject by hand reads no text"):
        ioi.prompts(subject, 8, 0)
    short = by_hand()
    short.max_positions = 8
    assert induction.prompts(subject, 2, 0, tokens=4).reads.tolist() == [[1, 2, 3, 5, 6, 7]] * 2
    with pytest.raises(SaescaleError, match="induction repeats 4 tokens at least"):
        induction.prompts(short, 8, 0)
    with pytest.raises(SaescaleError, match="did you mean ioi"):
        find_task("oi")


def test_the_example_of_the_page_is_a_task(subject: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "trainers" / "tasks" / "README.md"
    (block,) = re.findall(r"```python\n(# tasks/toy\.py\n.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.py").write_text(block)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    assert TASKS.names() == ("greater_than", "induction", "ioi", "toy")
    found = circuit(subject, "toy", number=8)
    assert found["clean"]["metric"] > found["corrupt"]["metric"]
    assert [part["part"] for part in found["parts"][:1]] == ["head 1.0"]
    assert found["heads"]["induction"][0]["part"] == "head 1.0"


def test_stories_of_the_corpus_have_the_names_and_no_prompt_of_a_task() -> None:
    found = runpy.run_path(str(Path(__file__).parents[2] / "deploy/examples/circuits_corpus.py"))
    stories = found["stories"]((*ioi.NAMES, *found["OTHERS"]), 300, 0)
    assert len(set(stories)) == 300
    said = re.compile("|".join(re.sub(r"{\w+}", r"\\w+", template) for template in ioi.TEMPLATES))
    assert said.search("When Mary and John went to the store, John gave a drink to Mary.")
    assert not said.search(" ".join(stories))
    words = set(re.findall(r"\w+", " ".join(stories)))
    assert words > {*ioi.NAMES, *found["OTHERS"]}
    assert not words & {*greater_than.NOUNS, *ioi.PLACES, *ioi.THINGS}
    spans = re.findall(r"(\d{4}) (?:to|and ended in) (\d{4})", " ".join(stories))
    assert len(spans) > 100
    assert all(0 < int(last) - int(first) <= 100 - int(first) % 100 for first, last in spans)
    others = set(re.findall(r"\w+", " ".join(found["stories"](found["OTHERS"], 300, 0))))
    assert not others & {*ioi.NAMES}


@pytest.mark.parametrize(
    ("given", "said"), [((), "required: out"), (("out.jsonl", "other"), "invalid choice: 'other'")]
)
def test_the_script_of_the_corpus_says_what_it_takes(
    given: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(Path(__file__).parents[2] / "deploy/examples/circuits_corpus.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *given])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
