"""What a sweep tells whoever looks on while it works."""

from typing import Protocol

from saescale.storage.lease import Standing


class SweepDisplay(Protocol):
    """What shows the progress of a sweep."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def sweep(self, standing: Standing) -> None:
        """About twice a second while cells are trained."""

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None:
        """As evaluations are done (trainers/evals/run.py)."""
