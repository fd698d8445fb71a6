"""Rows that become other rows: the copies, in order."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vattn.transformers.row_moves import SPARE, row_moves


def moved(sources):
    rows = {place: place for place in range(len(sources))}
    for to, source in row_moves(sources):
        rows[to] = rows[source]
    rows.pop(SPARE, None)
    return [rows[place] for place in range(len(sources))]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_choice_of_rows_is_right(count):
    for sources in itertools.product(range(count), repeat=count):
        assert moved(sources) == list(sources)


def test_a_row_that_stays_is_not_copied():
    assert row_moves([0, 1, 2]) == []
    assert row_moves([0, 0, 2, 2]) == [(3, 2), (1, 0)]


def test_only_a_ring_needs_the_spare_place():
    assert SPARE not in itertools.chain(*row_moves([1, 2, 3, 3]))
    assert row_moves([1, 0, 3, 2]).count((SPARE, 0)) == 1
    assert len(row_moves([1, 0, 3, 2])) == 6
