"""One driver a run: who is refused, who succeeds a dead one, and who has to stop."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saescale.storage import files, lease
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.lease import Driver, Lease, Standing, Superseded, read_driver, require_free, require_owner

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from saescale.storage.lease import Lease
with Lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)


def elsewhere(run: str, **changes: object) -> Driver:
    """A driver on another machine, as its file says."""
    now = time.time()
    driver = Driver(driver="other", host="far", machine="far away", pid=1, started_at=now, beat_at=now)
    driver = driver.model_copy(update=changes)
    number = lease.newest_file(run)[1] + 1
    files.write_atomic(files.join(run, f"driver-{number:05d}.json"), driver.model_dump_json().encode())
    return driver


def test_a_second_driver_is_refused_while_the_first_lives(any_url: str) -> None:
    with Lease(any_url, job="sweep-1") as first:
        first.standing = Standing(cells=3, done=1)
        with pytest.raises(
            SaescaleError, match=r"is driven by another process already \(process \d+ on .*, job sweep-1"
        ):
            Lease(any_url)
        first.require()
        first.end("finished")
    found = read_driver(any_url)
    assert found is not None
    assert (found.state, found.standing.done, found.lives()) == ("finished", 1, False)
    with Lease(any_url) as second:
        second.require()


def test_a_driver_killed_on_this_machine_is_succeeded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(SaescaleError, match=f"process {child.pid}"):
            require_free(str(tmp_path))
        child.send_signal(signal.SIGKILL)
    before = read_driver(str(tmp_path))
    assert before is not None
    assert (before.state, before.lives()) == ("running", False)
    require_free(str(tmp_path), sleep=lambda seconds: pytest.fail("nothing to wait for"))


def test_a_silent_driver_elsewhere_is_watched_before_it_is_succeeded(tmp_path: Path) -> None:
    run = str(tmp_path)
    elsewhere(run)
    waited: list[float] = []
    with pytest.warns(SaescaleWarning, match="process 1 on far has not been heard of"):
        require_free(run, sleep=waited.append)
    assert sum(waited) == lease.LEASE_S
    dead = read_driver(run)
    require_free(run, dead, sleep=lambda seconds: pytest.fail("it was watched already"))

    beats = iter(range(1, 100))
    with pytest.raises(SaescaleError, match="driven by another process"):
        require_free(run, sleep=lambda seconds: elsewhere(run, beat=next(beats)) and None)
    # One that ends while it is watched has let go.
    elsewhere(run)
    require_free(run, sleep=lambda seconds: elsewhere(run, state="stopped") and None)


def test_clocks_are_trusted_only_for_what_is_long_ago(tmp_path: Path) -> None:
    elsewhere(str(tmp_path), beat_at=time.time() - 3600)
    require_free(str(tmp_path), sleep=lambda seconds: pytest.fail("nothing to wait for"))


def test_a_driver_that_was_taken_for_dead_stops_and_its_workers_write_nothing(tmp_path: Path) -> None:
    run = str(tmp_path)
    with Lease(run) as first:
        require_owner(run, first.driver)
        elsewhere(run)
        with pytest.raises(Superseded, match="taken over by another driver"):
            require_owner(run, first.driver)
        first._thread.join(timeout=30)
        with pytest.raises(Superseded):
            first.require()
        first.end("failed")
    found = read_driver(run)
    assert found is not None
    assert found.driver == "other"
    require_owner(run, None)


def test_a_driver_halted_before_it_wrote_its_beat_takes_nothing_back(any_url: str) -> None:
    """It has just found that the run is its own, and writes after another one took it."""
    with Lease(any_url) as first:
        plain = first._check
        first._check = lambda: plain() or (elsewhere(any_url) and None)  # type: ignore[method-assign]
        deadline = time.monotonic() + 60
        while (found := read_driver(any_url)) is None or found.driver != "other":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first._thread.join(timeout=0.3)  # some beats more
        found = read_driver(any_url)
        assert found is not None
        assert found.driver == "other"
        first._check = plain  # type: ignore[method-assign]
        first._thread.join(timeout=30)
        assert first.lost
    found = read_driver(any_url)
    assert found is not None
    assert found.driver == "other"


def test_of_drivers_that_begin_together_one_holds_the_run(any_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(lambda _: _try(any_url), range(4)))
    assert sum(isinstance(one, Lease) for one in held) == 1
    for one in held:
        if isinstance(one, Lease):
            one.end("stopped")


def _try(run: str) -> Lease | SaescaleError:
    try:
        return Lease(run)
    except SaescaleError as error:
        return error


def test_an_error_is_said_and_an_interrupt_is_no_error(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError), Lease(str(tmp_path)):
        raise SaescaleError("disk full")
    found = read_driver(str(tmp_path))
    assert found is not None
    assert (found.state, found.error) == ("failed", "disk full")
    with pytest.raises(KeyboardInterrupt), Lease(str(tmp_path)):
        raise KeyboardInterrupt
    found = read_driver(str(tmp_path))
    assert found is not None
    assert (found.state, found.error) == ("stopped", None)


def test_a_beat_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(str(tmp_path)) as held:
        before = read_driver(str(tmp_path))
        assert before is not None

        def refuse(url: str, data: object) -> int:
            raise SaescaleError("no room")

        heard: list[str] = []
        monkeypatch.setattr("warnings.warn", lambda text, *_, **__: heard.append(str(text)))
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomic", refuse)
            deadline = time.monotonic() + 30
            while not heard and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "no room" in heard[0]
        held.require()


def test_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "driver.json").write_text("{")
    with pytest.raises(SaescaleError, match=r"driver\.json is damaged \(.*\); remove it"):
        read_driver(str(tmp_path))
    os.unlink(tmp_path / "driver.json")
    assert read_driver(str(tmp_path)) is None
