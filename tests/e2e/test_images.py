"""Pictures the whole way, over real processes: from a REST body to the tokens that transformers gives for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import io
import json
import os
import pickle
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from support.edge import SONNET, Edge, start, stream, wait_until
from support.picture_client import answers
from support.seeing import image_block, plain, png, save_model
from support.tiny_models import shared_data

from aiexport_edge.engine.images.decode import decode
from aiexport_edge.engine.images.limits import ImageError, ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.text.tokenizer import Tokenizer

SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg"}
MOST_WORKER_BYTES = 400 << 20  # of a worker, for the corpus' largest picture; what bombs would take is more
_CONFIG = f"""
[[models]]
ids = ["{SONNET}"]
family = "sonnet"
source = "seeing"
deterministic = true
[images]
allow = ["127.0.0.1"]
[shim]
workers = 1
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("images") / "seeing")


@pytest.fixture(scope="module")
def edge(model: Path) -> Iterator[Edge]:
    config = model.parent / "aiexport-edge.toml"
    config.write_text(_CONFIG)
    running = start(model.parent / "state", config)
    yield running
    assert running.stop() == 0, "".join(running.stderr[-30:])


def body(*content: Any, **fields: Any) -> dict[str, Any]:
    """One user turn; a str is a text block, bytes are a PNG."""
    blocks = [_block(part) for part in content]
    turns = [{"role": "user", "content": blocks}]
    return {"model": SONNET, "max_tokens": 24, "temperature": 0, "messages": turns, **fields}


def _block(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return image_block(part) if isinstance(part, bytes) else part


def photo(seed: int, size: tuple[int, int]) -> bytes:
    """A picture unlike all others."""
    return png(Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])))


def text_of(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"])


# ---------------------------------------------------------------------------------------------------- what it says


class Reference:
    """What transformers' model replies greedily."""

    def __init__(self, directory: Path) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        loader: Any = Qwen3VLForConditionalGeneration
        self._model = loader.from_pretrained(directory).eval()
        self._tokenizer = Tokenizer.load(directory)
        self._patches = load_patch_config(directory)

    def reply(self, turns: Sequence[dict[str, Any]], num_tokens: int) -> tuple[str, int]:
        """Its text, and the tokens of the prompt."""
        import numpy as np
        import torch

        from aiexport_edge.engine.images.patches import patches
        from aiexport_edge.engine.images.resize import resize

        control = self._tokenizer.control_tokens
        pixels, grids, ids = [], [], []
        for turn in turns:
            ids += [control["<|im_start|>"], *self._tokenizer.encode(turn["role"] + "\n")]
            text = ""
            for block in turn["content"]:
                if block["type"] == "text":
                    text += block["text"]
                    continue
                ids += self._tokenizer.encode(text)
                text = ""
                data = base64.b64decode(block["source"]["data"])
                image = resize(decode(data, block["source"]["media_type"], ImageLimits()), self._patches)
                made, grid = patches(np.asarray(image), self._patches)
                pixels.append(torch.from_numpy(made))
                grids.append((1, *grid))
                num_image_tokens = grid[0] * grid[1] // 4
                ids += [control["<|vision_start|>"], *[control["<|image_pad|>"]] * num_image_tokens]
                ids += [control["<|vision_end|>"]]
            ids += [*self._tokenizer.encode(text), control["<|im_end|>"], *self._tokenizer.encode("\n")]
        ids += [control["<|im_start|>"], *self._tokenizer.encode("assistant\n")]
        given = torch.tensor([ids])
        with torch.inference_mode():
            made_ids = self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                pixel_values=torch.cat(pixels),
                image_grid_thw=torch.tensor(grids),
                mm_token_type_ids=(given == control["<|image_pad|>"]).int(),
                max_new_tokens=num_tokens,
                do_sample=False,
            )[0, len(ids) :].tolist()
        written = b"".join(map(self._tokenizer.decode_bytes, made_ids))
        return written.decode("utf-8", "replace"), len(ids)


def test_replies_are_those_of_transformers(edge: Edge, model: Path) -> None:
    """One picture, three of different sizes, one in an earlier turn; `input_tokens` counts all of it."""
    reference = Reference(model)
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": [_block("What is this? "), _block(photo(1, (40, 24)))]}],
        [
            {
                "role": "user",
                "content": [
                    *map(_block, (photo(2, (20, 90)), photo(3, (64, 64)), "two, and", photo(4, (7, 9)), "three?")),
                ],
            }
        ],
        [
            {"role": "user", "content": [_block(photo(5, (33, 51))), _block("a")]},
            {"role": "assistant", "content": [_block("Blue.")]},
            {"role": "user", "content": [_block("And now?")]},
        ],
    ]
    with edge.client() as client:
        for turns in conversations:
            expected, num_tokens = reference.reply(turns, 24)
            for _ in range(2):  # the second time from the prefix cache
                response = client.post("/v2/messages", json=body() | {"messages": turns})
                assert response.status_code == 200, response.text
                message = response.json()
                assert text_of(message) == expected
                usage = message["usage"]
                assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_tokens
            assert usage["cache_read_input_tokens"] > 0


def test_another_picture_of_the_same_size_is_not_taken_for_it(edge: Edge) -> None:
    first, second = photo(11, (64, 64)), photo(12, (64, 64))
    with edge.client() as client:
        replies = [client.post("/v2/messages", json=body(data, "?")).json() for data in (first, second, first)]
    assert text_of(replies[0]) == text_of(replies[2])
    assert replies[1]["usage"]["cache_read_input_tokens"] == 0
    assert replies[2]["usage"]["cache_read_input_tokens"] > 0


def test_models_say_that_they_see(edge: Edge) -> None:
    with edge.client() as client:
        assert client.get(f"/v2/models/{SONNET}").json()["vision"] is True


def test_a_reply_goes_on_when_the_engine_is_killed(edge: Edge) -> None:
    """The picture is uploaded again, and nothing is lost or repeated."""
    asked = body(photo(21, (64, 64)), "Tell me more.", max_tokens=400, seed=5, temperature=1)

    async def whole(*, kill_after: int = 0) -> str:
        async with edge.async_client() as client:
            seen = 0
            text = ""
            async with client.stream("POST", "/v2/messages/stream", json=asked) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    event = json.loads(line[5:])
                    assert event["type"] != "error", event
                    if event["type"] == "content_block_delta":
                        text += event["delta"]["text"]
                        seen += 1
                        if seen == kill_after:
                            engine_process(edge).kill()
            return text

    undisturbed = asyncio.run(whole())
    assert asyncio.run(whole(kill_after=3)) == undisturbed
    asked = body("?", max_tokens=1)  # all of the reply may have been on its way already
    with edge.client() as client:
        wait_until(lambda: client.post("/v2/messages", json=asked).status_code == 200, "the model serves again", 180)


def engine_process(edge: Edge) -> psutil.Process:
    for process in psutil.Process(edge.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "aiexport_edge.engine" in process.cmdline():
                return process
    raise AssertionError("no engine process")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_is_wrong_with_an_image_names_its_block(edge: Edge) -> None:
    good = photo(31, (16, 16))
    cases = [
        (image_block(good, "image/jpeg"), "is image/png, not image/jpeg as declared"),
        (image_block(good[:70]), "broken"),
        (image_block(b"GIF89a"), "not a PNG"),
        (image_block(plain("red", (401, 2))), "at most 200 times"),
        (image_block(bomb(30_000, 30_000)), "30000 x 30000 pixels; at most 64000000"),
        (image_block(bomb(30_000, 2)), "16384 on a side"),
        ({"type": "video", "source": {"type": "url", "url": "https://x/y.mp4"}}, "video can't be read"),
        (
            {"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/a.png"}},
            "does not allow",
        ),
    ]
    with edge.client() as client:
        for block, said in cases:
            response = client.post("/v2/messages", json=body(good, "and", block))
            error = response.json()["error"]
            assert response.status_code == 400, error
            assert error["param"].startswith("messages.0.content.2"), error
            assert said in error["message"]
        response = client.post("/v2/messages", json=body(*[good] * 20, "x" * 8000))
        assert response.status_code == 400
        assert "context window" in response.json()["error"]["message"]


def test_a_model_without_eyes_refuses_images(edge: Edge, tmp_path: Path) -> None:
    """Its own error, and not before the model is known to be blind."""
    from support.tiny_tokenizers import save_tokenizer

    del edge
    from support.scripted_engine import ScriptedEngine
    from support.shim_server import ShimServer

    save_tokenizer("qwen3", tmp_path / "unused")
    engine = ScriptedEngine(f"unix:{tmp_path / 'engine.sock'}")
    engine.start()
    shim = ShimServer(tmp_path / "state", (engine.address,))
    try:
        shim.start()
        shim.wait_ready()
        with shim.client() as client:
            response = client.post("/v2/messages", json=body("What?", plain("red")))
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == "messages.0.content.1"
            assert "can't see images" in response.json()["error"]["message"]
    finally:
        shim.stop()
        engine.close()


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all zero: a few KiB that stand for `width * height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------- the corpus


def corpus() -> list[tuple[str, bytes]]:
    """Media type and bytes of every image file of the shared data."""
    files = [file for file in sorted((shared_data() / "images").rglob("*")) if file.suffix in SUFFIXES]
    return [(SUFFIXES[file.suffix], file.read_bytes()) for file in files]


def corruptions(files: Sequence[tuple[str, bytes]], count: int) -> Iterator[tuple[str, bytes]]:
    """Cut short, with bytes changed, with a piece repeated, with another's middle."""
    choose = random.Random(41)
    for _ in range(count):
        media_type, whole = choose.choice(files)
        data = bytearray(whole)
        match choose.randrange(4):
            case 0:
                del data[choose.randrange(1, len(data)) :]
            case 1:
                for _ in range(choose.randint(1, 20)):
                    data[choose.randrange(len(data))] = choose.randrange(256)
            case 2:
                start = choose.randrange(len(data))
                data[start:start] = data[start : start + choose.randint(1, 500)]
            case _:
                other = choose.choice(files)[1]
                start = choose.randrange(min(len(data), len(other)))
                data[start:] = other[start:]
        yield media_type, bytes(data)


class MemoryWatch:
    """The most that each process of an installation has held, in bytes, while it runs."""

    def __init__(self, edge: Edge) -> None:
        self._root = psutil.Process(edge.process.pid)
        self.first: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._look(self.first)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self._look(self.most)

    def _look(self, into: dict[str, int]) -> None:
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                name = next((part for part in process.cmdline() if part.startswith("aiexport_edge.")), "?")
                into[name] = max(into.get(name, 0), process.memory_info().rss)


async def _statuses(edge: Edge, pictures: Sequence[tuple[str, bytes]]) -> list[tuple[int, str]]:
    async with edge.async_client() as client:
        return await answers(client, SONNET, pictures)


def _fault(data: bytes, media_type: str, patches: PatchConfig) -> str | None:
    """What is wrong with a file."""
    try:
        image = decode(data, media_type, ImageLimits())
        patches.grid(image.height, image.width)
    except ImageError as error:
        return str(error)
    return None


def check_corpus(edge: Edge, files: Sequence[tuple[str, bytes]], num_corruptions: int) -> dict[str, Any]:
    """Sends all; every answer is a 200 or a 400, as the file is a picture or not, and memory stays bounded."""
    pictures = [*files, *corruptions(files, num_corruptions)]
    assert edge.config is not None
    patches = load_patch_config(edge.config.parent / "seeing")
    with MemoryWatch(edge) as watch:
        answers = asyncio.run(_statuses(edge, pictures))
    wrong = [answer for answer in answers if answer[0] not in (200, 400)]
    assert not wrong, wrong[:3]
    for (media_type, data), (status, said) in zip(pictures, answers, strict=True):
        fault = _fault(data, media_type, patches)
        assert status == (200 if fault is None else 400), said
        if fault is not None:
            assert fault in json.loads(said)["error"]["message"]
            assert json.loads(said)["error"]["param"].startswith("messages.0.content.1")
    workers = watch.most.get("aiexport_edge.engine.images.worker", 0)
    assert 0 < workers < MOST_WORKER_BYTES
    grown = {name: watch.most[name] - watch.first[name] for name in watch.first if name in watch.most}
    assert max(grown.values()) < 200 << 20, grown
    counts = {status: sum(answer[0] == status for answer in answers) for status in (200, 400)}
    return {"answers": counts, "grown MiB": {n: g >> 20 for n, g in grown.items()}, "worker MiB": workers >> 20}


def test_every_file_is_a_200_or_a_400(edge: Edge) -> None:
    files = corpus()
    small = files[:: max(1, len(files) // 40)]
    check_corpus(edge, small, 60)


@pytest.mark.prove
def test_every_file_and_500_corruptions(edge: Edge) -> None:
    print(check_corpus(edge, corpus(), 500))


@pytest.mark.prove
@pytest.mark.parametrize("drafts", [True, False], ids=["drafts", "no drafts"])
def test_replies_of_others_go_on_meanwhile(model: Path, tmp_path: Path, *, drafts: bool) -> None:
    """The gaps between tokens of four streams, alone and while the corpus and large pictures are taken in. Reported,
    for a machine that does nothing else."""
    files = corpus()
    large = [("image/png", photo(seed, (2000, 1500))) for seed in range(6)]
    pictures = tmp_path / "pictures"
    pictures.write_bytes(pickle.dumps([*files, *large, *corruptions(files, 500 - len(large))]))
    (tmp_path / "seeing").symlink_to(model)
    config = tmp_path / "aiexport-edge.toml"
    config.write_text(_CONFIG + f"[engine]\ndrafts = {str(drafts).lower()}\n")
    edge = start(tmp_path / "state", config)
    try:
        found = asyncio.run(_gaps(edge, pictures))
    finally:
        edge.stop()
    report = {name: _summary(gaps) for name, gaps in found.items()}
    alone = (report["alone"]["p99 ms"] + report["alone again"]["p99 ms"]) / 2
    print(
        json.dumps({"drafts": drafts} | report | {"ratio": round(report["with images"]["p99 ms"] / alone, 2)}, indent=1)
    )


def _summary(gaps: list[float]) -> dict[str, float]:
    gaps = sorted(gaps)
    return {
        "p50 ms": round(gaps[len(gaps) // 2] * 1e3, 2),
        "p99 ms": round(gaps[len(gaps) * 99 // 100] * 1e3, 2),
        "worst ms": round(gaps[-1] * 1e3, 1),
        "gaps": len(gaps),
    }


async def _gaps(edge: Edge, pictures: Path) -> dict[str, list[float]]:
    """Of four streams, by what went on beside them. The pictures come from a process of their own."""
    stop = asyncio.Event()
    found: dict[str, list[float]] = {}
    command = [sys.executable, "-m", "support.picture_client", edge.base_url, edge.key, SONNET, str(pictures)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    sender = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20
    )
    go, said = sender.stdin, sender.stdout
    assert go is not None
    assert said is not None
    assert await said.readline() == b"ready\n"

    async def send() -> None:
        go.write(b"\n")
        assert set(json.loads(await said.readline())) == {200, 400}

    async with edge.async_client() as client:

        async def talk(name: str, seed: int) -> None:
            while not stop.is_set():
                asked = body("Tell me a story.", max_tokens=600, temperature=1, seed=seed)
                last: float | None = None
                async with client.stream("POST", "/v2/messages/stream", json=asked) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("event: content_block_delta"):
                            now = time.perf_counter()
                            if last is not None:
                                found[name].append(now - last)
                            last = now
                            if stop.is_set():
                                return

        async def measured(name: str, work: Callable[[], Any]) -> None:
            found[name] = []
            stop.clear()
            talks = [asyncio.create_task(talk(name, seed)) for seed in range(4)]
            await work()
            stop.set()
            await asyncio.gather(*talks)

        await measured("first", lambda: asyncio.sleep(5))
        await measured("alone", lambda: asyncio.sleep(20))
        await measured("with images", send)
        await measured("alone again", lambda: asyncio.sleep(20))
    await sender.wait()
    return found


def test_bombs_are_refused_before_they_are_decoded(edge: Edge) -> None:
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_383).to_bytes(3, "little") * 2 + bytes(64)
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, "GIF")
    gif = bytearray(buffer.getvalue())
    gif[6:10] = struct.pack("<HH", 16_000, 16_000)
    bombs = [("image/png", bomb(16_000, 16_000)), ("image/webp", webp), ("image/gif", bytes(gif))] * 3
    with MemoryWatch(edge) as watch:
        answers = asyncio.run(_statuses(edge, bombs))
    assert {status for status, _ in answers} == {400}
    assert all("at most 64000000" in said for _, said in answers), answers
    assert watch.most["aiexport_edge.engine.images.worker"] < 150 << 20


# ---------------------------------------------------------------------------------------------------- other ways in


class _Pictures(http.server.BaseHTTPRequestHandler):
    """Serves pictures by path, and some trouble."""

    def do_GET(self) -> None:
        data = plain("blue", (32, 32))
        match self.path:
            case "/moved":
                self.send_response(302)
                self.send_header("location", "/blue.png")
                self.end_headers()
                return
            case "/page":
                kind, data = "text/html", b"<html></html>"
            case "/large":
                kind, data = "image/png", bytes(11 << 20)
            case "/blue.png":
                kind = "image/png; charset=binary"
            case _:
                self.send_error(404)
                return
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def pictures_url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def url_block(url: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": url}}


def test_urls_of_allowed_hosts_are_fetched(edge: Edge, pictures_url: str) -> None:
    data = plain("blue", (32, 32))
    data_url = "data:image/png;base64," + base64.b64encode(data).decode()
    with edge.client() as client:
        inline = client.post("/v2/messages", json=body(data, "?")).json()
        for url in (f"{pictures_url}/blue.png", data_url):
            response = client.post("/v2/messages", json=body(url_block(url), "?"))
            assert response.status_code == 200, response.text
            assert text_of(response.json()) == text_of(inline)
        for path, said in (
            ("/moved", "redirects are not followed"),
            ("/page", '"text/html" by its content type'),
            ("/large", "at most 10,485,760 are accepted"),
            ("/none", "answered 404"),
        ):
            response = client.post("/v2/messages", json=body("?", url_block(pictures_url + path)))
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == "messages.0.content.1"
            assert said in response.json()["error"]["message"]
        response = client.post("/v2/messages", json=body("?", url_block("http://127.0.0.1:1/x.png")))
        assert response.status_code == 400
        assert "no connection to its host" in response.json()["error"]["message"]


def test_images_in_a_batch(edge: Edge, pictures_url: str) -> None:
    """Inline and by URL; what is no picture is that request's error, and the others are answered."""
    data = photo(51, (24, 24))
    requests = [
        body(data, "?"),
        body(url_block(f"{pictures_url}/blue.png"), "?"),
        body("?", image_block(data[:80])),
        body("?", url_block(f"{pictures_url}/none")),
        body("no image"),
    ]
    with edge.client() as client:
        expected = [client.post("/v2/messages", json=request).json() for request in (requests[0], requests[1])]
        created = client.post("/v2/batch", json={"requests": requests})
        assert created.status_code == 202, created.text
        path = f"/v2/batch/{created.json()['id']}"
        wait_until(lambda: client.get(path).json()["ended_at"] is not None, "the batch has ended", 120)
        lines = client.get(f"{path}/results").text.splitlines()
        results = [json.loads(line)["result"] for line in lines]
        assert [result["type"] for result in results] == ["succeeded", "succeeded", "errored", "errored", "succeeded"]
        assert [text_of(result["message"]) for result in results[:2]] == list(map(text_of, expected))
        assert results[2]["error"]["param"] == results[3]["error"]["param"] == "messages.0.content.1"
        bad = client.post("/v2/batch", json={"requests": [body("x"), body("x", image_block(b"") | {"source": {}})]})
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "requests.1.messages.0.content.1.source.type"


def test_the_official_sdk_sends_images(edge: Edge) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(api_key=edge.key, base_url=edge.base_url)
    with client:
        given: Any = body(photo(61, (30, 20)), "What is it?")
        given["extra_body"] = {"temperature": given.pop("temperature")}  # newer SDKs have no argument for it
        message = client.messages.create(**given)
        assert message.usage.input_tokens > 20
        with client.messages.stream(**given) as events:
            assert "".join(events.text_stream) == message.content[0].text


def test_a_client_that_leaves_leaves_nothing_behind(edge: Edge) -> None:
    async def leave() -> None:
        async with edge.async_client() as client:
            asked = body(photo(71, (64, 64)), "Tell me more.", max_tokens=1000)
            assert (await stream(client, asked, leave_after=2)).status == 200

    asyncio.run(leave())
    wait_until(lambda: edge.stats().running == 0, "the request has been aborted")
