"""Each rule of a message body, with the path of the field at fault."""

from __future__ import annotations

from typing import Any

import pytest

from aiexport_edge.proto.config_images import ImagesConfig
from aiexport_edge.shim.api.messages_request import ResponseFormat, Turn, parse_messages_request
from aiexport_edge.shim.errors import InvalidRequest
from aiexport_edge.shim.images.sources import ImageData, ImageLink, ImageRules

USER = [{"role": "user", "content": "x"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": USER, **fields}


def content(*blocks: Any) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": list(blocks)}])


def image(**source: Any) -> dict[str, Any]:
    return content({"type": "text", "text": "x"}, {"type": "image", "source": source})


IMAGE = "messages.0.content.1"
PNG = {"type": "base64", "media_type": "image/png", "data": "aGk="}
WRONG: list[tuple[Any, str | None]] = [
    ([], None),
    ("x", None),
    (None, None),
    ({"messages": USER}, "model"),
    (body(model=None), "model"),
    (body(model=1), "model"),
    (body(model="\ud800"), "model"),
    ({"model": "m"}, "messages"),
    (body(messages={}), "messages"),
    (body(messages=[]), "messages"),
    (body(messages=[None]), "messages.0"),
    (body(messages=[*USER, 5]), "messages.1"),
    (body(messages=[{"content": "x"}]), "messages.0.role"),
    (body(messages=[{"role": "system", "content": "x"}]), "messages.0.role"),
    (body(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
    (body(messages=[{"role": 1, "content": "x"}]), "messages.0.role"),
    (body(messages=[{"role": "assistant", "content": "x"}]), "messages.0.role"),
    (body(messages=[{"role": "user"}]), "messages.0.content"),
    (body(messages=[{"role": "user", "content": None}]), "messages.0.content"),
    (body(messages=[{"role": "user", "content": {}}]), "messages.0.content"),
    (body(messages=[{"role": "user", "content": ""}]), "messages.0.content"),
    (body(messages=[{"role": "user", "content": []}]), "messages.0.content"),
    (body(messages=[{"role": "user", "content": "\udc00"}]), "messages.0.content"),
    (body(messages=[*USER, {"role": "assistant", "content": ""}, *USER]), "messages.1.content"),
    (content("x"), "messages.0.content.0"),
    (content({"text": "x"}), "messages.0.content.0.type"),
    (content({"type": "audio"}), "messages.0.content.0.type"),
    (content({"type": "tool_result", "content": "x"}), "messages.0.content.0.type"),
    (content({"type": "text"}), "messages.0.content.0.text"),
    (content({"type": "text", "text": 5}), "messages.0.content.0.text"),
    (content({"type": "text", "text": "\ud800x"}), "messages.0.content.0.text"),
    (content({"type": "image"}), "messages.0.content.0.source"),
    (image(), f"{IMAGE}.source.type"),
    (image(type="file"), f"{IMAGE}.source.type"),
    (image(type="base64", data="x"), f"{IMAGE}.source.media_type"),
    (image(type="base64", media_type="image/tiff", data="x"), f"{IMAGE}.source.media_type"),
    (image(type="base64", media_type="image/png"), f"{IMAGE}.source.data"),
    (image(type="url"), f"{IMAGE}.source.url"),
    (image(type="url", url="ftp://x"), f"{IMAGE}.source.url"),
    (image(type="url", url="data:text/html;base64,x"), f"{IMAGE}.source.url"),
    (image(**PNG | {"data": ""}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": 5}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": "aGk"}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": "aG-_"}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": "aGk=aGk="}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": "é"}), f"{IMAGE}.source.data"),
    (image(**PNG | {"data": "A" * (20 << 20)}), f"{IMAGE}.source.data"),
    (image(type="url", url="data:image/png;base64,!"), f"{IMAGE}.source.url"),
    (image(type="url", url="data:image/png,x"), f"{IMAGE}.source.url"),
    (image(type="url", url="https://example.com/a.png"), f"{IMAGE}.source.url"),
    (image(type="url", url="http://127.0.0.1/a.png"), f"{IMAGE}.source.url"),
    (content(*[{"type": "image", "source": PNG}] * 21), "messages.0.content.20"),
    (content({"type": "video", "source": PNG}), "messages.0.content.0"),
    (
        body(messages=[*USER, {"role": "assistant", "content": [{"type": "image", "source": PNG}]}]),
        "messages.1.content.0",
    ),
    (body(tools=[{"name": "x"}]), "tools"),
    (body(tool_choice={"type": "auto"}), "tool_choice"),
    (body(thinking={"type": "enabled", "budget_tokens": 1024}), "thinking"),
    (body(metadata="x"), "metadata"),
    (body(max_tokens=0), "max_tokens"),
    (body(max_tokens=-1), "max_tokens"),
    (body(max_tokens=True), "max_tokens"),
    (body(max_tokens=1.5), "max_tokens"),
    (body(max_tokens="5"), "max_tokens"),
    (body(max_tokens=float("inf")), "max_tokens"),
    (body(temperature=1.5), "temperature"),
    (body(temperature=-0.1), "temperature"),
    (body(temperature=False), "temperature"),
    (body(temperature=float("inf")), "temperature"),
    (body(top_p=-0.01), "top_p"),
    (body(top_p=1.01), "top_p"),
    (body(top_p=[]), "top_p"),
    (body(top_k=-1), "top_k"),
    (body(top_k=0.5), "top_k"),
    (body(seed=-1), "seed"),
    (body(seed=2**64), "seed"),
    (body(seed=float("-inf")), "seed"),
    (body(stream=1), "stream"),
    (body(stream="true"), "stream"),
    (body(system=5), "system"),
    (body(system={"type": "text", "text": "x"}), "system"),
    (body(system=["x"]), "system.0"),
    (body(system=[{"type": "image"}]), "system.0.type"),
    (body(system=[{"type": "text", "text": None}]), "system.0.text"),
    (body(system="\ud800"), "system"),
    (body(stop_sequences="x"), "stop_sequences"),
    (body(stop_sequences=["x"] * 17), "stop_sequences"),
    (body(stop_sequences=["x", ""]), "stop_sequences.1"),
    (body(stop_sequences=["x" * 257]), "stop_sequences.0"),
    (body(stop_sequences=[None]), "stop_sequences.0"),
    (body(stop_sequences=["\ud800"]), "stop_sequences.0"),
    (body(response_format="json"), "response_format"),
    (body(response_format={}), "response_format.type"),
    (body(response_format={"type": "xml"}), "response_format.type"),
    (body(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (body(response_format={"type": "json_schema", "json_schema": {"schema": {}}}), "response_format.json_schema.name"),
    (
        body(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": []}}),
        "response_format.json_schema.schema",
    ),
    (
        body(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}}),
        "response_format.json_schema.strict",
    ),
]


@pytest.mark.parametrize(("value", "param"), WRONG)
def test_wrong_bodies_name_their_field(value: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_messages_request(value)
    assert raised.value.param == param
    assert param is None or raised.value.message.startswith(param)
    raised.value.message.encode()


def test_defaults() -> None:
    request = parse_messages_request(body())
    assert request.turns == (Turn("user", "x"),)
    assert (request.temperature, request.stream, request.stop_sequences) == (1.0, False, ())
    assert (request.system, request.max_tokens, request.top_p, request.top_k, request.seed) == (None,) * 5


def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    optional = "max_tokens temperature system stream response_format top_p top_k stop_sequences seed metadata tools"
    nothing = dict.fromkeys([*optional.split(), "tool_choice", "thinking"])
    assert parse_messages_request(body(**nothing, service_tier="auto", nonsense=[{}])) == parse_messages_request(body())


def test_whole_numbers_may_have_a_point() -> None:
    request = parse_messages_request(body(max_tokens=5.0, top_k=1e2, seed=0.0, temperature=0, top_p=1))
    assert (request.max_tokens, request.top_k, request.seed) == (5, 100, 0)
    assert all(type(value) is int for value in (request.max_tokens, request.top_k, request.seed))
    assert (request.temperature, request.top_p) == (0.0, 1.0)


def test_edges_that_are_allowed() -> None:
    request = parse_messages_request(body(top_k=0, seed=2**64 - 1, stop_sequences=["é" * 256] * 16))
    assert request.top_k is None
    assert request.seed == 2**64 - 1
    assert parse_messages_request(body(top_k=10**30)).top_k == 2**31 - 1
    assert parse_messages_request(body(response_format={"type": "text"}, metadata={"user_id": "\ud800"}))


def test_blocks_and_turns_are_joined() -> None:
    request = parse_messages_request(
        {
            "model": "m",
            "system": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "four"},
                {"role": "user", "content": " "},
                {"role": "assistant", "content": "prefill "},
            ],
        }
    )
    assert request.system == "a\n\nb"
    assert request.turns == (
        Turn("user", "one two\n\nthree"),
        Turn("assistant", "four"),
        Turn("user", " "),
        Turn("assistant", "prefill "),
    )


def test_images_keep_their_places() -> None:
    blank = {"type": "base64", "media_type": "image/gif", "data": "a G\r\nk="}
    request = parse_messages_request(
        body(
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "text", "text": "b"},
                        {"type": "image", "source": PNG},
                        {"type": "text", "text": ""},
                        {"type": "image", "source": {"type": "url", "url": "data:image/webp;base64,aGk="}},
                    ],
                },
                {"role": "user", "content": [{"type": "image", "source": blank}, {"type": "text", "text": "c"}]},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": [{"type": "image", "source": PNG}]},
            ]
        )
    )
    first = ImageData("messages.0.content.2", "image/png", b"hi")
    second = ImageData("messages.0.content.4", "image/webp", b"hi")
    third = ImageData("messages.1.content.0", "image/gif", b"hi")
    last = ImageData("messages.3.content.0", "image/png", b"hi")
    assert request.turns == (
        Turn("user", ("ab", first, second, "\n\n", third, "c")),
        Turn("assistant", "d"),
        Turn("user", (last,)),
    )
    assert request.images == [first, second, third, last]


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:Image/PNG;Base64,", "data:image/png;name=a%20b.png;charset=utf-8;base64,"]
)
def test_data_urls_as_encoders_write_them(head: str) -> None:
    request = parse_messages_request(image(type="url", url=head + "aGk="))
    assert request.images == [ImageData(IMAGE, "image/png", b"hi")]


def test_the_operator_says_what_images_may_be() -> None:
    rules = ImageRules(ImagesConfig(allow=("cdn.example.com",), max_bytes=2, max_count=1))
    request = parse_messages_request(image(type="url", url="https://CDN.example.com/a.png?b"), rules)
    link = request.images[0]
    assert parse_messages_request(image(type="url", url="HTTPS://cdn.example.com/a.png?b"), rules).images == [link]
    assert isinstance(link, ImageLink)
    assert (link.path, link.target.host, link.target.path) == (IMAGE, "cdn.example.com", "/a.png?b")
    assert parse_messages_request(image(**PNG), rules).images == [ImageData(IMAGE, "image/png", b"hi")]
    for data in ("aGkh", "aGkhaGkh"):
        with pytest.raises(InvalidRequest, match="at most 2 are accepted"):
            parse_messages_request(image(**PNG | {"data": data}), rules)
    with pytest.raises(InvalidRequest, match="one image more than the 1 of a request"):
        parse_messages_request(content(*[{"type": "image", "source": PNG}] * 2), rules)
    with pytest.raises(InvalidRequest, match="does not allow"):
        parse_messages_request(image(type="url", url="https://other.example.com/a.png"), rules)


@pytest.mark.parametrize("nothing", ["", [], [{"type": "text", "text": ""}]])
def test_an_empty_prefill_is_none(nothing: Any) -> None:
    request = parse_messages_request(body(messages=[*USER, {"role": "assistant", "content": nothing}]))
    assert request.turns == (Turn("user", "x"),)


@pytest.mark.parametrize("nothing", ["", []])
def test_an_empty_system_is_none(nothing: Any) -> None:
    assert parse_messages_request(body(system=nothing)).system is None


def test_response_formats() -> None:
    def read(**given: object) -> ResponseFormat | None:
        return parse_messages_request(body(response_format=given)).response_format

    assert read(type="text") is None
    assert read(type="json_object") == ResponseFormat(None)
    schema = {"type": "object", "title": "\ud800"}
    named = {"name": "n", "schema": schema, "strict": True}
    assert read(type="json_schema", json_schema=named) == ResponseFormat('{"type":"object","title":"\\ud800"}')
    assert read(type="json_schema", json_schema={"name": "n", "schema": {}, "strict": None}) == ResponseFormat("{}")
    with pytest.raises(InvalidRequest) as refused:
        read(type="json_schema", json_schema={"name": "n", "schema": {"title": "x" * 70_000}})
    assert refused.value.param == "response_format.json_schema.schema"
