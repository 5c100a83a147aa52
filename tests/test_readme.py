"""The README: what it points to is there, and its tables are those of the published results."""

import csv
import re
from pathlib import Path

import pytest

from tests.benchmarks.readme_tables import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_local_links_resolve() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_is_that_of_the_published_results() -> None:
    with (ROOT / "deploy/results/quickstart/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for n in sorted({int(row["n_latents"]) for row in rows}):
        found = {int(row["k"]): float(row["nmse"]) for row in rows if int(row["n_latents"]) == n}
        line = f"| {n:,} | " + " | ".join(f"{found[k]:.4f}" for k in sorted(found)) + " |"
        assert line in README


@pytest.mark.parametrize(("name", "table"), tables().items())
def test_tables_of_benchmarks_are_those_of_their_results(name: str, table: str) -> None:
    assert table in README, f"run python -m tests.benchmarks.readme_tables and take its table of {name} over"
