"""The subject othello: what it reads, checkpoints in other layouts, and stores that are harvested from it."""

import json
import math
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.othello.games import PAD, games_of_split, squares_of_tokens
from saescale.trainers.subjects.othello.labels import EMPTY, LABELS
from saescale.trainers.subjects.othello.othello import Othello, Settings, blank, load
from saescale.trainers.subjects.othello.weights import board_config
from saescale.trainers.subjects.own_model import blank_model
from saescale.trainers.subjects.subject import Generates, Learns, ReadsText, Resumes, get_subject
from tests.trainers.subjects.slow_othello import Board

D_MODEL, N_HEADS, N_LAYERS = 24, 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 6x6 model as transformers saves it."""
    where = tmp_path_factory.mktemp("models") / "six"
    blank_model(board_config(6, N_LAYERS, D_MODEL, N_HEADS), seed=3).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def subject(folder: Path) -> Othello:
    return load(str(folder), Path(), "float32", print)


def test_it_is_what_the_door_asks_for(subject: Othello) -> None:
    assert isinstance(subject, Generates)
    assert isinstance(subject, Resumes)
    assert isinstance(subject, Learns)
    assert not isinstance(subject, ReadsText)
    assert (subject.size, subject.n_layers, subject.d_model) == (6, N_LAYERS, D_MODEL)


def test_sequences_are_games_without_their_last_move(subject: Othello) -> None:
    drawn = next(games_of_split(6, "heldout", 7)).things.tokens.tolist()
    for (ids, keep), game in zip(islice(subject.sequences("heldout", 7), 300), drawn, strict=False):
        moves = [token for token in game if token != PAD]
        # Of a game that ends early nothing is left to predict behind its last move, which is read all the same.
        assert ids.tolist() == (moves[:-1] if len(moves) == 32 else moves)
        assert ids.dtype == np.int32
        assert keep.tolist() == [False] * 4 + [True] * (len(ids) - 4)
    assert max(len(ids) for ids, _ in islice(subject.sequences("train", 0), 100)) == subject.max_positions == 31


def test_all_layers_come_from_one_pass_and_the_rest_goes_on_from_any(subject: Othello) -> None:
    ids = torch.from_numpy(np.stack([s.ids for s in islice(subject.sequences("train", 0), 9) if len(s.ids) == 31]))
    sites = [Site(layer=layer, positions="all") for layer in range(N_LAYERS)]
    run = subject.run(ids, sites, logits=True)
    hidden = subject.model(ids.long(), output_hidden_states=True).hidden_states
    assert torch.equal(run.resid[0], hidden[1])
    assert run.logits is not None
    for site, resid in zip(sites, run.resid, strict=True):
        assert torch.equal(subject.resume(ids, site, resid), run.logits)
        moved = subject.run(ids, [], {site: lambda x: 2 * x}, logits=True).logits
        assert moved is not None
        assert not torch.equal(moved, run.logits)
        assert torch.equal(subject.resume(ids, site, 2 * resid), moved)
    with pytest.raises(SaescaleError, match="has no layer 2: its 2 layers are 0 to 1"):
        subject.run(ids, [Site(layer=2, positions="all")])


def test_neurons_are_what_the_mlp_adds_to_the_stream(subject: Othello) -> None:
    ids = torch.from_numpy(np.stack([s.ids for s in islice(subject.sequences("heldout", 1), 9) if len(s.ids) == 31]))
    before, after = subject.run(ids, [Site(layer=0, positions="all"), Site(layer=1, positions="all")]).resid
    block = subject.model.transformer.h[1]
    with torch.no_grad():
        middle = before + block.attn(block.ln_1(before))[0]  # 31 positions: the mask is made by the attention itself
        added = block.mlp.c_proj(subject.neurons(ids, 1))
        torch.testing.assert_close(block.mlp(block.ln_2(middle)), added, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(middle + added, after, atol=1e-4, rtol=1e-3)
    assert subject.neurons(ids, 1).shape == (*ids.shape, 4 * D_MODEL)


def test_scores_are_those_of_slow_code(subject: Othello) -> None:
    legal = mass = loss = least = positions = 0.0
    squares = squares_of_tokens(6)
    games = next(games_of_split(6, "heldout", 0)).things.tokens[:30]
    for game in games.tolist():
        slow, moves = Board(6), [token for token in game if token != PAD]
        p = subject.model(torch.tensor([moves[:31]])).logits[0].double().softmax(dim=-1)
        for number, token in enumerate(moves[:31]):
            slow.play(divmod(int(squares[token]), 6))
            allowed = [int(np.flatnonzero(squares == row * 6 + column)[0]) for row, column in slow.legal(slow.mover)]
            if number + 1 < len(moves):
                legal += int(p[number].argmax()) in allowed
                mass += float(p[number, allowed].sum())
                loss -= math.log(p[number, moves[number + 1]])
                least += math.log(len(allowed))
                positions += 1
    expected = {"legal": legal, "legal_mass": mass, "loss": loss, "least_loss": least}
    found = subject.score(30)
    assert found == pytest.approx({name: total / positions for name, total in expected.items()}, rel=1e-5)


def test_labels_of_a_store_are_recomputed_and_others_weights_refused(folder: Path, tmp_path: Path) -> None:
    spec = HarvestSpec(
        subject=f"othello:{folder}", layer=1, out=str(tmp_path / "store"), tokens=2_000, heldout_tokens=600,
        shard_rows=900, row_group_rows=256, compute_dtype="float32",
    )  # fmt: skip
    harvest(spec)
    store, subject = ActivationStore.open(spec.out), get_subject(f"othello:{folder}", dtype="float32")
    labels, places = heldout_labels(store, subject, 400), heldout_places(store, subject, 400)
    assert tuple(labels) == LABELS
    squares = squares_of_tokens(6)
    for row in range(0, 400, 23):
        slow = Board(6)
        game = places.contexts[places.context[row]]
        for token in game[: places.pos[row]]:
            slow.play(divmod(int(squares[token]), 6))
        assert labels["tile_before"][row].tolist() == slow.tiles()
        assert labels["tile_before"][row][squares[game[places.pos[row]]]] == EMPTY
        slow.play(divmod(int(squares[game[places.pos[row]]]), 6))
        assert labels["tile_after"][row].tolist() == slow.tiles()
    assert places.pos.min() == 4


def test_a_random_one_is_of_the_same_shape_and_always_the_same(folder: Path, subject: Othello) -> None:
    first, second = (get_subject(f"othello-random:{folder}", dtype="float32") for _ in range(2))
    assert first.fingerprint == second.fingerprint != subject.fingerprint
    assert (first.n_layers, first.d_model) == (subject.n_layers, subject.d_model)
    state = torch.random.get_rng_state()
    get_subject(f"othello-random:{folder}")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_shipped_one_is_the_one_whose_training_is_noted_and_plays_legally() -> None:
    shipped = files("saescale.shipped") / "othello-6x6"
    record = json.loads((shipped / "training.json").read_text())
    assert (shipped / "model.safetensors").stat().st_size < 2_000_000  # type: ignore[attr-defined]
    subject = get_subject("othello", dtype="float32")
    assert isinstance(subject, Othello)
    assert (subject.fingerprint, subject.size, subject.n_layers, subject.d_model) == (record["fingerprint"], 6, 4, 128)
    assert record["score"]["legal"] > 0.9
    assert subject.score(200)["legal"] == pytest.approx(record["score"]["legal"], abs=0.02)
    assert get_subject("othello-random", dtype="float32").score(200)["legal"] < 0.4  # type: ignore[attr-defined]


# --- layouts


def transformer_lens(folded: bool) -> dict[str, torch.Tensor]:
    """Random weights of an 8x8 model under the names of TransformerLens."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    head = D_MODEL // N_HEADS
    state = {"embed.W_E": random(61, D_MODEL), "pos_embed.W_pos": random(59, D_MODEL)}
    for layer in range(N_LAYERS):
        here = f"blocks.{layer}."
        state |= {f"{here}attn.W_{which}": random(N_HEADS, D_MODEL, head) for which in "QKV"}
        state |= {f"{here}attn.b_{which}": random(N_HEADS, head) for which in "QKV"}
        state |= {f"{here}attn.W_O": random(N_HEADS, head, D_MODEL), f"{here}attn.b_O": random(D_MODEL)}
        state |= {f"{here}mlp.W_in": random(D_MODEL, 40), f"{here}mlp.b_in": random(40)}
        state |= {f"{here}mlp.W_out": random(40, D_MODEL), f"{here}mlp.b_out": random(D_MODEL)}
        state |= {f"{here}attn.mask": torch.ones(59, 59).tril().bool(), f"{here}attn.IGNORE": torch.tensor(-1e5)}
    state |= {"unembed.W_U": random(D_MODEL, 61), "unembed.b_U": random(61)}
    if not folded:
        for norm in (*(f"blocks.{layer}.ln{n}" for layer in range(N_LAYERS) for n in (1, 2)), "ln_final"):
            state |= {f"{norm}.w": 1 + random(D_MODEL), f"{norm}.b": random(D_MODEL)}
    return state


def lens_forward(state: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The residual stream after each block and the logits, head by head in float64 as the page of TransformerLens
    writes it."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights.get(f"{name}.w", torch.ones(())) + weights.get(f"{name}.b", torch.zeros(()))

    stream = weights["embed.W_E"][ids] + weights["pos_embed.W_pos"][: ids.shape[1]]
    streams = []
    past = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for layer in range(N_LAYERS):
        here = f"blocks.{layer}."
        x = norm(stream, f"{here}ln1")
        for head in range(N_HEADS):
            q, k, v = (x @ weights[f"{here}attn.W_{w}"][head] + weights[f"{here}attn.b_{w}"][head] for w in "QKV")
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~past, -math.inf)
            stream = stream + scores.softmax(dim=-1) @ v @ weights[f"{here}attn.W_O"][head]
        stream = stream + weights[f"{here}attn.b_O"]
        hidden = norm(stream, f"{here}ln2") @ weights[f"{here}mlp.W_in"] + weights[f"{here}mlp.b_in"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        stream = stream + hidden @ weights[f"{here}mlp.W_out"] + weights[f"{here}mlp.b_out"]
        streams.append(stream)
    return streams, norm(stream, "ln_final") @ weights["unembed.W_U"] + weights["unembed.b_U"]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_checkpoints_of_transformer_lens(folded: bool, form: str, tmp_path: Path) -> None:
    state, path = transformer_lens(folded), tmp_path / f"synthetic.{form}"
    if form == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    subject = load(str(path), Path(), "float32", print)
    assert (subject.size, subject.n_layers, subject.d_model, subject.max_positions) == (8, N_LAYERS, D_MODEL, 59)
    ids = torch.from_numpy(np.stack([s.ids for s in islice(subject.sequences("train", 0), 5) if len(s.ids) == 59]))
    sites = [Site(layer=layer, positions="all") for layer in range(N_LAYERS)]
    run = subject.run(ids, sites, logits=True)
    streams, logits = lens_forward(state, ids.long())
    for found, expected in zip([*run.resid, run.logits], [*streams, logits], strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_eight_by_eight_folder_of_transformers(tmp_path: Path) -> None:
    model = blank(Settings(board=8, n_layers=1, d_model=16, n_heads=2), seed=0).model
    model.half().save_pretrained(tmp_path / "eight")
    subject = load(str(tmp_path / "eight"), Path(), "float32", print)
    assert (subject.size, subject.dtype) == (8, torch.float32)
    assert 0 < subject.score(20)["legal"] < 1
    assert load(str(tmp_path / "eight"), Path(), "bfloat16", print).fingerprint == subject.fingerprint


def test_what_is_no_model_of_othello_is_one_line(folder: Path, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(SaescaleError) as error:
            get_subject(f"othello:{path}")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no file or folder" in said(tmp_path / "nowhere")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    assert "holds no weights" in said(tmp_path / "x.pth")
    torch.save({"module.weight": torch.zeros(3)}, tmp_path / "y.pth")
    assert "is no state dict of TransformerLens (it has no embed.W_E)" in said(tmp_path / "y.pth")
    state = transformer_lens(folded=True)
    torch.save({name: tensor for name, tensor in state.items() if name != "blocks.1.attn.b_O"}, tmp_path / "z.pth")
    assert "has no blocks.1.attn.b_O" in said(tmp_path / "z.pth")
    torch.save(state | {"blocks.1.mlp.W_gate": torch.zeros(D_MODEL, 40)}, tmp_path / "g.pth")
    assert "1 weights have no place in a model of" in (wrong := said(tmp_path / "g.pth"))
    assert wrong.endswith(": blocks.1.mlp.W_gate")
    norms = transformer_lens(folded=False)
    torch.save({key: tensor for key, tensor in norms.items() if key != "blocks.1.ln2.w"}, tmp_path / "n.pth")
    assert said(tmp_path / "n.pth").endswith("lacks 1 weights of norms and has the others: blocks.1.ln2.w")
    torch.save(state | {"blocks.1.mlp.b_in": torch.zeros(7)}, tmp_path / "w.pth")
    assert "do not fit together" in said(tmp_path / "w.pth")
    other = {"embed.W_E": state["embed.W_E"][:50], "unembed.W_U": state["unembed.W_U"][:, :50]}
    torch.save(state | other | {"unembed.b_U": torch.zeros(50)}, tmp_path / "t.pth")
    assert "has a vocabulary of 50 tokens; a board of Othello has 13 (4x4), 33 (6x6), 61 (8x8)" in said(
        tmp_path / "t.pth"
    )
    torch.save(state | {"pos_embed.W_pos": state["pos_embed.W_pos"][:40]}, tmp_path / "v.pth")
    assert "reads at most 40 moves, and games on 8x8 have 59" in said(tmp_path / "v.pth")
    torch.save(state | {"embed.W_E": torch.full((61, D_MODEL), torch.nan)}, tmp_path / "u.pth")
    assert "holds NaN or infinity" in said(tmp_path / "u.pth")
    (tmp_path / "empty").mkdir()
    assert "is empty; give the folder that save_pretrained wrote" in said(tmp_path / "empty")
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights.pop("transformer.h.1.mlp.c_fc.bias")
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    assert "the files lack 1 of the model's weights" in said(tmp_path / "part")
