"""Four real processes that stay, to be a mesh of any layout again and again; and what they do in the tests.

What a process is to do is a function of this module: it is found there by its name.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saescale.storage.errors import SaescaleError
from saescale.storage.live import open_source
from saescale.trainers.architectures import pairwise
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.cell import Cell
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange import native
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh import distributed
from saescale.trainers.mesh.distributed import Processes, join
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.train import PackJob, train_pack
from saescale.trainers.training.training_cell import TrainingCell
from tests.trainers.forked import forked

N, D, BATCH, K, K_AUX = 301, 16, 64, 8, 12
WINDOW = 3 * BATCH  # tokens after which a latent counts as dead
DEADLINE_S = 60.0
PENALISED = ("jumprelu", "relu", "gated", "prolu")


class Crowd:
    """`ask` gives what the function gave in each process, in the order of the ranks; an error as its text."""

    def __init__(self, folder: Path, size: int = 4) -> None:
        context = forked()
        self._folder, self._asked = folder, 0
        self._ways = [context.Pipe() for _ in range(size)]
        self.processes = [
            context.Process(target=_serve, args=(other, rank), daemon=True)
            for rank, (_, other) in enumerate(self._ways)
        ]
        for process in self.processes:
            process.start()

    def ask(self, work: Callable[..., Any], shards: int, replicas: int, *given: Any) -> list[Any]:
        self._asked += 1
        layout, meeting = Layout(shards, replicas), f"file://{self._folder}/meeting-{self._asked}"
        ways = [mine for mine, _ in self._ways[: layout.ranks]]
        for way in ways:
            way.send((work, layout, meeting, given))
        return [way.recv() for way in ways]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(way: Any, rank: int) -> None:
    torch.set_num_threads(1)
    while True:
        work, layout, meeting, given = way.recv()
        group = join(layout, rank, meeting, deadline_s=DEADLINE_S)
        try:
            answer = work(group, *given)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        finally:
            group.leave()
        way.send(answer)


class Whole(AssertionError):
    """A tensor [rows, N] of the whole width was made."""


class Guard(TorchDispatchMode):
    """Raises Whole for every tensor of `whole` columns, or a few more, and a quarter of a batch of rows."""

    def __init__(self, whole: int) -> None:
        super().__init__()
        self.whole, self.seen = whole, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.dim() > 1:
                self.seen += 1
                if self.whole <= t.shape[-1] <= self.whole + 8 and t.numel() >= BATCH // 4 * t.shape[-1]:
                    raise Whole(f"{function}: {tuple(t.shape)}")
        return out


class Stepped(NamedTuple):
    losses: list[float]
    idle: list[int]  # dead latents of all shards after each step
    params: dict[str, torch.Tensor]
    dead: list[float]  # the fraction after each step
    pairs: tuple[int, ...]  # Worked, of sparse steps and of dense ones
    sent: dict[str, int]  # in the last step
    error: str | None
    guarded: int  # tensors that the guard saw


def cell_of(**more: Any) -> Cell:
    fields = {
        "store": "x", "d_model": D, "n_latents": N, "k": K, "tokens": BATCH * 1000, "batch_tokens": BATCH, "lr": 3e-3,
        "dead_after_tokens": WINDOW, "settings": {"k_aux": K_AUX, "multi_topk": True},
    }  # fmt: skip
    return Cell(**(fields | more))


def of(architecture: str) -> dict[str, Any]:
    """Fields of a cell of that architecture."""
    if architecture in PENALISED:
        wide = {"threshold": 0.2, "bandwidth": 0.1} if architecture == "jumprelu" else {}
        return {"architecture": architecture, "settings": {"coefficient": 0.3} | wide}
    return {} if architecture == "topk" else {"architecture": architecture, "settings": {"k_aux": K_AUX}}


def batches(count: int) -> list[torch.Tensor]:
    """Of few directions, so that latents die."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(24, D, generator=generator)
    made = []
    for _ in range(count):
        chosen = torch.rand(BATCH, 24, generator=generator).topk(3, dim=1).indices
        x = directions[chosen].sum(dim=1) + 0.05 * torch.randn(BATCH, D, generator=generator)
        made.append(torch.nn.functional.normalize(x, dim=1))
    return made


def take_steps(
    group: Group, steps: int, poisoned: int | None = None, fields: dict[str, Any] | None = None, sunk: float = 0.0
) -> Stepped:
    """Steps of a cell; `poisoned`: the shard one of whose weights is NaN from the third step on; `sunk`: by what the
    biases of the first dead latents are lowered."""
    cell = TrainingCell(cell_of(**(fields or {})), Centre(torch.zeros(D), 1 / D), torch.device("cpu"), group.mesh(N))
    mesh, losses, idle, dead, sent = cell.sae.mesh, [], [], [], {}
    # Some of the first shard are dead from the beginning: fewer than AuxK would take, and none of the others'.
    cell.dead.tokens_since[: max(0, 5 - mesh.first)] = WINDOW
    if sunk:
        cell.sae.params["b_enc"][: max(0, 5 - mesh.first)] -= sunk
    traffic = getattr(mesh, "traffic", None)
    guard = Guard(N if mesh.shards > 1 else 10**9)
    with guard:
        for number, x in enumerate(batches(steps)):
            if number == 2 and poisoned == mesh.shard:
                cell.sae.params["W_enc"][0, 0] = math.nan
                cell.sae.round()
            if traffic is not None:
                traffic.clear()
            cell.train_on(Batch.of(x, torch.zeros(D), cell.cell.precision == "bf16"))
            if traffic is not None:
                sent = dict(traffic.bytes)
            if cell.error is not None:
                break
            losses.append(cell.loss)
            idle.append(int(mesh.sum_shards(cell.dead.after(WINDOW).sum())))
            dead.append(cell._dead_fractions([WINDOW])[0])
        batch = Batch.of(torch.cat(batches(2)), torch.zeros(D), cell.cell.precision == "bf16")
        found = cell.averaged().reconstruct(batch)
        losses.append(float(found.squared) / len(batch.x))
        dead.append(float(found.active) / len(batch.x))
    params = {name: t.clone() for name, t in cell.sae.params.items()}
    return Stepped(
        losses, idle, params, dead, (*cell.worked.read(), *cell.worked_dense.read()), sent, cell.error, guard.seen
    )


def take_steps_so(
    group: Group, dense_above: float, steps: int, poisoned: int | None, fields: dict[str, Any]
) -> Stepped:
    """As `take_steps`, in a process where steps are dense above that share of all pairs."""
    usual, pairwise.DENSE_ABOVE = pairwise.DENSE_ABOVE, dense_above
    try:
        return take_steps(group, steps, poisoned, fields)
    finally:
        pairwise.DENSE_ABOVE = usual


def alone(steps: int, fields: dict[str, Any] | None = None, sunk: float = 0.0) -> Stepped:
    return take_steps(ONE, steps, None, fields, sunk)


def whole(answers: list[Stepped], shards: int) -> dict[str, torch.Tensor]:
    """The parameters of the first replica's shards, put together."""
    return {
        name: t
        if name == "b_pre" or t.numel() == 1
        else torch.cat([answer.params[name] for answer in answers[:shards]])
        for name, t in answers[0].params.items()
    }


def choose(group: Processes, given: list[tuple[torch.Tensor, int, int]]) -> list[torch.Tensor]:
    """bool [batch, latents of this shard]: what is selected of scores [batch, n], k of each row, where so many keys are
    gathered at most."""
    found, usual = [], distributed.KEYS
    for scores, k, keys in given:
        of = group.mesh(scores.shape[1])
        own = scores[:, of.first : of.first + of.size]
        values, indices = own.sort(dim=1, descending=True, stable=True)
        width = min(k, of.size)
        values, indices = values[:, :width], indices[:, :width]
        local = Selected(indices.int().where(values > 0, -1), values.clamp_min(0))
        distributed.KEYS = keys
        selected = of.select(local, k)
        distributed.KEYS = usual
        padded = torch.zeros(len(scores), of.size + 1, dtype=torch.bool)
        found.append(padded.scatter_(1, selected.indices.long() % (of.size + 1), True)[:, :-1])
    return found


def add(group: Processes, numbers: int) -> dict[str, int]:
    """What is sent to sum so many numbers over the shards."""
    group.mesh(N).sum_shards(torch.ones(numbers))
    return dict(group.traffic.bytes)


def train(group: Processes, job: PackJob, stop_after: int | None = None) -> Any:
    """train_pack; the first process is told to stop after so many questions. What the others are told, or their clocks
    say, is of no account."""
    asked = iter(range(10**9))
    stop = (lambda: next(asked) >= stop_after) if stop_after is not None else (lambda: False)
    if group.rank:
        job, stop = job.model_copy(update={"checkpoint_every_s": 1e9}), lambda: True
    try:
        return train_pack(job, should_stop=stop, group=group, device=torch.device("cpu"))
    except SaescaleError as error:
        return str(error)


def load(group: Processes, url: str, job: PackJob) -> tuple[float, float, int]:
    """nmse and L0 of a finished SAE of which each process has its share, and how many numbers its W_enc has."""
    trained = native.read(url, group.mesh(job.cells[0].n_latents))
    held_out = HeldOut(open_source(job.store), job.eval.tokens, torch.device("cpu"), job.store)
    (quality,) = held_out.evaluate([lambda: trained.sae], trained.origin, False)
    return quality.nmse, quality.l0, trained.sae.params["W_enc"].numel()


def nothing(group: Group) -> None:
    """To meet, and leave."""
