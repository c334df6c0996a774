"""Measure what the demo model says of pictures that it has not been trained on.

``python -m aiexport_edge.engine.demo.evaluate_eyes`` draws pictures by the generator of the training data from a seed
of their own, asks about each in one of the wordings below, and counts an answer as right where it names the shape and
the color and no other. ``--plain`` draws as somebody else would instead (``drawings.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aiexport_edge.engine.images.patches import patches

from . import MODEL_DIR, drawings, evaluate, pictures
from .eyes import PATCHES
from .looking import fit
from .pictures import SHAPE_COLORS, SHAPES, Sight

SEED = 990_000_000
QUESTIONS = (
    "What is in this picture?", "What do you see in the image?", "Describe the image.", "What does this image show?",
    "Which shape is it, and which color does it have?", "Can you tell me what is drawn in this picture?",
    "Please say what this is.", "Name the object in the image and its color.", "What is on this picture?",
)  # fmt: skip
COLOR_QUESTIONS = ("Which color is it?", "What color is the shape in this image?", "Please name the colour.")
SHAPE_QUESTIONS = ("What shape?", "Which shape is in this image?", "Please name the shape.")
JSON_QUESTION = "Answer in JSON with keys shape and color: what is in the picture?"
Right = Callable[[str], bool]
Check = Callable[[str, Sight], bool]


@dataclass(frozen=True, slots=True)
class Case:
    """A question about pictures in files, put before it or behind, and what tells a right answer."""

    files: tuple[tuple[bytes, str], ...]
    sights: tuple[Sight, ...]
    question: str
    before: bool
    right: Right

    def content(self) -> list[dict[str, Any]]:
        """The message's parts, with Pillow's images, as the chat template takes them."""
        images = [{"type": "image", "image": Image.open(BytesIO(data)).convert("RGB")} for data, _ in self.files]
        text = [{"type": "text", "text": self.question}]
        return [*images, *text] if self.before else [*text, *images]


def names(answer: str, sight: Sight) -> bool:
    """Whether the answer names this shape and this color, and no other but that of the background."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    others = (set(SHAPES) - {sight.shape}) | (set(SHAPE_COLORS) - {sight.color, *sight.background.split()})
    return {sight.shape, sight.color} <= words and not words & others


def _says_json(answer: str, sight: Sight) -> bool:
    try:
        return bool(json.loads(answer) == {"shape": sight.shape, "color": sight.color})
    except ValueError:
        return False


def cases(count: int = 100, seed: int = SEED) -> dict[str, list[Case]]:
    """What is measured: ``count`` of each kind, each kind with pictures of its own."""
    kinds: dict[str, tuple[tuple[str, ...], Check]] = {
        "what is in the picture": (QUESTIONS, names),
        "its color": (COLOR_QUESTIONS, lambda answer, sight: sight.color in answer.lower()),
        "its shape": (SHAPE_QUESTIONS, lambda answer, sight: sight.shape in answer.lower()),
        "in JSON": ((JSON_QUESTION,), _says_json),
    }
    found: dict[str, list[Case]] = {}
    for number, (kind, (questions, check)) in enumerate(kinds.items()):
        rng = random.Random(seed + number)
        found[kind] = [_case(rng, questions, check) for _ in range(count)]
    rng = random.Random(seed + len(kinds))
    found["two pictures"] = [_pair(rng) for _ in range(count)]
    return found


def plain_cases(count: int = 100, seed: int = SEED) -> dict[str, list[Case]]:
    """Plain drawings, ``count`` of each kind."""
    found: dict[str, list[Case]] = {}
    for number, kind in enumerate(drawings.KINDS):
        rng = random.Random(seed + 100 + number)
        found[kind] = [_of(rng, *drawings.drawing(rng, kind), QUESTIONS, names) for _ in range(count)]
    return found


def _case(rng: random.Random, questions: tuple[str, ...], check: Check) -> Case:
    return _of(rng, *pictures.picture(rng), questions, check)


def _of(rng: random.Random, image: Image.Image, sight: Sight, questions: tuple[str, ...], check: Check) -> Case:
    file = pictures.file_of(rng, image)
    return Case((file,), (sight,), rng.choice(questions), rng.random() < 0.6, lambda answer: check(answer, sight))


def _pair(rng: random.Random) -> Case:
    (one, first), (two, second) = pictures.picture(rng), pictures.picture(rng)
    files = (pictures.file_of(rng, one), pictures.file_of(rng, two))

    def right(answer: str) -> bool:
        head, _, tail = answer.partition(", the second ")
        return names(head, first) and names(tail, second)

    return Case(files, (first, second), "What is in these pictures?", rng.random() < 0.6, right)


class Seer:
    """The model behind ``transformers``, shown pictures."""

    def __init__(self, path: Path = MODEL_DIR) -> None:
        self.model = evaluate.Model(path)

    @torch.inference_mode()
    def answer(self, some: list[Case], limit: int = 40, together: int = 50) -> list[str]:
        """One greedy answer to each."""
        return [text for at in range(0, len(some), together) for text in self._batch(some[at : at + together], limit)]

    def _batch(self, some: list[Case], limit: int) -> Iterator[str]:
        tok, model = self.model.tokenizer, self.model.model
        pad = tok.convert_tokens_to_ids("<|image_pad|>")
        rows, values, grids = [], [], []
        for case in some:
            content = case.content()
            text = tok.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            for part in content:
                if part["type"] != "image":
                    continue
                value, grid = patches(fit(part["image"]), PATCHES)
                values.append(torch.from_numpy(value.copy()))
                grids.append((1, *grid))
                count = grid[0] * grid[1] // PATCHES.merge_size**2
                text = text.replace("<|image_pad|>", "\0" * count, 1)
            rows.append(tok.encode(text.replace("\0", "<|image_pad|>"), add_special_tokens=False))
        wide = max(map(len, rows))
        ids = torch.tensor([[tok.pad_token_id] * (wide - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (wide - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=torch.cat(values), image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids == pad).int(), max_new_tokens=limit, do_sample=False, temperature=None, top_p=None,
            top_k=None,
        )  # fmt: skip
        yield from tok.batch_decode(out[:, wide:], skip_special_tokens=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--count", type=int, default=1000, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--plain", action="store_true", help="plain drawings by another hand")
    parser.add_argument("--wrong", action="store_true", help="show the wrong answers as well")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seer = Seer(args.model)
    measured = plain_cases if args.plain else cases
    for kind, some in measured(args.count, args.seed).items():
        answers = seer.answer(some)
        wrong = [(case, answer) for case, answer in zip(some, answers, strict=True) if not case.right(answer)]
        print(f"{kind:32} {len(some):>6} {1 - len(wrong) / len(some):>8.1%}", flush=True)
        if args.wrong:
            for case, answer in wrong:
                true = "; ".join(f"{s.color} {s.shape} on {s.background}" for s in case.sights)
                print(f"    {true:45} {case.question:45} {answer}")
            counted = Counter(s.shape for case, _ in wrong for s in case.sights)
            print(f"    {dict(counted)}")


if __name__ == "__main__":
    main()
