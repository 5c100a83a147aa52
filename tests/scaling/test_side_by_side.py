"""Tables of a report that set kinds of cells side by side."""

from saescale.scaling.comparison.compare import Comparison, compare
from saescale.scaling.comparison.depth import AtDepth
from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.report.side_by_side import comparison_tables, depth_table, heading, overall_table
from saescale.scaling.tables import Table
from tests.scaling.known_arms import Known, known_arms, known_curves


def compared(**shared: str) -> Comparison:
    arms = {
        "topk": Known(),
        "hierarchical_topk": Known(1.04),
        "gated": Known(1.0, 1.6, 0.97),
        "pca": Known(2.0, dead=0.3),
    }
    rows = known_arms(arms, noise=0.001, **shared)
    return compare(Table.from_rows(rows), Table.from_rows(known_curves(rows)))[0]


def test_a_row_for_each_architecture_in_order() -> None:
    found = compared()
    table = overall_table(found)
    assert [row[0] for row in table.rows] == list(found.order.architectures)
    assert {len(row) for row in table.rows} == {len(table.header)}
    of = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert of["pca"]["compute, k = 16"] == "not reached"
    assert of["pca"]["dead"] == "30.0\u00a0%"
    assert of["gated"]["L0"] == "−3.0\u00a0%"
    assert of["topk"]["compute, k = 8"] == "1"
    assert of["gated"]["compute, k = 32"].startswith(("1.6", "1.7", "1.8", "1.9", "2."))
    best = found.order.architectures[0]
    assert of["pca"][f"% above {best}"].startswith(("+99.", "+100."))
    assert list(overall_table(found, one_k=True).header).count("compute, k = 16") == 1
    assert "compute, k = 8" not in overall_table(found, one_k=True).header


def test_every_table_is_whole() -> None:
    tables = comparison_tables(compared())
    assert [table.title for table in tables] == [
        "Architectures at equal N and L0",
        "nmse at each N and L0",
        *(f"Compute for equal nmse at k = {k}" for k in (8, 16, 32)),
        "One training for all k",
    ]
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_depth_leaves_out_columns_in_which_nothing_stands() -> None:
    value = Interval(-0.2, -0.3, None)
    found = [AtDepth(q, "", "", layer, 8.0, "n_k", value) for layer in (2.0, 11.0) for q in ("exponent", "floor")]  # type: ignore[arg-type]
    table = depth_table(found)
    assert table is not None
    assert table.header == ["layer", "k", "exponent of n", "95 % interval", "floor", "95 % interval"]
    assert table.rows[1] == ["11", "8", "−0.200", "−0.300 to open", "−0.2000", "−0.3000 to open"]
    assert depth_table([]) is None


def test_the_heading_names_the_source_where_there_are_several() -> None:
    assert heading(compared()) == "Architectures side by side"
    rows = [
        row
        for site in ("resid_post.2", "resid_post.11")
        for row in known_arms({"topk": Known(), "relu": Known()}, site=site)
    ]
    assert [heading(found) for found in compare(Table.from_rows(rows))] == [
        "Architectures side by side: resid_post.2",
        "Architectures side by side: resid_post.11",
    ]
