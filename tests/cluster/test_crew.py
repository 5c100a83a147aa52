"""The supervisor of actors, with actors that do nothing but come up or fail to."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import ray

from saescale.cluster.crew import crew as module
from saescale.cluster.crew import train_crew
from saescale.cluster.crew.claims import Resources
from saescale.cluster.crew.crew import Crew, Words
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.registry import PATH
from saescale.storage.waiting import Wait
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout


class Up(NamedTuple):
    node_id: str
    pid: int
    number: int
    own: str | None  # where it looks for files of the user's


class Toy:
    """Comes up, or ends in its start as `how` says."""

    def up(self, how: str, number: int) -> Up:
        if how == "dies":
            os._exit(1)
        if how == "fails":
            raise RuntimeError("no such device")
        if how == "says":
            raise SaescaleError("every node lacks the subject")
        return Up(ray.get_runtime_context().get_node_id(), os.getpid(), number, os.environ.get(PATH))

    def work(self) -> str:
        time.sleep(600)
        return "done"


class Toys(Crew[Up]):
    """Starts actors that end as `hows` say, one after another, and come up when these are used up."""

    words = Words(again="again: {kind}", fewer="fewer: {kind}", one="a toy")

    def __init__(self, *hows: str) -> None:
        super().__init__(None)
        self.hows, self.number = list(hows), 0
        self.connect()

    def _create(self) -> tuple[Any, Any]:
        self.number += 1
        toy = self._actor(Toy, {"num_cpus": self.claim.get("CPU", 0), "max_concurrency": 2})
        return toy, toy.up.remote(self.hows.pop(0) if self.hows else "comes", self.number)

    def _most_starts(self) -> int:
        return 3

    def _pause(self, failures: int) -> float:
        return 0.0

    def _nobody(self, why: str) -> SaescaleError:
        return SaescaleError(f"nobody: {why}")


@pytest.fixture
def toys(three_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Toys]]:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    made: list[Toys] = []

    def make(*hows: str, count: int = 1) -> Toys:
        made.append(Toys(*hows))
        for _ in range(count):
            made[-1].start()
        return made[-1]

    yield make
    for crew in made:
        crew.close()
    assert ray.is_initialized()  # it was joined before, so it is not theirs to end


def test_starts_that_fail_are_made_again(toys: Callable[..., Toys]) -> None:
    crew = toys("dies", "fails")
    with pytest.warns(SaescaleWarning) as said:
        crew.come_up(first_s=60, company_s=0)
    assert [str(warning.message) for warning in said] == ["again: ActorDiedError", "again: RuntimeError"]
    (info,) = crew.ready.values()
    assert info.number == 3
    assert crew.idle == list(crew.ready)


def test_too_many_in_a_row_leave_fewer_or_nobody(toys: Callable[..., Toys]) -> None:
    crew = toys("fails", "fails", "fails")
    with pytest.warns(SaescaleWarning), pytest.raises(SaescaleError, match=r"nobody: .*no such device"):
        crew.come_up(first_s=60, company_s=0)
    assert not crew.ready
    crew = toys("comes")
    crew.come_up(first_s=60, company_s=0)
    crew.hows = ["fails"] * 3
    crew.start()
    with pytest.warns(SaescaleWarning, match="fewer: RuntimeError"):
        crew.come_up(first_s=60, company_s=300)  # at most: a busy machine takes long to start three
    assert len(crew.ready) == 1
    assert not crew.starting


def test_what_an_actor_says_to_the_user_ends_the_crew(toys: Callable[..., Toys]) -> None:
    with pytest.raises(SaescaleError, match=r"^every node lacks the subject$"):
        toys("says").come_up(first_s=60, company_s=0)


def test_nobody_in_time_is_an_error_and_is_said_to_be_waited_for(
    toys: Callable[..., Toys], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And which of what it asks for the cluster has not free, where that is why."""
    monkeypatch.setattr(module, "ROOM_S", 0.0)
    said: list[Wait] = []
    monkeypatch.setattr(module, "hear", lambda source, found: said.extend(found))
    crew = toys(count=0)
    crew.start_later(600)
    with pytest.raises(SaescaleError, match="nobody: they do not answer"):
        crew.come_up(first_s=2, company_s=0)
    assert said[-1].what == "a toy to come up"
    assert said[-1].until is not None
    assert said[-1].until - said[-1].since == pytest.approx(1, abs=1)  # less what came before the first look
    crew.claim = {"CPU": 1000.0, "GPU": 0.0}
    crew.start()
    until = time.monotonic() + 60
    while not crew.no_room() and time.monotonic() < until:  # the head hears of it with a node's next beat
        time.sleep(0.1)
    with pytest.raises(SaescaleError, match=r"nobody: the cluster has \d of its 3 CPUs free and one takes 1000 CPU"):
        crew.come_up(first_s=1, company_s=0)


def test_one_that_works_is_killed_and_replaced(toys: Callable[..., Toys]) -> None:
    crew = toys(count=2)
    crew.come_up(first_s=60, company_s=60)
    assert len(crew.ready) == 2
    actor = crew.idle.pop()
    working = actor.work.remote()
    crew.kill(actor)
    while not (ended := crew.watch([working])):
        pass
    assert ended == [working]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(working)
    assert crew.lost(actor).number in (1, 2)
    crew.start()
    crew.come_up(first_s=60, company_s=60)
    assert sorted(info.number for info in crew.ready.values())[-1] == 3
    assert len(crew.ready) == len(crew.idle) == 2


def test_actors_find_the_files_of_the_users_own(
    toys: Callable[..., Toys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On nodes that were started before anybody named a folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PATH, f"mine{os.pathsep}/theirs")
    crew = toys()
    crew.come_up(first_s=60, company_s=0)
    (info,) = crew.ready.values()
    assert info.own == f"{tmp_path}/mine{os.pathsep}/theirs"


def test_a_warning_is_shown_once(toys: Callable[..., Toys]) -> None:
    crew = toys(count=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            crew.warn("the same")
    assert len(said) == 1


def test_nobody_waits_for_what_is_wished_for(toys: Callable[..., Toys]) -> None:
    crew = toys(count=0)
    crew.claim = {"CPU": 100}
    crew.wish()
    crew.claim = {}
    crew.start()
    crew.come_up(60, 60)  # and not until there is room for the other one
    assert (len(crew.ready), len(crew.starting), len(crew.wished)) == (1, 0, 1)
    crew.withdraw()
    assert (len(crew._actors), crew.wished) == (1, {})
    crew.wish()
    until = time.monotonic() + 60
    while crew.wished and time.monotonic() < until:
        crew.watch(())
    assert len(crew.ready) == len(crew.idle) == 2
    # One that fails in its start is not begun again: it is wished for again, if there is still work for it.
    crew.hows = ["dies"]
    crew.wish()
    while crew.wished and time.monotonic() < until:
        crew.watch(())
    assert (len(crew.ready), len(crew.starting), len(crew._actors)) == (2, 0, 2)


def sized(there: dict[str, float], monkeypatch: pytest.MonkeyPatch, cells: int = 1, **asked: Any) -> Any:
    """A crew of a cluster that has so much, before its first worker."""
    monkeypatch.setattr(train_crew, "resources", lambda: there)
    monkeypatch.setattr(train_crew, "nodes", lambda: [there])
    crew = object.__new__(train_crew.TrainCrew)
    crew._taken, crew._useful, crew._local, crew._grows = {}, cells, False, asked.get("workers", "auto") == "auto"
    crew.count = crew._size(Resources.model_validate(asked))
    return crew


@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_as_many_workers_as_there_is_something_to_do_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is shared is something to do for several."""
    four = {"CPU": 8.0, "GPU": 4.0}
    mesh = {"shards": 2, "replicas": 1}
    assert sized(four, monkeypatch, cells=9).count == 4
    assert sized(four, monkeypatch, cells=1, mesh=mesh).count == 2
    assert sized(four, monkeypatch, cells=2, mesh=mesh).count == 4
    # One cell may turn out to need several: as many as there is room for, unless somebody named a number.
    assert (sized(four, monkeypatch).count, sized(four, monkeypatch).most) == (1, 4)
    assert sized(four, monkeypatch, workers=2).most == 2
    # GPUs that are still to come are asked for all at once; where there are some, there are no more.
    assert sized({"CPU": 2.0}, monkeypatch, cells=3, mesh=mesh, gpus_per_worker=1).count == 2
    assert sized({"CPU": 2.0}, monkeypatch, cells=3, gpus_per_worker=1).count == 1
    with pytest.raises(SaescaleError, match="asks for 2 workers at a time, and the cluster has room for 1"):
        sized({"CPU": 8.0, "GPU": 1.0}, monkeypatch, cells=3, mesh=mesh, gpus_per_worker=1)


def test_a_shared_cell_has_the_window_of_its_source_in_memory_too() -> None:
    """A window of blocks of a live source is larger than eight row groups."""
    crew = object.__new__(train_crew.TrainCrew)
    workers: Any = {"worker": SimpleNamespace(kernels="cpu")}
    crew.ready = workers
    cell = Cell(store="x", d_model=64, n_latents=128, k=4, tokens=4096, batch_tokens=256, lr=1e-3, dead_after_tokens=9)
    store: Any = SimpleNamespace(
        fingerprint="x", manifest=SimpleNamespace(row_group_rows=512), rows=lambda split: 2**30, mixed_rows=2**22
    )
    alone = crew.needs([store], 2048, False)([cell])
    assert crew.needs_on_mesh([store], 2048, False)(cell, Layout()) == alone
    assert crew.needs_on_mesh([store], 2048, False)(cell, Layout(2)) > 2**22 * 64 * 2


@pytest.mark.slow
def test_workers_are_wished_for_and_ended_as_there_is_work(three_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On three nodes with a GPU each, of five cells."""
    monkeypatch.setattr(train_crew, "IDLE_S", 0.0)
    with train_crew.TrainCrew(5, Resources(gpus_per_worker=1)) as crew:
        until = time.monotonic() + 120
        while len(crew.ready) < 3 and time.monotonic() < until:
            crew.watch(())
        crew.grow(1)
        assert (len(crew.ready), len(crew.starting), len(crew.wished)) == (3, 0, 1)
        crew.grow(9)
        assert len(crew.wished) == 2  # no more workers than cells
        busy = crew.idle.pop()
        crew.spare()
        time.sleep(0.1)
        crew.spare()
        assert list(crew.ready) == [busy]
        assert (crew.idle, crew.wished) == ([], {})
        crew.grow(1)
        assert (len(crew.starting), len(crew.wished)) == (1, 0)  # there is room again
        crew.stay()
        crew.grow(9)
        assert not crew.wished
