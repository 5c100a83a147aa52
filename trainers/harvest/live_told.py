"""What the producer of a live source says of itself: producer.json, renewed for as long as it lives."""

import threading
import time
from contextlib import suppress
from typing import Any

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.live import BEAT_S, PRODUCER, Making, read_making
from saescale.trainers.harvest.make_shard import Made

_ALONE_S = 3.0  # a producer that does not move for so long is dead


def require_alone(url: str) -> None:
    """Raises SaescaleError where another producer works on the folder."""
    found = read_making(url)
    if found is None or found.state == "ended":
        return
    until = time.monotonic() + _ALONE_S
    while time.monotonic() < until:
        time.sleep(BEAT_S / 4)
        now = read_making(url)
        if now is not None and now.beat != found.beat:
            raise SaescaleError(f"{url}: another producer makes the blocks of this live source; end it first")


class Told:
    """Keeps the file in the folder `url`, from `begin` on."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self._url = url
        self.making = Making(max_bytes=max_bytes)
        self.ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Says for the first time that it lives, and goes on to."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="saescale-live-producer", daemon=True)
            self._thread.start()

    def say(self, **more: Any) -> None:
        """What has changed, with the next beat."""
        self.making = self.making.model_copy(update=more)

    def made(self, made: Made, again: bool) -> None:
        """A block was computed."""
        self.say(
            made=self.making.made + made.rows,
            again=self.making.again + (made.rows if again else 0),
            tokens_per_s=made.rows / max(1e-9, made.seconds),
        )

    def end(self, error: BaseException | None) -> bool:
        """Says why it ends, once; False where it never began, so that nothing of it is left."""
        self.ended.set()
        if self._thread is None:
            return False
        self._thread.join()
        self.say(state="ended", error=str(error) if isinstance(error, Exception) else None)
        with suppress(SaescaleError):
            self._write()
        return True

    def _keep(self) -> None:
        while True:
            with suppress(SaescaleError):
                self._write()
            if self.ended.wait(BEAT_S):
                return

    def _write(self) -> None:
        self.say(beat=self.making.beat + 1)
        files.write_atomic(files.join(self._url, PRODUCER), self.making.model_dump_json().encode())
