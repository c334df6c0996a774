"""The configuration file: defaults, strictness, and sentences that say what to do."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.proto import config_text
from aiexport_edge.proto.config import Config, ConfigError, check_sources, load, source_directory
from aiexport_edge.proto.config_table import line_of
from aiexport_edge.proto.units import (
    format_duration,
    format_size,
    is_loopback,
    join_address,
    parse_duration,
    parse_size,
    split_address,
)

MODEL = """
[[models]]
ids = ["apex-haiku-4-20250401", "apex-haiku-4"]
family = "haiku"
source = "weights/small"
"""


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


def sentence(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    where, _, said = str(error.value).partition(": ")
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/aiexport-edge\.toml(:\d+)?", where)
    return said


def test_the_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aiexport-edge\.toml:3: shim\.prot: unknown key"):
        read(tmp_path, "# mine\n[shim]\nprot = 1\n")


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("top", 1),
        ("shim.port", 4),
        ("shim.nothing", 2),  # where it is missing
        ("models.0.ids", 6),
        ("models.1", 12),
        ("models.1.source", 12),
        ("models.1.vllm.python", 15),
        ("models.1.rope_scaling.factor", 13),
        ("plans.pro.weight", 17),
        ("engine.listen", None),
    ],
)
def test_lines_of_keys(key: str, line: int | None) -> None:
    text = '''\
top = 1
[shim]
cors_origins = [ "https://a" ]
"port" = 2
[[models]]
ids = [
  "source = 1",
]
display_name = """
[shim]
port = 3"""
[[ models ]]
rope_scaling = { rope_type = "yarn", factor = 4.0 }
[models.vllm]
python = "p"
[plans]
pro.weight = 3
'''
    assert line_of(text, key) == line


def test_a_file_of_another_editor(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_bytes(b"\xef\xbb\xbf[shim]\r\nport = 9000\r\n")
    assert load(tmp_path / "edge.toml", tmp_path).shim.port == 9000


def test_a_relative_store_lies_beside_the_file(tmp_path: Path) -> None:
    """As every path of the file: not where a command happens to be run."""
    config = read(tmp_path, '[store]\nurl = "sqlite:///data/edge.db"\n')
    assert config.store.url == f"sqlite:///{tmp_path}/data/edge.db"
    assert read(tmp_path, config_text.to_toml(config)).store.url == config.store.url
    assert read(tmp_path, '[store]\nurl = "sqlite:////srv/edge.db"\n').store.url == "sqlite:////srv/edge.db"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    monkeypatch.chdir(tmp_path)
    assert load(None, tmp_path / "state").state == tmp_path / "state"
    with pytest.raises(ConfigError, match="name a directory with --state"):
        load()


def test_without_a_file_the_demo_serves_every_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, tmp_path / "state")
    assert config.path is None
    assert config.state == tmp_path / "state"
    assert [(m.id, m.family, m.input_per_million, m.output_per_million) for m in config.models] == [
        ("apex-opus-3-20250401", "opus", 15.0, 75.0),
        ("apex-sonnet-4-20250501", "sonnet", 3.0, 15.0),
        ("apex-haiku-4-20250401", "haiku", 0.25, 1.25),
    ]
    assert [weights.name for weights in config.weights] == ["demo"]
    assert config.weights[0].deterministic
    assert {model.weights for model in config.models} == {"demo"}
    assert config.admin_listen == "127.0.0.1:8401"
    assert config.engine_addresses == ("127.0.0.1:50051",)
    assert config.plans["free"].families == ("haiku",)


def test_the_file_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aiexport-edge.toml").write_text("[shim]\nport = 9000\n")
    monkeypatch.chdir(tmp_path)
    config = load()
    assert config.path == tmp_path / "aiexport-edge.toml"
    assert config.shim.port == 9000
    assert config.admin_listen == "127.0.0.1:9001"


def test_sources_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read(tmp_path, MODEL)
    assert config.models[0].source == str(tmp_path / "weights" / "small")
    assert config.models[0].display_name == "apex-haiku-4-20250401"
    assert not config.models[0].deterministic


def test_the_same_source_and_settings_are_loaded_once(tmp_path: Path) -> None:
    entry = '[[models]]\nids = ["{}"]\nfamily = "opus"\nsource = "w/small"\n{}\n'
    text = "".join(
        [
            entry.format("a", ""),
            entry.format("b", "input_per_million = 2"),
            entry.format("c", 'dtype = "float32"'),
            '[[models]]\nids = ["d"]\nfamily = "opus"\nsource = "other/small"\n',
        ]
    )
    config = read(tmp_path, text)
    assert [weights.name for weights in config.weights] == ["small", "small-2", "small-3"]
    assert [model.weights for model in config.models] == ["small", "small", "small-2", "small-3"]


def test_deterministic_follows_the_engine_then_the_source(tmp_path: Path) -> None:
    demo = '[[models]]\nids = ["demo"]\nfamily = "opus"\nsource = "demo"\n'
    assert [m.deterministic for m in read(tmp_path, demo + MODEL).models] == [True, False]
    assert [m.deterministic for m in read(tmp_path, "[engine]\ndeterministic = false\n" + demo).models] == [False]
    assert [m.deterministic for m in read(tmp_path, "[engine]\ndeterministic = true\n" + MODEL).models] == [True]
    assert [m.deterministic for m in read(tmp_path, MODEL + "deterministic = true\n").models] == [True]


def test_rounded_weights_are_weights_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + MODEL.replace("apex-haiku", "apex-opus") + 'quantize = "int8"\n')
    assert [weights.quantize for weights in config.weights] == ["none", "int8"]
    assert [model.quantize for model in config.models] == ["none", "int8"]
    with pytest.raises(ConfigError, match="quantize"):
        read(tmp_path, MODEL + 'quantize = "int7"\n')


def test_the_form_of_keys_and_values(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + MODEL.replace("apex-haiku", "apex-opus") + 'kv_cache_dtype = "fp8"\n')
    assert [weights.kv_cache_dtype for weights in config.weights] == ["auto", "fp8"]
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        read(tmp_path, MODEL + 'kv_cache_dtype = "int8"\n')
    with pytest.raises(ConfigError, match="kv_cache_dtype: is of the native backend"):
        read(tmp_path, MODEL + 'backend = "vllm"\nkv_cache_dtype = "fp8"\n')


def test_json_mode_is_for_sonnet_and_opus_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    entry = '[[models]]\nids = ["{0}"]\nfamily = "{0}"\nsource = "demo"\n'
    entries = "".join(map(entry.format, ("opus", "sonnet", "haiku")))
    assert [model.json_mode for model in read(tmp_path, entries).models] == [True, True, False]
    assert [model.json_mode for model in read(tmp_path, entries + "json_mode = true\n").models] == [True, True, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[shim]\nprot = 1\n", 'shim.prot: unknown key; did you mean "port"?'),
        ("[shimm]\nport = 1\n", 'shimm: unknown key; did you mean "shim"?'),
        ("[plans.fre]\nweight = 1\n", 'plans.fre: unknown key; did you mean "free"?'),
        ("[store]\nzzz = 1\n", "store.zzz: unknown key; known here: url"),
        ('[store]\nurl = "mysql://h/d"\n', "store.url: must be sqlite:///FILE or postgresql://user@host/database, no"),
        ('[store]\nurl = "/srv/edge.db"\n', "store.url: must be sqlite:///FILE or postgresql://user@host/database"),
        ('[store]\nurl = "sqlite:///:memory:"\n', "store.url: must be sqlite:///FILE"),
        ('[store]\nurl = "postgresql://u:secret@h/d"\n', "store.url: must hold no password; put it into libpq's"),
        ('[tls]\ncert = "~nobody-here/c"\n', "tls.cert: names a home directory that is not there"),
        ('[tls]\ncert = "a\\u0000b"\n', "tls.cert: holds a character that no path can have"),
        (MODEL + "input_per_millon = 1\n", 'models.0.input_per_millon: unknown key; did you mean "input_per_million"?'),
        ("shim = 3\n", "shim: must be a table, [in.brackets]"),
        ("[shim]\nport = true\n", "shim.port: must be a whole number from 1 to 65535, not True"),
        ("[shim]\nport = 65536\n", "shim.port: must be a whole number from 1 to 65535, not 65536"),
        ('[shim]\nport = "8400"\n', "shim.port: must be a whole number from 1 to 65535, not '8400'"),
        ("[shim]\nport = 65535\n", "shim.port: leaves no port + 1 for the admin listener; set admin.listen"),
        ('[shim]\nhost = "no host"\n', 'shim.host: must be an address or a host name such as "127.0.0.1"'),
        ('[shim]\nmax_body_bytes = "1 GiB"\n', "shim.inflight_body_bytes: must be at least max_body_bytes"),
        ('[shim]\nmax_body_bytes = "big"\n', 'shim.max_body_bytes: must be a size such as "2GiB"'),
        ('[shim]\ndrain = "soon"\n', "shim.drain: must be a duration such as 90d, 24h, 30m or 45s, not 'soon'"),
        ("[shim]\nengines = []\n", 'shim.engines: must be a list of addresses such as ["127.0.0.1:50051"]'),
        ('[engine]\nlisten = "50051"\n', "engine.listen: must be \"HOST:PORT\" or \"unix:PATH\", not '50051'"),
        ('[engine]\ndevice = "gpu"\n', 'engine.device: must be "auto", "cpu" or "cuda:0" (or another number)'),
        ('[engine]\ntls_cert = "x.pem"\n', "engine.tls_key: is missing; tls_cert and tls_key go together"),
        ("[engine]\nmemory_share = 1.5\n", "engine.memory_share: must be a share from 0.001 to 1, not 1.5"),
        ('[engine]\nstep_timeout = "0s"\n', "engine.step_timeout: must be a duration"),
        (
            "[engine]\nmax_step_tokens = 3\n",
            'engine.max_step_tokens: must be "auto" or a whole number from 16 to 1048576, not 3',
        ),
        ("[engine]\ntenant_queue_share = 0\n", "engine.tenant_queue_share: must be a share from 0.001 to 1, not 0"),
        ('[admin]\nlisten = "0.0.0.0:8401"\n', "admin.listen: 0.0.0.0 can be reached from other machines"),
        ('[plans.free]\nfamilies = ["haikku"]\n', 'plans.free.families: must be one of opus, sonnet, haiku'),
        ('[telemetry]\nlog_level = "warn"\n', "telemetry.log_level: must be one of debug, info, warning, error"),
        ('[[models]]\nfamily = "opus"\nsource = "demo"\n', "models.0.ids: is missing; list what clients call it"),
        ('[[models]]\nids = ["a"]\nsource = "demo"\n', "models.0.family: is missing; say opus, sonnet or haiku"),
        ('[[models]]\nids = ["a"]\nfamily = "opus"\n', "models.0.source: is missing; name a Hugging Face model"),
        ('[[models]]\nids = ["a b"]\n', "models.0.ids: 'a b' is no model id"),
        ('[[models]]\nids = ["ft-x-y"]\n', 'models.0.ids: "ft-x-y" starts with "ft-"'),
        ('[[models]]\nids = ["a", "a"]\n', 'models.0.ids: "a" is there twice'),
        (MODEL + MODEL, 'models.1.ids: "apex-haiku-4-20250401" is already an id of models.0; ids are unique'),
        (MODEL.replace("haiku\"\nsource", "haikus\"\nsource"), 'models.0.family: must be one of opus, sonnet, haiku'),
        (MODEL + "input_per_million = -1\n", "models.0.input_per_million: must be a price in US dollars"),
        (MODEL + "output_per_million = nan\n", "models.0.output_per_million: must be a price in US dollars"),
        (MODEL + "context_window = 8\nmax_output_tokens = 9\n", "models.0.max_output_tokens: must be at most the"),
        (MODEL + 'created_at = "yesterday"\n', "models.0.created_at: must be a time such as 2025-04-01T00:00:00Z"),
        ("models = []\n", "models: must be one or more tables, each under [[models]]"),
        ("[shim\n", "is not valid TOML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_remedy(tmp_path: Path, text: str, expected: str) -> None:
    assert sentence(tmp_path, text).startswith(expected)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; name another with --config"):
        load(tmp_path / "nothing.toml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "aiexport-edge.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="make it a readable UTF-8 file"):
        load(tmp_path / "aiexport-edge.toml")


def test_sources_are_looked_for(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL)
    with pytest.raises(ConfigError, match=r"models\.0\.source: there is no directory .*weights/small; download"):
        check_sources(config)
    (tmp_path / "weights" / "small").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no config\.json; it must be a Hugging Face model directory"):
        check_sources(config)
    (tmp_path / "weights" / "small" / "config.json").write_text("{}")
    check_sources(config)


def test_the_demo_model_is_there() -> None:
    assert (source_directory("demo") / "config.json").is_file()


def test_times_are_in_utc(tmp_path: Path) -> None:
    noon = datetime(2025, 4, 1, 12, tzinfo=UTC)
    for text in ("2025-04-01T14:00:00+02:00", '"2025-04-01T12:00:00Z"', "2025-04-01T12:00:00"):
        assert read(tmp_path, f"{MODEL}created_at = {text}\n").models[0].created_at == noon


def without_path(config: Config) -> dict[str, object]:
    """What the dump is to keep: everything but the file's own place, and addresses as they resolve."""
    names = ("state", "engine", "models", "weights", "plans", "store", "telemetry", "admin_listen", "engine_addresses")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    "text",
    [
        "",
        MODEL + 'display_name = "a\\u007f\\"\\\\ \\n é 🙂"\ncreated_at = 2025-04-01T14:00:00+02:00\n',
        '[engine]\npool_bytes = "2GiB"\nnum_threads = 2\ntls_cert = "c.pem"\ntls_key = "k.pem"\ndeterministic = true\n'
        '[shim]\nengines = ["10.0.0.1:50051", "unix:/run/e.sock"]\ndrain = "90s"\nmax_body_bytes = 1000\n'
        '[plans.free]\nfamilies = ["haiku", "opus"]\nweight = 2.5\n[admin]\nlisten = "[::1]:9000"\n'
        '[store]\nurl = "postgresql+psycopg://u@h/db"\n',
    ],
)  # fmt: skip
def test_the_effective_settings_read_back_the_same(tmp_path: Path, text: str) -> None:
    config = read(tmp_path, text)
    again = read(tmp_path, config_text.to_toml(config))
    assert without_path(again) == without_path(config)
    assert config_text.to_toml(again) == config_text.to_toml(config)


def test_what_the_engine_chooses_is_shown_as_auto(tmp_path: Path) -> None:
    shown = config_text.to_toml(read(tmp_path, ""))
    assert 'max_step_tokens = "auto"' in shown
    assert 'step_timeout = "5m"' in shown
    assert "memory_share = 0.9" in shown
    text = '[engine]\nmax_step_tokens = 64\nstep_timeout = "90s"\nmemory_share = 0.5\n'
    engine = read(tmp_path, config_text.to_toml(read(tmp_path, text))).engine
    assert (engine.max_step_tokens, engine.step_timeout.total_seconds(), engine.memory_share) == (64, 90, 0.5)


# ---------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("30m", 1800), ("24h", 86400), ("90d", 90 * 86400)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "0s", "1", "s", "1.5h", "-1d", "1w", "1 h", "٣s", "999999999d", 5, None, True])
def test_durations_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be "):
        parse_duration(text)


@given(st.integers(1, 100 * 365 * 86400))
def test_durations_read_back(seconds: int) -> None:
    assert parse_duration(format_duration(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5kb", 1500), ("7", 7), ("7B", 7), (9, 9), ("0.5GiB", 1 << 29)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GiB", "-1", "1XB", "1..5GB", 0, -5, True, 1.5, None, [], "1e9"])
def test_sizes_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_sizes_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("address", ["127.0.0.1:8401", "localhost:1", "[::1]:65535", "example.org:80"])
def test_addresses_read_back(address: str) -> None:
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize("address", ["", "8401", ":8401", "host:", "host:0", "host:65536", "::1:80", "host:٣"])
def test_addresses_refused(address: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        split_address(address)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
