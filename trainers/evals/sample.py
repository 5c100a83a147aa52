"""Which latents of a cell are looked at where all of them would take too long: the same ones for every evaluation."""

import numpy as np


def latents_to_look_at(fired: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Up to `number` of the latents that fire at all, drawn uniformly: int64 [<= number], in ascending order.

    `fired` int [n_latents] says on how many held-out rows each is active. More latents contain those of fewer, so that
    what was measured on some can be set beside what is measured on more.
    """
    alive = np.flatnonzero(fired)
    return np.sort(np.random.default_rng(seed).permutation(alive)[:number])
