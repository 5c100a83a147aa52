"""On what scale a metric can follow a power law: how far it is from what an SAE that loses nothing would have.

A law of saescale is a sum of powers: positive, and its first term falls as SAEs grow. So it is fitted to

| a metric that | as | is fitted as |
|---|---|---|
| falls to 0 | KL | itself |
| falls or rises to a limit | cross-entropy, explained variance | its distance from the limit |
| is a share, better high | F1, precision | its odds of failure, (1 - share) / share |
| is a share, better low | dead latents | its odds, share / (1 - share) |
| rises, to what is not known | | its inverse: a law with a floor E saturates at 1 / E |

ln of odds is the logit: whatever the law says, the share stays within [0, 1], and errors near both ends count alike.
"""

from typing import NamedTuple

import numpy as np

from saescale.scaling.metrics import Metric, sibling


class Scale(NamedTuple):
    """How a metric called `name` becomes what laws are of, its `distance`, and back. `how` names which; `sign` is -1
    where the distance grows as the metric falls; `limit`: see Metric, of the cells at hand, and `said` what formulas
    call it."""

    name: str
    how: str
    sign: float
    limit: float = 0.0
    said: str = ""

    @property
    def words(self) -> str:
        """What laws are of, as formulas write it."""
        if self.how == "limit":
            return f"{self.said} - {self.name}" if self.sign < 0 else f"{self.name} - {self.said}"
        return {
            "itself": self.name,
            "share": f"{self.name} / (1 - {self.name})",
            "failure": f"(1 - {self.name}) / {self.name}",
            "inverse": f"1 / {self.name}",
        }[self.how]

    def distance(self, values: np.ndarray) -> np.ndarray:
        """Of the metric's values, the same shape; not positive, or not finite, where no law can follow."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.how == "limit":
                return self.sign * (values - self.limit)
            if self.how == "share":
                return values / (1 - values)
            if self.how == "failure":
                return (1 - values) / values
            return 1 / values if self.how == "inverse" else np.asarray(values)

    def value(self, distance: np.ndarray) -> np.ndarray:
        """The inverse of `distance`."""
        if self.how == "limit":
            return self.limit + self.sign * distance
        if self.how == "share":
            return distance / (1 + distance)
        if self.how == "failure":
            return 1 / (1 + distance)
        return 1 / distance if self.how == "inverse" else np.asarray(distance)

    def interval(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the metric for those of its distance."""
        ends = self.value(np.asarray(low)), self.value(np.asarray(high))
        return ends if self.sign > 0 else (ends[1], ends[0])


def scale_of(name: str, metric: Metric, limit: float | None = None) -> Scale:
    """The scale of a metric; `limit` is the value of the metric that its limit names, where it names one."""
    sign = 1.0 if metric.better == "lower" else -1.0
    if metric.bounded:
        return Scale(name, "share" if sign > 0 else "failure", sign)
    if isinstance(metric.limit, str) and limit is not None:
        return Scale(name, "limit", sign, limit, sibling(name, metric.limit))
    if isinstance(metric.limit, int | float) and (metric.limit or sign < 0):
        return Scale(name, "limit", sign, float(metric.limit), f"{metric.limit:g}")
    return Scale(name, "itself" if sign > 0 else "inverse", sign)
