"""The supervisor of long-lived Ray actors: starts them, lets those join that come up, replaces those that are lost.

What an actor is, how many there are and what they do is a crew's own: train_crew.py, harvest_crew.py.
"""

import os
import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saescale.cluster.crew.connect import connect, disconnect
from saescale.cluster.crew.head import HeadWatch, finds_no_room, free, node_ids, resources
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.registry import PATH
from saescale.storage.waiting import Wait, hear

POLL_S = 0.5
ROOM_S = 5.0  # between two looks whether there is room for an actor that does not come up


class Place(Protocol):
    """What an actor says of itself when it is up: at least which process it is. `node_id` is Ray's, hex."""

    @property
    def node_id(self) -> str: ...
    @property
    def pid(self) -> int: ...


Info = TypeVar("Info", bound=Place)


class Words(NamedTuple):
    """How a crew speaks of actors that do not come up, for a {kind} of error or as it says of itself ({why})."""

    again: str
    fewer: str
    one: str  # what an actor is called


class Died(Exception):
    """An actor is gone, or what it gave is; `kind` names the error without what is new in it each time."""

    def __init__(self, error: BaseException) -> None:
        said = one_line(error)
        # Ray's own account of it stands behind a page of identifiers.
        super().__init__(said[max(0, said.find("The actor is dead because")) :][:300])
        self.kind = type(getattr(error, "cause", None) or error).__name__


def take(reference: Any) -> Any:
    """What an actor gave or raised; Died, with Ray's error as its cause, when it could not."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, SaescaleError) else error)
    except ray.exceptions.RayError as error:
        raise Died(error) from error


class Crew(ABC, Generic[Info]):
    """Actors of one kind, on the Ray cluster at `address` (default: RAY_ADDRESS, else a local Ray, which is then ended
    with them), or on the one that this process has joined already.

    `starting` maps the reference of which an answer says that an actor is up to the actor, `ready` those that are up
    to what they said, and `idle` are the ready ones that have no work. Actors that find no room yet stay queued in Ray,
    where an autoscaler sees what they ask for. `wished` are, like `starting`, those for which there may never be room:
    nobody waits for them.
    """

    words: ClassVar[Words]

    def __init__(self, address: str | None) -> None:
        self.starting: dict[Any, Any] = {}
        self.wished: dict[Any, Any] = {}
        self.ready: dict[Any, Info] = {}
        self.idle: list[Any] = []
        self._actors: list[Any] = []
        self._due: list[float] = []  # when others are to be started in the place of those that are lost
        self._failed_starts = 0  # since one last came up
        self._warned: set[str] = set()
        self._nobody_since: float | None = None  # in time.time(); until when it is waited for one
        self._until: float | None = None
        self._room: tuple[float, str] = (0.0, "")  # when it was asked for last, and what was said
        self.claim: Mapping[str, float] = {}  # what an actor takes of the cluster ("CPU", "GPU")
        self._head: HeadWatch | None = None
        self.owns_ray = False
        self._address = address

    # --- what a crew says of its actors

    @abstractmethod
    def _create(self) -> tuple[Any, Any]:
        """A new actor, and a reference that is answered with its Info when it is up."""

    @abstractmethod
    def _most_starts(self) -> int:
        """So many may fail one after another before fewer actors have to do."""

    @abstractmethod
    def _pause(self, failures: int) -> float:
        """Seconds until the next start after so many that failed."""

    @abstractmethod
    def _nobody(self, why: str) -> SaescaleError:
        """What to say when there is not one actor and none comes up."""

    def _joined(self, actor: Any, info: Info) -> None:
        """An actor came up."""
        self.ready[actor] = info
        self.idle.append(actor)

    # --- starting and joining

    def connect(self) -> None:
        """Joins Ray, or starts one. Raises SaescaleError when it cannot be reached."""
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray:
            connect(self._address)
        self._head = HeadWatch(ray.get_runtime_context().gcs_address)

    def _actor(self, kind: type, options: Mapping[str, Any], *arguments: Any) -> Any:
        """An actor of a class, which finds the user's own files (storage/registry.py) where this process does."""
        own = [os.path.abspath(folder) for folder in os.environ.get(PATH, "").split(os.pathsep) if folder]
        seen = {"runtime_env": {"env_vars": {PATH: os.pathsep.join(own)}}} if own else {}
        return ray.remote(kind).options(**options, **seen).remote(*arguments)

    def start(self) -> None:
        """Queues one more actor."""
        actor, up = self._create()
        self._actors.append(actor)
        self.starting[up] = actor

    def wish(self) -> None:
        """Queues one more actor, which comes up if the cluster grows."""
        actor, up = self._create()
        self._actors.append(actor)
        self.wished[up] = actor

    def withdraw(self) -> None:
        """No more actors are wished for than have come up."""
        for actor in self.wished.values():
            self._end(actor)
        self.wished.clear()

    def start_later(self, pause: float) -> None:
        """Queues one more actor in `pause` seconds, when somebody watches."""
        self._due.append(time.monotonic() + pause)

    @property
    def is_starting(self) -> bool:
        """Whether an actor is to come up, now or in a while."""
        return bool(self.starting or self._due)

    def come_up(self, first_s: float, company_s: float) -> None:
        """Until all are up, or one is since `company_s`. SaescaleError when none is after `first_s`."""
        began, first = time.monotonic(), None
        self._until = time.time() + first_s
        while self.starting or self._due:
            now = time.monotonic()
            first = now if first is None and self.ready else first
            if (now - began > first_s) if first is None else (now - first > company_s):
                break
            self.watch(())
        self._until = None
        if not self.ready:
            raise self._nobody(self.no_room() or "they do not answer")

    def watch(self, busy: Collection[Any]) -> list[Any]:
        """Waits a little for something to happen, and returns which of the references `busy` have ended.

        Meanwhile actors join. Raises SaescaleError when there is no actor and none comes up, and what an actor says to
        the user in its start: another one would say the same.
        """
        now = time.monotonic()
        for due in [due for due in self._due if due <= now]:
            self._due.remove(due)
            self.start()
        watched = [*busy, *self.starting, *self.wished]
        if watched:
            ended, _ = ray.wait(watched, num_returns=1, timeout=POLL_S)
            ended, _ = ray.wait(watched, num_returns=len(watched), timeout=0) if ended else ([], [])
        else:
            time.sleep(POLL_S)
            ended = []
        up = [reference for reference in ended if reference in self.starting or reference in self.wished]
        for reference in up:
            self._join(reference)
        self._say_nobody(bool(busy or self.idle))
        if self._head is not None:
            self._head.require()
        return [reference for reference in ended if reference not in up]

    def _say_nobody(self, somebody: bool) -> None:
        """While there is no actor: what is waited for, and why."""
        if somebody:
            self._nobody_since = None
            hear("actors", [])
            return
        self._nobody_since = self._nobody_since or time.time()
        asked_at, why = self._room
        if time.time() - self._nobody_since > ROOM_S and time.monotonic() - asked_at > ROOM_S:
            self._room = time.monotonic(), (why := self.no_room())
        what = f"{self.words.one} to come up{f': {why}' if why else ''}"
        hear("actors", [Wait(what, self._nobody_since, self._until)])

    def no_room(self) -> str:
        """Which of what an actor claims the cluster has not free; nothing where it has room, and one is starting."""
        if not finds_no_room(self.claim):
            return ""
        there, left = resources(), free()
        short = [name for name, each in self.claim.items() if each > left.get(name, 0.0)]
        said = [f"{left.get(name, 0.0):g} of its {there.get(name, 0.0):g} {name}s" for name in short]
        has = " and ".join(said) or "no node with so much"
        each = " and ".join(f"{share:g} {name}" for name, share in self.claim.items() if share)
        return f"the cluster has {has} free and one takes {each} (`ray status`)"

    def _join(self, up: Any) -> None:
        wished = up in self.wished
        actor = self.wished.pop(up) if wished else self.starting.pop(up)
        try:
            info: Info = take(up)
        except SaescaleError:
            self._end(actor)
            raise
        except Died as died:
            if wished:
                self._end(actor)
            else:
                self._failed(actor, died)
        except Exception as error:
            # It lives on otherwise, with the device that it claimed.
            self._failed(actor, Died(error))
        else:
            self._failed_starts = 0
            self._joined(actor, info)

    def _failed(self, actor: Any, died: Died) -> None:
        self._end(actor)
        self._failed_starts += 1
        if self._failed_starts < self._most_starts():
            self.warn(self.words.again.format(kind=died.kind, why=died))
            self.start_later(self._pause(self._failed_starts))
        elif self.ready or self.starting or self._due:
            self.warn(self.words.fewer.format(kind=died.kind, why=died))
        else:
            raise self._nobody(str(died)) from died

    # --- losing and ending

    def lost(self, actor: Any, error: BaseException | None = None) -> Info:
        """Forgets an actor that died, or ends one that is of no more use; returns what it was.

        One that is only out of reach, as `error` may say, must not go on beside the next one: it is killed.
        """
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            self.kill(actor)
        self._end(actor)
        if actor in self.idle:
            self.idle.remove(actor)
        return self.ready.pop(actor)

    def replace(self, actor: Any, error: BaseException | None = None) -> Info:
        """The same, and queues another one in its place."""
        info = self.lost(actor, error)
        self.start()
        return info

    def give_way(self, pause_s: float) -> None:
        """Ends those that have no work, and those that wait for room, and queues as many again in `pause_s` seconds."""
        self.withdraw()
        waiting = list(self.starting.values())
        self.starting.clear()
        for actor in waiting:
            self._end(actor)
        idle = list(self.idle)
        for actor in idle:
            self.lost(actor)
        for _ in (*waiting, *idle):
            self.start_later(pause_s)

    def kill(self, actor: Any) -> None:
        """Kills the process of an actor that does not answer, from its own node: `ray.kill` only asks it to end."""
        info = self.ready[actor]
        where = NodeAffinitySchedulingStrategy(info.node_id, soft=False)
        ray.remote(_kill).options(num_cpus=0, scheduling_strategy=where, max_retries=0).remote(info.pid)

    def replace_stranded(self) -> None:
        """Replaces idle actors whose node is gone: nobody else notices."""
        alive = node_ids()
        for actor in [actor for actor in self.idle if self.ready[actor].node_id not in alive]:
            self.replace(actor)

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        self._actors.remove(actor)

    def close(self) -> None:
        """Ends the actors, and Ray where this crew started or joined it."""
        hear("actors", [])
        if self._head is not None:
            self._head.close()
            self._head = None
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            if self.owns_ray:
                disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what is told

    def warn(self, text: str) -> None:
        """Shows a warning once, however often it comes."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, SaescaleWarning, stacklevel=3)


def back_off(failures: int, first_s: float, most_s: float) -> float:
    """Seconds to wait after so many failures: twice as long each time."""
    return min(most_s, first_s * 2.0 ** min(20, failures - 1))


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
