"""Which cells are compared: of one source, and of several architectures."""

import numpy as np

from saescale.scaling.comparison.arms import find_arms
from saescale.scaling.tables import Table
from tests.scaling.known_arms import Known, known_arms

TWO = {"relu": Known(1.2), "topk": Known()}


def test_seeds_are_averaged_and_architectures_are_in_order() -> None:
    rows = known_arms(TWO, sizes=(512, 1024), ks=(8,), seeds=(0, 1, 2))
    (arms,) = find_arms(Table.from_rows(rows[::-1]))
    assert arms.architectures == ("topk", "relu")
    assert (arms.of, len(arms), arms.cells.tolist()) == ({}, 4, [3, 3, 3, 3])
    (group,) = arms.at("relu", 1024, 8)
    own = [row["nmse"] for row in rows if (row["architecture"], row["n_latents"]) == ("relu", 1024)]
    assert np.isclose(np.exp(arms.log_nmse[group]), np.prod(own) ** (1 / 3))


def test_each_source_is_compared_by_itself() -> None:
    rows = [row for site in ("resid_post.2", "resid_post.11") for row in known_arms(TWO, site=site)]
    alone = known_arms({"topk": Known()}, site="resid_post.3")
    found = find_arms(Table.from_rows(rows + alone))
    assert [arms.of for arms in found] == [{"site": "resid_post.2"}, {"site": "resid_post.11"}]
    assert all(set(arms.table["site"]) == {arms.of["site"]} for arms in found)


def test_without_a_second_architecture_there_is_nothing_to_compare() -> None:
    rows = known_arms({"topk": Known()})
    assert find_arms(Table.from_rows(rows)) == []
    assert find_arms(Table.from_rows([{"n_latents": 8, "nmse": 0.3}])) == []
    # A cell that does not say its architecture belongs to none.
    assert find_arms(Table.from_rows([*rows, rows[0] | {"architecture": None, "nmse": 0.9}])) == []


def test_without_l0_it_is_k() -> None:
    rows = [{name: value for name, value in row.items() if name != "l0"} for row in known_arms(TWO)]
    (arms,) = find_arms(Table.from_rows(rows))
    assert (arms.l0 == arms.k).all()
