"""The benchmark of few bits: what it reports of a model that was trained."""

from __future__ import annotations

from benchmarks.quant.__main__ import DEMO, table
from benchmarks.quant.error import FORMS, measure


def test_errors_of_every_form() -> None:
    rows = measure(DEMO, number=1, length=12, num_greedy=3)
    assert [row["form"] for row in rows] == list(FORMS)
    by_form = {row["form"]: row for row in rows}
    assert 0 <= by_form["int8"]["kl_mean"] < by_form["int4"]["kl_mean"] < 0.5
    assert all(0 <= row["top1_agreement"] <= 1 and 0 <= row["greedy_shared"] <= 1 for row in rows)
    assert table(rows).splitlines()[0].split() == list(rows[0])
