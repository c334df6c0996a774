"""`compare` at two real shims, and at a small server that differs on purpose."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer

from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.cli.shapes import differences, sequence, shape_of

HAIKU = "apex-haiku-4-20250401"
THEIR_KEY = "axp_live_the_other_servers_key_0123456789"


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ShimServer, ShimServer]]:
    """Two installations, each with a state of its own, in front of one engine that counts."""
    directory = tmp_path_factory.mktemp("compare")
    engine = ScriptedEngine(f"unix:{directory / 'engine.sock'}")
    engine.start()
    made = tuple(ShimServer(directory / name, (engine.address,)) for name in ("here", "there"))
    for shim in made:
        shim.start()
        shim.wait_ready()
    yield made[0], made[1]
    for shim in made:
        shim.stop()
    engine.close()


class Compare:
    """Runs `compare` with the shim `here` as this installation."""

    def __init__(self, here: ShimServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.here = here
        self._folder = folder
        self._capsys = capsys

    def __call__(self, url: str, *lines: Any, key: str = THEIR_KEY, status: int, more: Any = ()) -> tuple[str, str]:
        file = self._folder / "requests.jsonl"
        file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        words = ["compare", "--url", self.here.base_url, "--own-key", self.here.key.key, "--against", url, "--key", key]
        self._capsys.readouterr()
        assert main([*words, "--state", str(self._folder / "state"), str(file), *more]) == status
        captured = self._capsys.readouterr()
        for secret in (key, self.here.key.key):
            assert secret not in captured.out + captured.err
        return captured.out, captured.err


@pytest.fixture
def compare(shims: tuple[ShimServer, ShimServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    return Compare(shims[0], tmp_path, capsys)


def body(text: str = "COUNT 3", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": 64, "messages": [{"role": "user", "content": text}], **fields}


# ---------------------------------------------------------------------------------------------------- two shims


def test_two_installations_of_one_version_do_not_differ(compare: Compare, shims: tuple[ShimServer, ShimServer]) -> None:
    lines = [
        body(),
        body(stream=True),
        body("COUNT 40", stream=True),
        {"path": "/v2/messages/stream", "body": body("COUNT 5")},
        {"path": "/v2/models"},
        {"path": "/v2/models/nope"},
        body(model="nope"),
        {"path": "/v2/messages", "body": {"model": HAIKU}},
        {"path": "/nowhere", "body": {}},
        "",
    ]
    there = shims[1]
    assert compare(there.base_url, *lines, key=there.key.key, status=0)[0] == "9 requests, no difference\n"
    document = json.loads(compare(there.base_url + "/v2", *lines, key=there.key.key, status=0, more=["--json"])[0])
    assert document == {"here": shims[0].base_url, "there": there.base_url, "requests": 9, "differences": []}


def test_limits_and_keys_show(compare: Compare, shims: tuple[ShimServer, ShimServer]) -> None:
    there = shims[1]
    there.store.create_workspace("small", "free")
    limited = there.store.create_key("small").key
    out, _ = compare(there.base_url, body(), key=limited, status=1)
    assert "line 1: header x-ratelimit-limit-requests: here absent; there present\n" in out
    out, _ = compare(there.base_url, body(), status=1)  # a key that it does not know
    assert "line 1: status: here 200; there 401\n" in out
    assert 'line 1: body.type: here "message"; there "error"\n' in out
    assert "line 1: body.error: here absent; there object\n" in out
    assert "body.error.type" not in out  # said with what is above it


def test_the_key_comes_from_the_environment(
    compare: Compare,
    shims: tuple[ShimServer, ShimServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = shims
    (tmp_path / "requests.jsonl").write_text(json.dumps(body()))
    (tmp_path / "edge.toml").write_text(f"[shim]\nport = {here.address()[1]}\n")
    places = ["--config", str(tmp_path / "edge.toml"), "--state", str(tmp_path / "state")]
    words = ["compare", *places, "--against", there.base_url, "--key", there.key.key, str(tmp_path / "requests.jsonl")]
    monkeypatch.setenv("AIEXPORT_KEY", here.key.key)
    assert main(words) == 0
    monkeypatch.delenv("AIEXPORT_KEY")
    assert main(words) == 1
    assert "set AIEXPORT_KEY or pass --own-key" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- another server


class Other(BaseHTTPRequestHandler):
    """Replies by the request's path, with what `replies` says: status, headers, body."""

    protocol_version = "HTTP/1.1"
    replies: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]] = {}

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, reply = self.replies[self.path]
        reply = reply.replace(b"KEY", self.headers["X-API-Key"].encode())
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def other(replies: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    handler = type("Handler", (Other,), {"replies": replies})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


JSON = {"Content-Type": "application/json", "request-id": "req_1", "x-request-id": "req_1"}
SSE = JSON | {"Content-Type": "text/event-stream; charset=utf-8"}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}, {"type": "thinking", "thinking": "KEY"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": "3", "output_tokens": 1},
    "\x1b[31mKEY": 1,
}
STREAM = (
    'event: ping\ndata: {"type":"ping"}\n\n'
    'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta"}}\n\n'
    'event: message_stop\ndata: {"type":"message_stop","more":[]}\n\n'
    "data: [DONE]\n\n"
)


def test_each_kind_of_difference_is_named(compare: Compare) -> None:
    replies = {
        "/v2/messages": (200, JSON | {"Retry-After": "1"}, json.dumps(MESSAGE).encode()),
        "/v2/messages/stream": (200, SSE, STREAM.encode()),
        "/v2/none": (200, {"Content-Type": "text/html"}, b"<html>KEY"),
    }
    lines = [body(), "", {"path": "/v2/messages/stream", "body": body()}, {"path": "/v2/none", "body": {}}]
    with other(replies) as url:
        out, _ = compare(url, *lines, status=1)
        document = json.loads(compare(url, *lines, status=1, more=["--json"])[0])
    told = set(out.splitlines())
    assert {
        "line 1: header retry-after: here absent; there present",
        "line 1: body.usage.input_tokens: here number; there string",
        "line 1: body.usage.cache_read_input_tokens: here number; there absent",
        "line 1: body.content[thinking]: here absent; there object",
        "line 1: body.�[31m[key]: here absent; there number",
        "line 3: event.content_block_delta.delta.text: here string; there absent",
        "line 3: event.message_start: here object; there absent",
        "line 3: event.message_stop.more: here absent; there array",
        "line 3: event.message: here absent; there text that is no JSON",
        "line 3: order of events: here message_start → content_block_start → content_block_delta → "
        "content_block_stop → message_delta → message_stop; there content_block_delta → message_stop → message",
        "line 4: status: here 404; there 200",
        "line 4: header content-type: here application/json; there text/html",
        "line 4: header request-id: here present; there absent",
    } <= told
    assert not any("thinking]." in line or "message_start." in line for line in told)
    assert out.endswith(f"3 requests, {len(told) - 1} differences\n")
    assert len(document["differences"]) == len(told) - 1
    assert set(document["differences"][0]) == {"line", "path", "here", "there"}


def test_replies_that_do_not_come_whole(compare: Compare) -> None:
    replies = {
        "/v2/messages": (200, JSON | {"Content-Length": "1000"}, b'{"id":'),
        "/v2/messages/stream": (200, SSE | {"Transfer-Encoding": "chunked", "Content-Length": "5"}, b"ffff\r\nshort"),
    }
    lines = [body(), {"path": "/v2/messages/stream", "body": body()}]
    with other(replies) as url:
        out, _ = compare(url, *lines, status=1)
    assert "line 1: reply: here came whole; there broke off in the middle of its reply\n" in out
    assert "line 2: reply: here came whole; there sent no valid HTTP (IncompleteRead)\n" in out


def test_a_server_that_takes_too_long(compare: Compare) -> None:
    """It accepts and says nothing: the listener's backlog alone."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        out, _ = compare(url, body(), status=1, more=["--timeout", "1s"])
    assert "there was not done in time\n" in out


# ---------------------------------------------------------------------------------------------------- what is not done


def test_servers_that_cannot_be_reached(compare: Compare) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    out, err = compare(f"http://127.0.0.1:{port}", body(), status=1)
    assert (out, err) == (
        "",
        f"aiexport-edge: http://127.0.0.1:{port} cannot be reached (Connection refused); "
        "start it, or correct the address\n",
    )


def test_bad_lines_are_named_and_nothing_is_sent(compare: Compare) -> None:
    unreachable = "http://127.0.0.1:1"
    lines = [body(), "{", "[1]", {"path": "v2"}, {"path": "/a b"}, {"path": "/v2", "header": 1}, "[" * 100_000]
    _, err = compare(unreachable, *lines, status=1)
    assert "line 2 is no JSON, line 3 is no JSON object, line 4 has a" in err
    assert 'line 6 has "header" beside "path" and "body", and 1 more; nothing was sent, correct the file' in err
    assert "holds no request" in compare(unreachable, "", status=1)[1]
    assert "is no API key" in compare(unreachable, body(), key="a\nb", status=1)[1]


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["x.jsonl", "--against", "nowhere", "--key", "k"], "must be a base URL"),
        (["x.jsonl", "--key", "k"], "required: --against"),
        (["x.jsonl", "--against", "http://a:b@host", "--key", "k"], "without a name and password"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["compare", *words])
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
    assert main(["compare", "/no/such.jsonl", "--against", "http://h", "--key", "k", "--own-key", "k"]) == 1
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


def test_ctrl_c_does_not_wait_for_a_server(tmp_path: Path) -> None:
    """Both have taken the request, and neither answers."""
    (tmp_path / "requests.jsonl").write_text('{"model":"a"}\n')
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also in a background job
        "from aiexport_edge.shim.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = ["compare", "--url", url, "--against", url, "--key", "k", "--own-key", "k", "--timeout", "1h"]
        with subprocess.Popen([sys.executable, "-c", code, *words, "requests.jsonl"], cwd=tmp_path) as process:
            taken = [silent.accept()[0] for _ in range(2)]
            assert all(connection.recv(1) for connection in taken)
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(60) == 130
            finally:
                process.kill()
                for connection in taken:
                    connection.close()


# ---------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ({"a": 1}, {"a": 2.5}, []),
        ({"a": True}, {"a": 1}, ["a"]),
        ({"a": []}, {"a": [{"b": 1}]}, []),
        ({"a": [1]}, {"a": ["x"]}, ["a[]"]),
        ({"a": [1, "x"]}, {"a": ["x", 2, 3]}, []),
        ({"a": {"b": {"c": 1}}}, {}, ["a"]),
        ({"a": {"b": 1}}, {"a": None}, ["a"]),
        ({"type": "x"}, {"type": "y"}, ["type"]),
        ({"a": [{"type": "x", "b": 1}]}, {"a": [{"type": "y", "b": 1}]}, ["a[x]", "a[y]"]),
        ({"ab": 1, "a": {"c": 1}}, {"a": {}, "ab": None}, ["a.c", "ab"]),
    ],
)
def test_shapes(here: Any, there: Any, expected: list[str]) -> None:
    found = [each.path.removeprefix("r.") for each in differences(shape_of(here, "r"), shape_of(there, "r"))]
    assert found == expected
    assert [each.path for each in differences(shape_of(here, "r"), shape_of(here, "r"))] == []


def test_deep_values_bring_nothing_down() -> None:
    value: Any = 1
    for _ in range(900):
        value = [value]
    assert len(shape_of(value, "r")) == 901


def test_order_of_events() -> None:
    assert sequence(["a", "ping", "b", "ping", "b", "c"]) == ("a", "b", "c")
    assert re.fullmatch(r"�x{119}…", sequence(["\x1b" + "x" * 500])[0])
