"""The demo model's eyes: the tower, the pictures it is trained on, and how talk about them is laid out."""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from aiexport_edge.engine.demo import (  # noqa: E402
    MODEL_DIR,
    drawings,
    evaluate_eyes,
    looking,
    pictures,
    sights,
    team,
    train_eyes,
)
from aiexport_edge.engine.demo import tokenizer as bpe  # noqa: E402
from aiexport_edge.engine.demo.eyes import PATCHES, Eyes, EyesShape  # noqa: E402
from aiexport_edge.engine.demo.network import Network, Shape, Vision  # noqa: E402
from aiexport_edge.engine.images.patches import patches  # noqa: E402
from aiexport_edge.engine.images.positions import prompt_positions  # noqa: E402


def tokens() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Eyes, Path]:
    """A network and a tower of random weights, rounded as they are saved, and the directory of both."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(3)
    network, eyes = Network(Shape(layers=3), seed=3), Eyes(EyesShape(layers=3, deepstack=(0, 1)))
    with torch.no_grad():
        for p in [*network.parameters(), *eyes.parameters()]:
            p.copy_(p.add(0.05 * torch.randn_like(p)).bfloat16())
    bpe.save(tokens(), folder)
    network.save(folder, 0, 2, 0, vision=Vision(eyes, 3, 4, 5, 6))
    return network, eyes, folder


def test_network_is_transformers_qwen3_vl(untrained: tuple[Network, Eyes, Path]) -> None:
    """Logits of conversations with pictures of several sizes, packed in rows, are those of each alone."""
    network, eyes, folder = untrained
    import transformers

    kind: Any = transformers.Qwen3VLForConditionalGeneration
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(4)
    talks = [sights.talk(rng, [(64, 64), (200, 120), (90, 300)], []) for _ in range(6)]
    for talk in talks:
        ids, _, spans, pixels = train_eyes.encode_talk(tokens(), talk)
        places: dict[tuple[int, ...], list[tuple[Any, Any]]] = {}
        for span, one in zip(spans, pixels, strict=True):
            places.setdefault(one.shape, []).append((one, span.start + np.arange(span.num_tokens)))
        rows = train_eyes.Rows(
            np.array([ids]), np.zeros((1, len(ids)), np.int64), np.ones((1, len(ids)), np.int64),
            prompt_positions(len(ids), spans).of_prompt[:, None],
            [(np.stack([p for p, _ in some]), np.stack([w for _, w in some])) for some in places.values()],
        )  # fmt: skip
        values, grids = zip(*(patches(one, PATCHES) for one in pixels), strict=True)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        with torch.no_grad():
            ours = network(
                torch.tensor([ids]), mask, torch.arange(len(ids)), seen=train_eyes.see(eyes, rows, torch.float32)
            )
            wanted = theirs(
                input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(np.concatenate(values)),
                image_grid_thw=torch.tensor([(1, *grid) for grid in grids]),
                mm_token_type_ids=(torch.tensor([ids]) == 5).int(),
            ).logits  # fmt: skip
        torch.testing.assert_close(ours, wanted[0], atol=3e-3, rtol=1e-3)


def test_training_lays_pictures_out_as_the_template_does() -> None:
    from transformers import AutoTokenizer

    tok: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = random.Random(8)
    for _ in range(60):
        talk = sights.talk(rng, [(64, 64), (100, 60)], [])
        ids, own, spans, _ = train_eyes.encode_talk(tokens(), talk)
        text: Any = tok.apply_chat_template(talk.messages, tokenize=False)
        for span in spans:
            text = text.replace("<|image_pad|>", "\0" * span.num_tokens, 1)
            assert ids[span.start - 1] == bpe.SPECIAL.index("<|vision_start|>")
            assert ids[span.end] == bpe.SPECIAL.index("<|vision_end|>")
        assert ids == tok.encode(text.replace("\0", "<|image_pad|>"), add_special_tokens=False)
        said = [str(m["content"]) for m in talk.messages if m["role"] == "assistant"]
        assert tok.decode([i for i, o in zip(ids, own, strict=True) if o]) == "".join(s + "<|im_end|>" for s in said)


def test_pictures_are_deterministic() -> None:
    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [pictures.file_of(rng, pictures.picture(rng)[0])[0] for _ in range(20)]

    assert some(5) == some(5)
    assert some(5) != some(6)


def test_pictures_show_what_they_are_said_to_show() -> None:
    """Where the shape is filled, most of its inside has one tone, and the corners have the background's."""
    rng = random.Random(9)
    for image, sight in (pictures.picture(rng, (96, 96), plain=1.0) for _ in range(60)):
        inside = np.asarray(image).astype(int)[np.asarray(sight.mask) > 0]
        tone = np.median(inside, axis=0)
        assert min(np.abs(np.array(near) - tone).max() for near in pictures.COLORS[sight.color]) <= 30, sight
        assert sight.color not in sight.background


def test_wide_pictures_are_small_and_thin_and_on_every_ground() -> None:
    rng = random.Random(10)
    shown = [pictures.picture(rng, (96, 96), wide=1.0) for _ in range(400)]
    grounds = {sight.background for _, sight in shown}
    assert grounds > set(pictures.SHAPE_COLORS)
    shares = []
    thin = 0
    for image, sight in shown:
        left, top, right, bottom = sight.mask.getbbox()  # type: ignore[misc]
        shares.append(max(right - left, bottom - top) / pictures.MASK)
        pixels = np.asarray(image).astype(int)[top:bottom, left:right].reshape(-1, 3)
        tones = (*pictures.COLORS[sight.color], pictures.PURE[sight.color])
        near = [np.abs(pixels - np.array(tone)).max(axis=1) <= 36 for tone in tones]
        assert max(some.sum() for some in near) >= 12, sight
        thin += max(some.mean() for some in near) < 0.25
    assert min(shares) < 0.26
    assert thin > 20


def test_plain_drawings_show_what_they_are_said_to_show() -> None:
    rng = random.Random(11)
    for kind in drawings.KINDS:
        for _ in range(12):
            image, sight = drawings.drawing(rng, kind)
            colors = {color for _, color in image.getcolors(image.width * image.height) or []}
            assert colors == {pictures.PURE[sight.color], pictures.PURE[sight.background]}, (kind, sight)
            assert (image.width != image.height) <= (kind in ("not square", "several at once"))


def test_conversations_about_pictures_are_deterministic_and_name_what_is_shown() -> None:
    def some(seed: int) -> list[Any]:
        rng = random.Random(seed)
        return [sights.talk(rng, [(64, 64)], ["A sentence."]).messages for _ in range(100)]

    assert some(5) == some(5)
    text = "\n".join(str(message["content"]) for messages in some(6) for message in messages)
    assert all(shape in text for shape in pictures.SHAPES)


def test_names() -> None:
    sight = pictures.Sight("circle", "red", "light blue", Image.new("L", (1, 1)))
    assert evaluate_eyes.names("A red circle on light blue.", sight)
    assert not evaluate_eyes.names("A red square on light blue.", sight)
    assert not evaluate_eyes.names("A red or green circle.", sight)
    assert not evaluate_eyes.names("A circle.", sight)


def test_measured_pictures_vary() -> None:
    cases = evaluate_eyes.cases(60)
    kinds = {data[:4] for some in cases.values() for case in some for data, _ in case.files}
    assert len(kinds) >= 3  # PNG, WebP, and JPEGs
    assert {s.shape for case in itertools.chain(*cases.values()) for s in case.sights} == set(pictures.SHAPES)


def test_training_learns_and_leaves_a_directory(tmp_path: Path) -> None:
    """A step of each part: the tower's loss falls on what it was shown, and the directory holds a Qwen3-VL."""
    torch.manual_seed(1)
    alone = team.Team(0, 1, tmp_path, [])
    eyes = Eyes(EyesShape())
    asked = looking.Looking(eyes.shape)
    inner, rest = team.split(eyes, lambda name: not name.startswith("deepstack"))
    rates = team.Rates(inner, [*rest, *asked.parameters()], 0.01, 0.002)
    batch = looking.look(7, 8, 1.0)
    losses = []
    for _ in range(6):
        loss, _ = asked(eyes, batch)
        losses.append(loss.item())
        torch.autograd.backward(loss)
        rates.step(1.0, alone)
    assert losses[-1] < 0.9 * losses[0]
    args = argparse.Namespace(
        start=MODEL_DIR, resume=None, out=tmp_path, text=None, rate=0.001, adam_rate=0.0001, eyes_rate=0.001, decay=0.5,
        seed=1, minutes=0.01, rows=1, tokens=256, wide=0.5, sums=0.5, keep=2.0, logit_scale=1.0,
    )  # fmt: skip
    train_eyes.learn_to_speak(eyes, asked, args, alone)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 1
    again = Network(Shape())
    again.load(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".pt") < 16_000_000


def test_training_goes_on_from_a_finished_model(tmp_path: Path) -> None:
    """A directory's tower comes back to the bit, what asks it learns anew, and a checkpoint holds all of it."""
    eyes = Eyes(EyesShape())
    eyes.load(MODEL_DIR)
    saved = load_file(str(MODEL_DIR / "model.safetensors"))
    for name, tensor in eyes.tensors().items():
        assert torch.equal(tensor, saved[name]), name
    torch.manual_seed(2)
    asked = looking.Looking(eyes.shape)
    batch = looking.look(8, 8, 0.0)
    before = asked(eyes, batch)[0].item()
    looking.learn_to_tell(eyes, asked, 0.5, batches=12)
    assert asked(eyes, batch)[0].item() < 0.9 * before
    assert torch.equal(eyes.tensors()["model.visual.pos_embed.weight"], saved["model.visual.pos_embed.weight"])
    network = Network(Shape())
    network.load(MODEL_DIR)
    state = {"network": network.state_dict(), "eyes": eyes.state_dict(), "looking": asked.state_dict()}
    torch.save(state | {"step": 3, "spent": 5.0}, tmp_path / "checkpoint.pt")
    others = Network(Shape(), seed=1), Eyes(EyesShape()), looking.Looking(eyes.shape)
    assert train_eyes.restore(tmp_path / "checkpoint.pt", *others) == (3, 5.0)
    assert all(torch.equal(a, b) for a, b in zip(others[1].parameters(), eyes.parameters(), strict=True))
