"""`[plans]`, `[limits]` and `[store] retention`: defaults are the published plans; a wrong value says what is right."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from aiexport_edge.proto.config import ConfigError, load
from aiexport_edge.proto.config_limits import LimitsConfig
from aiexport_edge.proto.config_text import to_toml


def read(tmp_path: Path, text: str) -> object:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


def test_the_published_plans(tmp_path: Path) -> None:
    config = load(None, tmp_path)
    found = {
        name: (plan.requests_per_minute, plan.tokens_per_day, plan.batch_size) for name, plan in config.plans.items()
    }
    assert found == {
        "free": (60, 100_000, 100),
        "pro": (600, 10_000_000, 5_000),
        "enterprise": (None, None, 10_000),
    }
    assert config.limits == LimitsConfig("", None, timedelta(seconds=1))
    assert config.store.retention == timedelta(days=29)


def test_what_is_written_holds_and_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(
        '[plans.free]\nrequests_per_minute = "unlimited"\ntokens_per_day = 5\nbatch_size = 1\n'
        "[plans.enterprise]\nrequests_per_minute = 1000\n"
        '[limits]\nredis_url = "redis://cache:6379/0"\nredis_password_file = "secret"\n'
        'redis_timeout = "9s"\n[store]\nretention = "7d"\n'
    )
    config = load(file, tmp_path / "state")
    free, enterprise = config.plans["free"], config.plans["enterprise"]
    assert (free.requests_per_minute, free.tokens_per_day, free.batch_size) == (None, 5, 1)
    assert (enterprise.requests_per_minute, enterprise.tokens_per_day) == (1000, None)
    assert config.limits == LimitsConfig("redis://cache:6379/0", tmp_path / "secret", timedelta(seconds=9))
    assert config.store.retention == timedelta(days=7)
    shown = tmp_path / "shown.toml"
    shown.write_text(to_toml(config))
    again = load(shown, tmp_path / "state")
    assert (again.plans, again.limits) == (config.plans, replace(config.limits))
    assert again.store.retention == config.store.retention


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[plans.pro]\nrequests_per_minute = 0\n", 'whole number from 1 to 1000000, not 0; or "unlimited"'),
        ('[plans.pro]\ntokens_per_day = "10M"\n', 'or "unlimited"'),
        ("[plans.pro]\nbatch_size = 20000\n", "from 1 to 10000"),
        ("[plans.pro]\nbatch_size = true\n", "from 1 to 10000"),
        ("[plans.pro]\nrequests_per_minut = 5\n", 'did you mean "requests_per_minute"?'),
        ('[limits]\nredis_url = "cache:6379"\n', "must be an address such as"),
        ('[limits]\nredis_url = "redis://:secret@cache"\n', "must hold no password"),
        ('[limits]\nredis_password_file = "secret"\n', "limits.redis_url: is missing"),
        ('[store]\nretention = "0d"\n', "must be a duration"),
    ],
)
def test_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert problem in str(raised.value)
