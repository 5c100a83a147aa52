"""The report in a real browser: it loads whole, fetches nothing, draws its figures and answers to the reader."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report.report import analyse
from saescale.storage.columns import RESULTS
from saescale.storage.rundir import RunDirectory
from tests.browser import Page, chromium, find_chromium
from tests.scaling.known_arms import SIZES as SIZES_OF_ARMS
from tests.scaling.known_arms import Known, known_arms, known_curves

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096, 8192), (8, 16, 32, 64)
_RUN: list[Path] = []  # written once, read by all


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium(find_chromium()) as page:
        yield page


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory, cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> str:
    if not _RUN:
        folder = tmp_path_factory.mktemp("run")
        rows = cells(SIZES, KS, noise=0.005)
        run = RunDirectory(str(folder))
        run.write_results([*rows, rows[0] | {"cell_id": "gone", "status": "failed", "error": "loss is NaN", "k": 8}])
        run.write_curves(pa.Table.from_pylist(curves_of(rows)))
        analyse(run, FitSettings(20), provenance={"sweep": "test", "store": "s3://b/s (abc123)"})
        _RUN.append(folder)
    return f"file://{_RUN[0]}/report.html"


@pytest.fixture
def page(browser: Page, url: str) -> Page:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(url)
    return browser


def rows_shown(page: Page) -> list[list[str]]:
    rows = "[...document.querySelectorAll('table.cells tbody tr:not([hidden])')]"
    shown: list[list[str]] = page.run(f"{rows}.map(r => [...r.cells].map(c => c.textContent))")
    return shown


def write_filter(page: Page, text: str) -> None:
    page.run(f"(() => {{ const f = document.getElementById('filter'); f.value = {json.dumps(text)};"
             " f.dispatchEvent(new Event('input')); })()")  # fmt: skip


def background(page: Page) -> str:
    return str(page.run("getComputedStyle(document.body).backgroundColor"))


def wait_for(page: Page, script: str) -> None:
    deadline = time.monotonic() + 60  # bounds only failures
    while not page.run(script):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)


def test_it_loads_whole_and_draws_every_figure(page: Page, url: str) -> None:
    names = {path.stem for path in (_RUN[0] / "figures").glob("*.json")}
    assert len(names) >= 8
    drawn = page.run(
        "Object.fromEntries([...document.querySelectorAll('.plot')].map(p => [p.dataset.figure,"
        " p.querySelectorAll('.scatterlayer .trace').length]))"
    )
    assert set(drawn) == names
    for name, traces in drawn.items():
        assert traces == len(json.loads((_RUN[0] / "figures" / f"{name}.json").read_text())["data"]), name
    # All cells are in the first figure as points.
    assert page.run("document.querySelectorAll('#nmse_against_n .point').length") == len(SIZES) * len(KS)
    assert page.run("[...document.querySelectorAll('.still')].every(i => getComputedStyle(i).display === 'none')")
    assert page.errors == []
    assert [r for r in page.requests if not r.startswith(("data:", "blob:"))] == [url]


def test_without_scripts_the_figures_are_there_too(browser: Page, url: str) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(url)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run(
        "[...document.querySelectorAll('.still')].every(i => i.naturalWidth > 100 && i.clientWidth > 100)"
    )
    assert browser.run("document.querySelectorAll('.main-svg').length") == 0
    assert browser.run("document.querySelector('.filter').hidden")


def test_filter(page: Page) -> None:
    assert len(rows_shown(page)) == len(SIZES) * len(KS)
    for text, expected in (
        ("k=32 n>=1024", {(n, "32") for n in ("1,024", "2,048", "4,096", "8,192")}),
        ("k = 8 n < 1,024", {("512", "8")}),
        ("512x16", {("512", "16")}),
        ("n!=512 n<=1024 k>16", {("1,024", "32"), ("1,024", "64")}),
        ("nosuchcolumn=3", set()),
    ):
        write_filter(page, text)
        assert {(row[0], row[1]) for row in rows_shown(page)} == expected, text
    assert page.run("document.getElementById('filtered').textContent") == "0 of 20 cells"
    write_filter(page, "")
    assert page.run("document.getElementById('filtered').textContent") == "20 cells"
    assert page.errors == []


def test_sort(page: Page) -> None:
    header = "document.querySelector('th[data-name=nmse]')"
    column = page.run(f"{header}.cellIndex")
    for direction in ("ascending", "descending"):
        page.run(f"{header}.querySelector('button').click()")
        values = [float(row[column]) for row in rows_shown(page)]
        assert values == sorted(values, reverse=direction == "descending")
        assert page.run(f"{header}.getAttribute('aria-sort')") == direction
    # N reads 1,024 and is sorted as a number all the same.
    page.run("document.querySelector('th[data-name=n] button').click()")
    assert [row[0] for row in rows_shown(page)][:: len(KS)] == [f"{n:,}" for n in SIZES]
    assert page.errors == []


BEYOND = """[...document.querySelectorAll('.drawn')].flatMap((figure) => {
  const ends = figure.querySelector('.main-svg').getBoundingClientRect();
  return [...figure.querySelectorAll('.textpoint text, .xtick text, .ytick text')].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.left < ends.left - 0.5 || own.right > ends.right + 0.5;
  }).map((text) => `${figure.id}: ${text.textContent}`);
})"""


def test_the_smallest_phone_cuts_no_words_off_in_a_wide_font(browser: Page, arms_url: str, tmp_path: Path) -> None:
    page = Path(arms_url.removeprefix("file://")).read_text()
    assert page.count("system-ui,") > 10  # of each figure
    (tmp_path / "wide.html").write_text(page.replace("system-ui,", "monospace,"))
    browser.open(f"file://{tmp_path}/wide.html", width=240, touch=True)
    assert "does not get there" in browser.run("document.getElementById('compute_ratio').textContent")
    assert browser.run(BEYOND) == []


def test_a_chip_hides_its_k_everywhere(page: Page) -> None:
    points = "document.querySelectorAll('#nmse_against_n .point').length"
    assert page.run(points) == 20
    page.run("document.querySelector('.chip[data-k=\"16\"]').click()")
    wait_for(page, f"{points} === 15")
    assert {row[1] for row in rows_shown(page)} == {"8", "32", "64"}
    assert page.run("document.querySelector('.chip[data-k=\"16\"]').getAttribute('aria-pressed')") == "false"
    page.run("document.querySelector('.chip[data-k=\"16\"]').click()")
    wait_for(page, f"{points} === 20")
    assert page.errors == []


def test_zoomed_in_there_are_other_ticks(page: Page) -> None:
    plot = "document.querySelector('#nmse_against_n .plot')"
    whole = page.run(f"{plot}.layout.xaxis.range")
    page.run(f"Plotly.relayout({plot}, {{'xaxis.range': [3, 3.2]}}).then(() => null)")
    wait_for(page, f"{plot}.layout.xaxis.tickmode === 'auto'")
    page.run(f"Plotly.relayout({plot}, {{'xaxis.range': {json.dumps(whole)}}}).then(() => null)")
    wait_for(page, f"{plot}.layout.xaxis.tickmode === 'array'")
    assert page.run(f"[...{plot}.querySelectorAll('.xtick text')].map(t => t.textContent)") == [f"{n:,}" for n in SIZES]
    assert page.errors == []


def test_dark(page: Page) -> None:
    paper = "document.querySelector('#nmse_against_n .main-svg').style.background"
    assert background(page) == page.run(paper) == "rgb(255, 255, 255)"
    page.prefer(dark=True)
    wait_for(page, f"{paper} === 'rgb(21, 24, 28)'")
    assert background(page) == "rgb(21, 24, 28)"
    page.run("document.getElementById('theme').click()")
    wait_for(page, f"{paper} === 'rgb(255, 255, 255)'")
    assert background(page) == "rgb(255, 255, 255)"
    assert page.run("document.getElementById('theme').textContent") == "Dark"
    assert page.errors == []


def test_phone(browser: Page, url: str) -> None:
    browser.errors.clear()
    browser.open(url, width=360, height=740, touch=True)
    assert browser.run("document.documentElement.scrollWidth") == 360
    # Nothing drawn is cut off: the names of lines end within the figure.
    cut = browser.run(
        "[...document.querySelectorAll('.plot')].flatMap(p => [...p.querySelectorAll('.textpoint text')].filter("
        "t => t.getBoundingClientRect().right > p.getBoundingClientRect().right + 1).map(t => t.textContent))"
    )
    assert cut == []
    assert browser.errors == []


def test_print(page: Page) -> None:
    pdf = page.print_pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("[...document.querySelectorAll('.still')].every(i => getComputedStyle(i).display === 'block')")
    assert page.run(
        "[...document.querySelectorAll('.plot, nav, .filter')].every(e => getComputedStyle(e).display === 'none')"
    )
    assert background(page) == "rgb(255, 255, 255)"
    page.call("Emulation.setEmulatedMedia", media="")


@pytest.fixture(scope="module")
def arms_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three architectures, of which one is a user's and one a baseline."""
    rows = known_arms({"topk": Known(), "mine": Known(1.1), "pca": Known(2.0)}, ks=(8, 16))
    folder = tmp_path_factory.mktemp("arms")
    run = RunDirectory(str(folder))
    names = [field.name for field in RESULTS]
    run.write_results([{name: value for name, value in row.items() if name in names} for row in rows])
    run.write_curves(pa.Table.from_pylist(known_curves(rows)))
    with pytest.MonkeyPatch.context() as patch:
        # For the still pictures, which take most of the time, other tests stand.
        patch.setattr("saescale.scaling.figures.paper.draw", lambda _: {"png": b"", "pdf": b"", "svg": b"<svg/>"})
        analyse(run, FitSettings(20), formats=("md",))
    return f"file://{folder}/report.html"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_architectures_side_by_side(browser: Page, arms_url: str, width: int, dark: bool) -> None:
    browser.errors.clear()
    browser.open(arms_url, width=width, dark=dark)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    headings = browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings.index("Architectures side by side") < headings.index("Each kind of cells") < headings.index("Laws")
    summary = browser.run("document.getElementById('summary').textContent").replace("\u00a0", " ")
    assert "At N = 4,096 and L0 = 16 topk leads" in summary
    assert "the lowest first: topk < mine < pca" in summary
    assert "Every trained architecture beats pca" in summary
    drawn = "[...document.querySelectorAll('.drawn')].map(f => f.id)"
    assert "frontier-n512" in browser.run(drawn)
    # What is folded is drawn when it is opened, with a size of its own.
    assert "nmse_against_n-topk" not in browser.run(drawn)
    browser.run("document.querySelectorAll('details.part').forEach(d => d.open = true)")
    wait_for(browser, f"{drawn}.includes('nmse_against_n-mine')")
    assert browser.run("document.querySelector('[data-figure=\"nmse_against_n-mine\"] .main-svg').clientWidth") > 200


def test_a_chip_hides_its_architecture_everywhere(browser: Page, arms_url: str) -> None:
    browser.open(arms_url)
    marks = "document.querySelectorAll('#by_n-k8 .point').length"
    before, rows = browser.run(marks), len(rows_shown(browser))
    colours = browser.run(
        "getComputedStyle(document.querySelector('.chip[data-name=topk]'), '::before').backgroundColor"
    )
    assert colours == "rgb(27, 79, 156)"
    browser.run("document.querySelector('.chip[data-name=topk]').click()")
    assert browser.run(marks) == before - len(SIZES_OF_ARMS)
    assert len(rows_shown(browser)) == rows * 2 // 3
    browser.run("document.querySelector('.chip[data-name=topk]').click()")
    assert browser.run(marks) == before
