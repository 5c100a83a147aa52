"""What goes wrong with object stores, between a client and moto's server: refusals, slow answers, cut bodies."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

KINDS = ("500 Internal Server Error", "503 Slow Down", "slow", "cut")


class Faults:
    """A WSGI application around another; `rate` of all requests meet a fault, seeded, while `injected` lasts."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.rate = 0.0
        self.slow_s = 0.0
        self.down = False
        self.met: Counter[str] = Counter()
        self._random = random.Random(0)
        self._lock = threading.Lock()

    @contextmanager
    def injected(self, rate: float, slow_s: float = 0.3) -> Any:
        """Faults for a while; gives the Counter of what was met."""
        self.met.clear()
        self.rate, self.slow_s = rate, slow_s
        try:
            yield self.met
        finally:
            self.rate = 0.0

    @contextmanager
    def outage(self) -> Iterator[None]:
        """No request is answered for a while."""
        self.down = True
        try:
            yield
        finally:
            self.down = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            kind = self._random.choice(KINDS) if self._random.random() < self.rate else None
        if self.down:
            kind = "503 Slow Down"
        if kind is None:
            return self.app(environ, start_response)
        if kind == "slow":
            time.sleep(self.slow_s)
            self.met[kind] += 1
            return self.app(environ, start_response)
        if kind == "cut":
            body = b"".join(self.app(environ, start_response))
            self.met[kind] += bool(body)
            return [body[: len(body) // 2]]
        self.met[kind] += 1
        # What a client still sends has to be read, or it sees a broken connection in place of the answer.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = "SlowDown" if kind.startswith("503") else "InternalError"
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        start_response(kind, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []
