"""What happens to activations before an SAE sees them, and what is measured once on a sample of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLE_TOKENS = 32_768
SAMPLE_CHUNK = 4_096  # of them in float64 at a time


def to_tensor(act: np.ndarray, dtype: str) -> Tensor:
    """Raw rows of a store [batch, d_model], float16 or bfloat16 bit patterns, as a 16-bit tensor on the same memory."""
    raw = torch.from_numpy(act)
    return raw.view(torch.bfloat16) if dtype == "bfloat16" else raw


def normalise(raw: Tensor) -> Tensor:
    """Subtract each row's mean over d_model, scale the row to unit norm: [batch, d_model] -> float32 of that shape.

    Before the SAE and before any error is computed (Gao et al. 2024, section 2.1).
    """
    x = raw.to(torch.float32, copy=True)  # which `raw` may have already
    x -= x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


class Centre(NamedTuple):
    """Measured once, on the first 32,768 preprocessed rows of the stream."""

    b_pre: Tensor  # [d_model], the geometric median: initial b_pre of every cell
    variance: float  # c = mean((x - mean(x))^2) over all entries: the fixed normaliser of the training loss


def measure_centre(sample: Tensor) -> Centre:
    """Geometric median and loss normaliser of preprocessed rows [rows, d_model] (Gao et al. 2024, appendix A)."""
    # In chunks: a float64 copy of the sample would be the most memory that a small pack ever takes.
    chunks = sample.split(SAMPLE_CHUNK)
    mean = sum((chunk.double().sum(dim=0) for chunk in chunks), torch.zeros(())) / len(sample)
    squared = sum(float((chunk.double() - mean).square().sum()) for chunk in chunks)
    return Centre(geometric_median(sample), squared / sample.numel())


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weiszfeld's iteration from the mean: [rows, d_model] -> [d_model], the point of least summed distance.

    Stops when a step is shorter than `tolerance` times the mean distance, or after `iterations`.
    """
    median = points.mean(dim=0)
    for _ in range(iterations):
        distance = (points - median).norm(dim=1)
        # A point on the median itself would get an infinite weight.
        weight = 1 / distance.clamp_min(1e-8 * float(distance.mean()) + 1e-20)
        updated = (weight @ points) / weight.sum()
        step = (updated - median).norm()
        median = updated
        if step < tolerance * distance.mean():
            break
    return median
