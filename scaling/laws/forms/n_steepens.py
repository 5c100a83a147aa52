"""Curvature in n: a flat slope that turns into a steep one, the other broken power law (see n_flattens.py)."""

from saescale.scaling.laws.forms.n_flattens import TWO_POWERS
from saescale.scaling.laws.law import Law

N_STEEPENS = Law("n_steepens", "nmse = ((A n^-a)^-4 + (B n^-b)^-4)^(-1/4)", ("n_latents",), TWO_POWERS, join=-4.0)

forms = (N_STEEPENS,)
