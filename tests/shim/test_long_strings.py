"""Bodies with long strings of base64: what comes of them is what json reads, wherever they stand."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from aiexport_edge.proto.config_images import ImagesConfig
from aiexport_edge.shim import json_body, long_strings
from aiexport_edge.shim.api.messages_request import MAX_SCHEMA_BYTES, parse_messages_request
from aiexport_edge.shim.errors import InvalidRequest
from aiexport_edge.shim.fields import Value
from aiexport_edge.shim.images.sources import ImageData, ImageRules
from aiexport_edge.shim.long_strings import LongString, cut

LEAST = long_strings.LEAST_BYTES
DATA = [random.Random(seed).randbytes(3 * LEAST + 17 * seed) for seed in range(3)]
LONG = [base64.b64encode(data).decode() for data in DATA]


def plain(value: Any) -> Any:
    """The value with its strings as they were sent."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.text if isinstance(value, LongString) else value


@pytest.mark.parametrize(
    ("document", "num_found"),
    [
        ({"data": LONG[0]}, 1),
        ([{"url": "data:image/png;base64," + LONG[0]}, {"data": LONG[1]}, LONG[2], {LONG[0]: LONG[1]}], 5),
        ({"data": [LONG[0]], "url": {"a": LONG[1], "data": "short"}}, 2),
        ({"text": "A" * 4 * LEAST, "data": "A" * LEAST}, 2),
        ({"data": LONG[0][:-1]}, 0),
        ({"data": LONG[0] + "===="}, 0),
        ({"data": LONG[0][: LEAST // 4 * 4] + "AA==" + LONG[0]}, 0),
        ({"data": LONG[0][: 4 * (64 << 10) - 4] + "AA==" + LONG[0]}, 0),
        ({"data": "A" * 2 * LEAST + "AB=="}, 0),  # what encoders write ends in "AA=="
        ({"data": "-_" * LEAST}, 0),
        ({"data": 'a"' + LONG[0]}, 0),
        ({"data": LONG[0] + '"b'}, 0),
        ({"data": "é" + LONG[0]}, 0),
        ({"data": "\n" + LONG[0], "url": "file:///" + LONG[0]}, 0),
        ([0] * LEAST, 0),
        (["x" * 99] * LEAST, 0),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_body_is_what_json_reads(document: Any, num_found: int, indent: int | None) -> None:
    body = json.dumps(document, indent=indent).encode()
    assert len(cut(body)[1]) == num_found
    assert plain(json_body.parse(body)) == document


def test_long_strings_are_found_wherever_they_begin() -> None:
    for shift in range(0, LEAST, 7919):
        body = json.dumps({"text": " " * shift, "data": LONG[0][:LEAST], "more": [" " * 50] * 9}).encode()
        value: Any = json_body.parse(body)
        assert value["data"] == LongString("", base64.b64decode(LONG[0][:LEAST]))


@pytest.mark.parametrize(
    "body",
    ['{"data":"%s"', '{"data":"%s","data":}', '"%s""%s"', '{"a":"x"%s"y"}', "[" * 300 + '"%s"' + "]" * 300, '"%s"\x00'],
)
def test_what_is_wrong_is_said_of_the_whole_body(body: str) -> None:
    whole = body.replace("%s", LONG[0]).encode()
    with pytest.raises(InvalidRequest) as said:
        json_body.parse(whole)
    with pytest.raises(InvalidRequest) as expected:
        json_body._parse(whole)
    assert said.value.message == expected.value.message


def test_pictures_are_the_same_whichever_way_they_were_read() -> None:
    rules = ImageRules(ImagesConfig(max_bytes=len(DATA[1])))
    fine = {"type": "base64", "media_type": "image/png", "data": LONG[1]}
    link = {"type": "url", "url": "data:image/png;base64," + LONG[1]}

    def read(source: Any) -> Any:
        block = json_body.parse(json.dumps({"source": source}).encode())
        return rules.read(Value(block, "block"))

    assert read(fine) == read(link) == ImageData("block", "image/png", DATA[1])
    for source, field, said in (
        (fine | {"data": LONG[2]}, "block.source.data", "at most"),
        (link | {"url": "data:image/png;base64," + LONG[2]}, "block.source.url", "at most"),
        (fine | {"data": "data:image/png;base64," + LONG[0]}, "block.source.data", "not valid base64"),
        (link | {"url": "data:text/plain;base64," + LONG[1]}, "block.source.url", "data: URL must be base64 of"),
        (link | {"url": LONG[1]}, "block.source.url", "must be an http, https or data URL"),
        (fine | {"media_type": LONG[1]}, "block.source.media_type", "must be .image/png"),
    ):
        with pytest.raises(InvalidRequest, match=said) as wrong:
            read(source)
        assert wrong.value.param == field


@pytest.mark.parametrize("length", [60 << 10, 100 << 10])
def test_a_schema_says_what_was_sent_though_its_strings_are_long(length: int) -> None:
    schema = {"type": "object", "default": {"data": "A" * length}}
    given = {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": '"' * 37_000}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }
    document = json.dumps(given).encode()
    assert cut(document)[1]
    value = json_body.parse(document)
    if length > MAX_SCHEMA_BYTES:
        with pytest.raises(InvalidRequest, match=r"response_format\.json_schema\.schema"):
            parse_messages_request(value)
    else:
        read = parse_messages_request(value).response_format
        assert read is not None
        assert json.loads(str(read.schema)) == schema
