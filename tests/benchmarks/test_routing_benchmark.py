"""The routing benchmark's conversations, and what its simulation makes of them."""

from __future__ import annotations

import csv
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aiexport_edge.shim.engines.routing import Policy
from benchmarks.routing import simulation
from benchmarks.routing.conversations import MAX_TURN, MIN_TURN, SYSTEM_TOKENS, Texts, Turn, read


@pytest.fixture
def turns(tmp_path: Path) -> list[Turn]:
    file = tmp_path / "trace.csv"
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        begin = datetime(2023, 11, 16, 18, 15, 46, 680590)
        for number in range(400):
            at = begin + timedelta(seconds=number / 4)
            writer.writerow([f"{at:%Y-%m-%d %H:%M:%S.%f}0", 300 + 97 * number % 2900, 20 + number % 60])
    return read(file, scale=1, max_prompt=3000, max_output=64, number=400)


def test_turns_follow_from_one_another(turns: list[Turn]) -> None:
    totals: dict[int, int] = {}
    systems: dict[int, int] = {}
    for turn in turns:
        before = totals.get(turn.conversation, SYSTEM_TOKENS)
        assert (turn.index == 0) == (turn.conversation not in totals)
        assert turn.prompt - before == turn.words
        if turn.index:
            assert MIN_TURN <= turn.words <= MAX_TURN
        assert systems.setdefault(turn.conversation, turn.system) == turn.system
        totals[turn.conversation] = turn.prompt + turn.output
    assert sum(turn.index > 0 for turn in turns) > 50


def test_texts_are_the_same_for_the_same_turn(turns: list[Turn]) -> None:
    assert Texts().user(turns[7]) == Texts().user(turns[7]) != Texts().user(turns[8])
    assert Texts().system(1) == Texts().system(1) != Texts().system(2)


def test_prefixes_raise_the_hit_rate(turns: list[Turn]) -> None:
    runs = {policy: simulation.run(turns, policy, num_engines=3, pages=1 << 20) for policy in Policy}
    best = simulation.run(turns, Policy.PREFIX, num_engines=1, pages=1 << 20)["hit_rate"]
    assert runs[Policy.ROUND_ROBIN]["hit_rate"] < 0.8 * runs[Policy.PREFIX]["hit_rate"]
    assert runs[Policy.PREFIX]["hit_rate"] <= best
    assert runs[Policy.PREFIX]["load_max_to_mean"] < 1.6
