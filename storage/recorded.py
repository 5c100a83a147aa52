"""The sources that a run's sweep.yaml names, whichever version wrote it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class RecordedSource(NamedTuple):
    """One store of a sweep, as it was when the sweep began; None: not said."""

    url: str  # where it lies now: a user may have moved it
    fingerprint: str | None
    subject: str | None
    site: str | None  # resid_post.22
    device_map: str | None = None  # of a live source: over what its subject is spread

    def words(self) -> str:
        """What a reader is shown of it."""
        return f"{self.url} ({self.fingerprint})"


def recorded_sources(document: Mapping[str, Any]) -> list[RecordedSource]:
    """In their order; none where `document`, a sweep.yaml, names no store.

    `store` says where they lie, `resolved.sources` what they are, in the same order. 0.1.0 knew one store, of which
    `resolved` said the fingerprint and the subject.
    """
    given, resolved = document.get("store"), document.get("resolved")
    resolved = resolved if isinstance(resolved, Mapping) else {}
    entries = [each for each in (given if isinstance(given, list) else [given]) if _url(each) is not None]
    told = resolved.get("sources")
    if not isinstance(told, list):
        told = [{"fingerprint": resolved.get("store_fingerprint"), "subject": resolved.get("subject")}]
    told = [one if isinstance(one, Mapping) else {} for one in told]
    told += [{}] * (len(entries) - len(told))
    found = []
    for each, one in zip(entries, told, strict=False):
        fingerprint, subject, site = (_text(one.get(name)) for name in ("fingerprint", "subject", "site"))
        device_map = _text(_live(each).get("device_map"))
        found.append(RecordedSource(_url(each) or "", fingerprint, subject, site, device_map))
    return found


def _url(given: Any) -> str | None:
    """Of a store or, of a live source, where its blocks lie."""
    return _text(_live(given).get("folder") if isinstance(given, Mapping) else given)


def _live(given: Any) -> Mapping[str, Any]:
    """What it says of a live source."""
    live = given.get("live") if isinstance(given, Mapping) else None
    return live if isinstance(live, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
