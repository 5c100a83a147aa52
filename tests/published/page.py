"""A data set in deploy/results, and the pages of which parts are made from its files."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.csv
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]

Rows = list[dict[str, str]]  # of results.csv
Fits = dict[str, Any]


class DataSet(NamedTuple):
    """`parts` are the Markdown of each part by name, `pages` which parts stand on which page."""

    folder: Path
    pages: Mapping[Path, tuple[str, ...]]
    figures: tuple[str, ...]
    parts: Callable[[Rows, Fits], dict[str, str]]

    def take_over(self, run: Path, *others: Path) -> None:
        """Results, curves, laws and figures of a run directory; of `others` what a data set has besides."""
        self.folder.mkdir(exist_ok=True)
        for name in ("results", "curves"):
            shutil.copy(run / f"{name}.parquet", self.folder / f"{name}.parquet")
            pyarrow.csv.write_csv(pq.read_table(run / f"{name}.parquet"), self.folder / f"{name}.csv")
        shutil.copy(run / "fits.json", self.folder / "fits.json")
        for name in self.figures:
            shutil.copy(run / "figures" / name, self.folder / name)

    def page(self, path: Path) -> str:
        """The text that the page should have."""
        with (self.folder / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        made = self.parts(rows, json.loads((self.folder / "fits.json").read_text()))
        text = path.read_text()
        for name in self.pages[path]:
            text = put(text, name, made[name])
        return text


def put(text: str, name: str, content: str) -> str:
    """A page's text with that part replaced. Raises ValueError where it has no such part."""
    pattern = re.compile(rf"(<!-- published: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"no part <!-- published: {name} -->, or several")
    replace: Callable[[re.Match[str]], str] = lambda match: match[1] + content + match[2]  # noqa: E731
    return pattern.sub(replace, text)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(found: Mapping[str, float], digits: int = 3) -> str:
    """Such as 0.132 (0.110 to 0.219)."""
    value, low, high = (found[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
