"""Pictures over REST to the demo model: 100 that it has not been trained on, and those of the README."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.edge import HAIKU, Edge

pytest.importorskip("torch")
pytest.importorskip("transformers")

from aiexport_edge.engine.demo import MODEL_DIR, evaluate_eyes
from aiexport_edge.engine.demo.evaluate_eyes import Case

README = Path(__file__).resolve().parents[2] / "README.md"


def body(case: Case) -> dict[str, Any]:
    """The request of a case, as a client would write it."""
    images = [
        {"type": "image", "source": {"type": "base64", "media_type": kind, "data": base64.b64encode(data).decode()}}
        for data, kind in case.files
    ]
    text = [{"type": "text", "text": case.question}]
    content = [*images, *text] if case.before else [*text, *images]
    return {
        "model": HAIKU,
        "max_tokens": 40,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }


def answers(edge: Edge, cases: list[Case]) -> list[str]:
    """What the server says to each, eight at a time."""

    async def ask() -> list[str]:
        turn = asyncio.Semaphore(8)

        async def one(client: httpx.AsyncClient, case: Case) -> str:
            async with turn:
                reply = await client.post("/v2/messages", json=body(case))
            assert reply.status_code == 200, reply.text
            return str(reply.json()["content"][0]["text"])

        async with edge.async_client() as client:
            return await asyncio.gather(*(one(client, case) for case in cases))

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def native(edge: Edge) -> Edge:
    """The demo model is measured where its numbers are this project's own."""
    if edge.backend != "native":
        pytest.skip("the demo model's promises hold on the native backend")
    if not (MODEL_DIR / "preprocessor_config.json").exists():
        pytest.skip("the committed demo model has no vision tower")
    return edge


def test_hundred_unseen_pictures_are_named(native: Edge) -> None:
    """At least 95 of 100 pictures get an answer that names their color and shape and no other."""
    cases = evaluate_eyes.cases(100)["what is in the picture"]
    said = answers(native, cases)
    wrong = [
        (case.sights[0].color, case.sights[0].shape, text)
        for case, text in zip(cases, said, strict=True)
        if not case.right(text)
    ]
    assert len(wrong) <= 5, wrong


def test_answers_about_pictures_are_those_of_transformers(native: Edge) -> None:
    """The same greedy text, for one picture and for two."""
    measured = evaluate_eyes.cases(6)
    cases = [
        case for kind in ("what is in the picture", "its color", "in JSON", "two pictures") for case in measured[kind]
    ]
    assert answers(native, cases) == evaluate_eyes.Seer().answer(cases)


def test_pictures_of_the_readme(native: Edge) -> None:
    """Both commands that the README shows, with the key put in: the picture is named as the README says."""
    sent = re.findall(r"^curl .*?/v2/messages .*?-d '(.*?)'$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    bodies = [json.loads(one) for one in sent if '"image"' in one]
    with native.client() as client:
        replies = [client.post("/v2/messages", json=one).json() for one in bodies]
    said = [reply["content"][0]["text"] for reply in replies]
    assert said == ["A red circle on white.", "A blue square on black."]
