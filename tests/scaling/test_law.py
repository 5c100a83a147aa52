"""Laws as data: values, gradients, and the way to reported coefficients and back."""

from pathlib import Path

import numpy as np
import pytest

from saescale.scaling.laws.estimate import fit_law
from saescale.scaling.laws.fit import fit_all
from saescale.scaling.laws.forms.n import N_FLOOR, N
from saescale.scaling.laws.forms.n_flattens import N_FLATTENS
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.forms.n_steepens import N_STEEPENS
from saescale.scaling.laws.law import Law, find_law, forms_of, law_names, load_laws, log_sum
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

EVERY = [form for name in law_names() for form in forms_of(name)]


def test_n_k_is_the_published_formula() -> None:
    n, k = np.array([2.0**15, 2.0**20]), np.array([32.0, 256.0])
    ln, lk = np.log(n), np.log(k)
    expected = np.exp(-0.50 + 0.26 * lk - 0.017 * ln - 0.042 * lk * ln) + np.exp(-1.32 - 0.085 * lk)
    np.testing.assert_allclose(N_K.value(GPT4, {"n_latents": n, "k": k}), expected, rtol=1e-12)


@pytest.mark.parametrize(("k", "exponent"), [(8, -0.104), (32, -0.163), (128, -0.221), (512, -0.279)])
def test_exponent_at_k_as_in_the_paper(k: float, exponent: float) -> None:
    assert float(N_K.exponent_of(N_K.to_raw(GPT4), "n_latents", {"k": k})) == pytest.approx(exponent, abs=5e-4)


@pytest.mark.parametrize("law", EVERY, ids=lambda law: law.formula)
def test_gradients_are_exact(law: Law) -> None:
    rng = np.random.default_rng(0)
    design = law.design({c: rng.normal(size=5) for c in law.columns})
    raw = rng.normal(size=len(law.names))
    _, gradient = log_sum(raw, design, law.term_of, law.join)
    for i in range(len(raw)):
        step = np.zeros_like(raw)
        step[i] = 1e-6
        up, down = (log_sum(raw + s, design, law.term_of, law.join)[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[:, i], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("law", EVERY, ids=lambda law: law.formula)
def test_reported_coefficients_lead_back(law: Law) -> None:
    raw = np.linspace(-1.0, 1.0, len(law.names))
    reported = dict(zip(law.names, law.to_reported(raw), strict=True))
    np.testing.assert_allclose(law.to_raw(reported), raw, atol=1e-14)
    assert find_law(law.name, reported) is law


def test_an_exponent_written_with_a_minus_is_positive() -> None:
    value = N_FLOOR.value({"A": 2.0, "a": 0.5, "E": 0.1}, {"n_latents": np.array([4.0])})
    np.testing.assert_allclose(value, [2.0 * 4.0**-0.5 + 0.1])


def test_unknown_law() -> None:
    with pytest.raises(SaescaleError, match="no law n with coefficients B"):
        find_law("n", {"B": 1})


TEN_LINES = """
from saescale.scaling.laws.law import Exponent, Law, Term

POWER_OF_K = Law(
    name="power_of_k", formula="nmse = A n^-a k^-b", columns=("n_latents", "k"),
    terms=(Term("A", (Exponent("a", ("n_latents",), sign=-1.0), Exponent("b", ("k",), sign=-1.0))),),
)
forms = (POWER_OF_K,)
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws of files are known to a process; each test has its own."""
    monkeypatch.setattr("saescale.scaling.laws.law._FROM_FILES", {})


@pytest.mark.parametrize("how", ["--law-file", "SAESCALE_PATH"])
def test_a_law_of_ones_own_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    assert len(TEN_LINES.strip().splitlines()) <= 10
    if how == "SAESCALE_PATH":
        path = tmp_path / "laws" / "power_of_k.py"
        path.parent.mkdir()
        monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    else:
        path = tmp_path / "mine.py"
    path.write_text(TEN_LINES)
    (law,) = forms_of("power_of_k") if how == "SAESCALE_PATH" else load_laws(str(path))
    assert load_laws(str(path)) == (law,)
    assert law_names()[:3] == ("n_k", "n", "c")
    assert law_names().count("power_of_k") == 1
    rows = [
        {"n_latents": n, "k": k, "nmse": 4 * n**-0.25 * k**-0.3} for n in (512, 1024, 2048, 4096) for k in (8, 16, 32)
    ]
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=("power_of_k",)))["fits"]
    found = {name: value["value"] for name, value in entry["coefficients"].items()}
    assert found == pytest.approx({"A": 4, "a": 0.25, "b": 0.3}, rel=1e-6)
    assert entry["formula"] == "nmse = A n^-a k^-b"
    assert entry["units"] == {"A": "nmse latents^a latents^b", "a": "1", "b": "1"}
    assert entry["holdout"]["rms_log_error"] < 1e-6
    assert find_law("power_of_k", found) is law


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", r"mine.py \(law\) fails with ZeroDivisionError: division by zero"),
        ("x = 1", "mine.py defines no law"),
        ("forms = (1,)", "mine.py defines no law"),
        (
            TEN_LINES.replace('columns=("n_latents", "k")', 'columns=("k",)'),
            "its exponents use k, n_latents, its columns",
        ),
        (TEN_LINES.replace("terms=(", 'terms=(Term("E"), '), "its first term needs an exponent; put a constant last"),
        (TEN_LINES.replace('"b"', '"a"'), "each coefficient needs a name of its own; got A, a, a"),
        (TEN_LINES.replace('"power_of_k"', '"n"'), "there is a law n already; choose another name"),
        (TEN_LINES.replace("(POWER_OF_K,)", "(POWER_OF_K, POWER_OF_K)"), "two forms of power_of_k have the same"),
    ],
)
def test_law_files_that_do_not_work(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SaescaleError, match=message):
        load_laws(str(path))


def test_a_law_is_called_as_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws" / "mine.py").write_text(TEN_LINES)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    with pytest.raises(SaescaleError, match=r"mine\.py defines the law power_of_k; call it mine, as the file is"):
        forms_of("mine")


def test_unknown_law_files_and_names() -> None:
    with pytest.raises(SaescaleError, match="there is no law file at nothing"):
        load_laws("nothing.py")
    with pytest.raises(SaescaleError, match="unknown law 'nk': did you mean n_k"):
        forms_of("nk")
    assert forms_of("n") == (N, N_FLOOR)


@pytest.mark.parametrize(("law", "first", "second"), [(N_FLATTENS, 0.6, 0.1), (N_STEEPENS, 0.1, 0.6)])
def test_broken_power_laws_turn_from_one_slope_to_the_other(law: Law, first: float, second: float) -> None:
    n = 2.0 ** np.arange(6, 26)
    truth = {"A": 0.3 * 2.0 ** (14 * first), "a": first, "B": 0.3 * 2.0 ** (14 * second), "b": second}
    nmse = law.value(truth, {"n_latents": n})
    slopes = -np.diff(np.log(nmse)) / np.diff(np.log(n))
    assert slopes[0] == pytest.approx(first, abs=0.01)
    assert slopes[-1] == pytest.approx(second, abs=0.01)
    fit = fit_law(law, {"n_latents": n}, nmse, settings=FitSettings(50))
    found = dict(zip(law.names, law.to_reported(fit.raw), strict=True))
    assert found == pytest.approx(truth, rel=1e-3)
    # The terms keep their places in every resample.
    draws = law.to_reported(fit.draws)
    assert (np.abs(draws[:, 1] - first) < 0.05).all()


def test_coefficients_say_what_they_are() -> None:
    units = {c.name: (c.unit, c.linear) for c in N_FLOOR.coefficients()}
    assert units == {"A": ("nmse latents^a", True), "a": ("1", False), "E": ("nmse", True)}
    (a,) = (c for c in N_FLOOR.coefficients() if c.name == "a")
    assert (a.low, a.high) == (-3, 3)


def test_the_law_over_subjects() -> None:
    rows = []
    for s in (256, 512, 1024, 2048):
        for n in (512, 1024, 2048, 4096, 8192):
            nmse = np.exp(-0.4 + 0.1 * np.log(s) + 0.1 * np.log(n) - 0.06 * np.log(s) * np.log(n)) + 0.05
            rows.append({"subject": f"width {s}", "d_model": s, "n_latents": n, "k": 32, "nmse": nmse})
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=("n_s",)))["fits"]
    assert entry["at"] == {"k": 32}
    assert entry["points"] == 20
    for s in (256, 2048):
        assert entry["exponent_of_n_at_d_model"][str(s)]["value"] == pytest.approx(0.1 - 0.06 * np.log(s), abs=1e-4)
