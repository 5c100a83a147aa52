"""Published numbers, fitted again: `saescale reproduce chinchilla | gpt4-nk | quickstart`."""

import difflib
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.laws.estimate import Fit, fit_law
from saescale.scaling.laws.forms.n_d import N_D
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import load_results
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

_NOISE = 0.005
_SIZES = 2.0 ** np.arange(11, 22, 2)
_KS = 2.0 ** np.arange(3, 10)
_LARGEST_FITTED = 2.0**19
_PREDICTED = {"n_latents": np.array([2.0**24]), "k": np.array([256.0])}
_BOOTSTRAPS = 400
_WITHIN = 0.90  # of seeds, for each coefficient
_NEAR = (0.90, 0.99)  # near 95 % of seeds: three standard errors of 200
PUBLISHED = Path(__file__).parents[1] / "deploy" / "results" / "quickstart"


class Line(NamedTuple):
    """One comparison, in words; `met` says whether it holds."""

    quantity: str
    expected: str
    found: str
    met: bool


@dataclass(frozen=True)
class Reproduction:
    """What was fitted again, from where, and how it compares."""

    title: str
    source: str
    lines: tuple[Line, ...]

    @property
    def met(self) -> bool:
        """Whether every line holds."""
        return all(line.met for line in self.lines)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        lines = [line._asdict() for line in self.lines]
        return {"title": self.title, "source": self.source, "met": self.met, "lines": lines}


def reproduce(name: str, seeds: int = 200) -> Reproduction:
    """Runs a reproduction by name; `seeds` simulated sweeps in gpt4-nk. Raises SaescaleError for another name."""
    if name not in REPRODUCTIONS:
        close = difflib.get_close_matches(name, REPRODUCTIONS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SaescaleError(f"unknown reproduction {name}; {hint}there are {', '.join(REPRODUCTIONS)}")
    return REPRODUCTIONS[name](seeds)


def chinchilla(seeds: int = 0) -> Reproduction:
    """L(N, D) of the 234 runs of Hoffmann et al. 2022, to the digits of the published refit."""
    content = files("saescale.scaling").joinpath("data/chinchilla_points.csv").read_text()
    points = np.genfromtxt(io.StringIO(content), delimiter=",", names=True)
    columns = {"n_latents": points["n_parameters"], "tokens": points["tokens"]}
    fit = fit_law(N_D, columns, points["loss"], FitSettings(0))
    found = dict(zip(N_D.names, N_D.to_reported(fit.raw), strict=True))
    published = {"A": "442.2", "B": "1271.8", "E": "1.7839", "a": "0.3426", "b": "0.3420"}
    lines = [Line("runs", "234", str(len(points)), len(points) == 234)]
    for coefficient, expected in published.items():
        text = f"{found[coefficient]:.{len(expected.split('.')[1])}f}"
        lines.append(Line(coefficient, expected, text, text == expected))
    lines.append(Line("starts that agree", "at least 2", f"{fit.agreeing} of {fit.starts}", fit.agreeing >= 2))
    return Reproduction(
        f"Chinchilla: loss = {N_D.formula.removeprefix('nmse = ')}, n parameters, D tokens",
        "points of Hoffmann et al. 2022 (2203.15556) as re-extracted by K. Takano (Apache-2.0), with his refit",
        tuple(lines),
    )


def gpt4_nk(seeds: int = 200) -> Reproduction:
    """Sweeps drawn from the published L(N, k) of GPT-4's SAEs with 0.5 % noise: how often intervals hold the truth."""
    n, k = (v.ravel() for v in np.meshgrid(_SIZES, _KS, indexing="ij"))
    truth = N_K.value(GPT4, {"n_latents": n, "k": k})
    there = float(N_K.value(GPT4, _PREDICTED)[0])
    small = n <= _LARGEST_FITTED
    held: dict[str, list[bool]] = {}
    errors = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 4])
        nmse = truth * np.exp(_NOISE * rng.standard_normal(len(n)))
        fit = _simulated(n, k, nmse, seed)
        for name, found in fit.coefficients().items():
            held.setdefault(name, []).append(_holds(found, GPT4[name]))
        for value in _KS:
            exponent = fit.exponent("n_latents", {"k": value})
            name = f"exponent of n at k = {value:g}"
            held.setdefault(name, []).append(_holds(exponent, GPT4["beta_n"] + GPT4["gamma"] * np.log(value)))
        prediction = _simulated(n[small], k[small], nmse[small], seed).predict(_PREDICTED)
        errors.append(np.log(prediction.value[0] / there))
        measured = there * np.exp(_NOISE * rng.standard_normal())
        held.setdefault("law", []).append(bool(prediction.low[0] <= there <= prediction.high[0]))
        held.setdefault("cell", []).append(bool(prediction.cell_low[0] <= measured <= prediction.cell_high[0]))
    at = "(2^24, 256) from n <= 2^19"
    named = {"law": f"the law at {at} within its interval", "cell": f"a new cell at {at} within its interval"}
    lines = []
    for name, inside in held.items():
        share = float(np.mean(inside))
        if name in named:
            lines.append(Line(named[name], "near 95 % of seeds", f"{share:.1%}", _NEAR[0] <= share <= _NEAR[1]))
        else:
            lines.append(
                Line(f"{name} within its interval", "at least 90 % of seeds", f"{share:.1%}", share >= _WITHIN)
            )
    spread = float(np.std(errors))
    lines.append(Line(f"sd of ln predicted at {at}", "below 0.02", f"{spread:.4f}", spread < 0.02))
    return Reproduction(
        f"L(N, k) of GPT-4's SAEs: {seeds} sweeps of 42 cells with {_NOISE:.1%} noise",
        "coefficients of Gao et al. 2024 (2406.04093)",
        tuple(lines),
    )


def quickstart(seeds: int = 0) -> Reproduction:
    """The law of the quickstart's published cells, as its published fits.json has it."""
    document = RunDirectory(str(PUBLISHED)).read_json("fits.json")
    if document is None:
        raise SaescaleError(f"there is no {PUBLISHED}/fits.json; run this from a checkout of the repository")
    results = load_results(str(PUBLISHED / "results.csv"))
    entry = next(entry for entry in document["fits"] if entry["law"] == "n_k")
    fit = fit_law(N_K, results.columns, results["nmse"], FitSettings(0))
    lines = [Line("cells", str(entry["points"]), str(len(results)), len(results) == entry["points"])]
    found = {name: value["value"] for name, value in fit.coefficients().items()}
    for k in entry["exponent_of_n_at_k"]:
        found[f"exponent of n at k = {k}"] = fit.exponent("n_latents", {"k": float(k)})["value"]
    published = {name: value["value"] for name, value in entry["coefficients"].items()}
    published |= {f"exponent of n at k = {k}": v["value"] for k, v in entry["exponent_of_n_at_k"].items()}
    for name, expected in published.items():
        texts = f"{expected:.3f}", f"{found[name]:.3f}"
        lines.append(Line(name, *texts, texts[0] == texts[1]))
    residual = f"{entry['rms_log_residual']:.4f}", f"{fit.rms_log_residual:.4f}"
    lines.append(Line("rms of ln nmse about the law", *residual, residual[0] == residual[1]))
    return Reproduction("The quickstart's own run: L(N, k) of its cells", str(PUBLISHED), tuple(lines))


REPRODUCTIONS: dict[str, Callable[[int], Reproduction]] = {
    "chinchilla": chinchilla,
    "gpt4-nk": gpt4_nk,
    "quickstart": quickstart,
}


def _simulated(n: np.ndarray, k: np.ndarray, nmse: np.ndarray, seed: int) -> Fit:
    return fit_law(N_K, {"n_latents": n, "k": k}, nmse, FitSettings(_BOOTSTRAPS, seed=seed), agree=False)


def _holds(interval: dict[str, float | None], true: float) -> bool:
    low, high = interval["low"], interval["high"]
    return low is not None and high is not None and low <= true <= high
