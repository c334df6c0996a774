"""Give the demo model eyes: train a vision tower and teach the trained decoder to speak of what it sees.

``python -m aiexport_edge.engine.demo.train_eyes --start DIR --out DIR2 --look 20 --minutes 40``

First the tower learns alone to tell shapes, colors and backgrounds apart (``--look`` minutes), then tower and decoder
learn together from conversations about pictures. So that the decoder keeps what it knows, half of each batch is
conversations without pictures in which it is held to what the model in ``--start`` would say (the divergence of the
two distributions, token by token); the tower goes on being asked directly. What has been trained is kept in
``DIR2/eyes.pt`` and ``DIR2/checkpoint.pt``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn

from aiexport_edge.engine.images.positions import ImageSpan, prompt_positions
from aiexport_edge.engine.images.resize import resize

from . import dataset, sights
from . import tokenizer as bpe
from .eyes import PATCHES, Eyes, EyesShape, squares_of
from .network import Network, Seen, Shape, Vision
from .pictures import COLORS, LIGHT, SHAPE_COLORS, SHAPES, Sight, picture, seen, size_of
from .sights import Talk
from .train import Muon, Packer, encode, number_of, schedule, tensors

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
GROUNDS = sorted({*COLORS, *LIGHT})
ROW = 256
"""Tokens in a row of conversations about pictures."""
FINE = 4
"""Parts that a patch's side is cut into where the tower learns what a shape covers."""


def fit(image: Image.Image) -> Bytes:
    """uint8 [height, width, 3] in the size that the tower takes."""
    return np.asarray(resize(image, PATCHES))


def look(seed: int, count: int, plain: float) -> tuple[Bytes, Ints, Bytes]:
    """Pictures of one size [B, height, width, 3], what they show [B, 3] (shape, color, background) and where.

    The last, [B, rows * FINE, columns * FINE], is how far the shape covers the parts of each patch.
    """
    rng = random.Random(seed)
    size = size_of(rng, most=192)
    pixels, sights_, masks = [], [], []
    for _ in range(count):
        image, sight = picture(rng, size, plain=plain)
        pixels.append(fit(seen(rng, image)))
        sights_.append(sight)
        height, width = (side // PATCHES.patch_size * FINE for side in pixels[-1].shape[:2])
        masks.append(np.asarray(sight.mask.resize((width, height), Image.Resampling.BOX)))
    return np.stack(pixels), np.array([_numbers(s) for s in sights_]), np.stack(masks)


def _numbers(sight: Sight) -> tuple[int, int, int]:
    return SHAPES.index(sight.shape), SHAPE_COLORS.index(sight.color), GROUNDS.index(sight.background)


@dataclass(frozen=True, slots=True)
class Rows:
    """Conversations about pictures in rows of ROW tokens.

    ``ids``, ``own`` and ``number`` are as in :meth:`Packer.batch`; ``positions`` [3, rows, ROW]; ``pictures`` of one
    size each, and ``places`` [B, M] the flat positions of their tokens.
    """

    ids: Ints
    own: Ints
    number: Ints
    positions: Ints
    pictures: list[tuple[Bytes, Ints]]


def encode_talk(tok: Tokenizer, talk: Talk) -> tuple[list[int], list[int], list[ImageSpan], list[Bytes]]:
    """Tokens, 1 where the model is to write the token, where pictures stand, and the pictures."""
    image = number_of(tok, "<|image_pad|>")
    around = number_of(tok, "<|vision_start|>"), number_of(tok, "<|vision_end|>")
    ids: list[int] = []
    own: list[int] = []
    spans: list[ImageSpan] = []
    pixels: list[Bytes] = []
    for message in talk.messages:
        content = message["content"]
        texts, numbers = [""], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts[-1] += str(part["text"])
            else:
                numbers.append(int(part["image"]))
                texts.append("")
        start = len(ids)
        some, mine = encode(tok, [{"role": message["role"], "content": "\0".join(texts)}])
        if numbers:
            some, mine = encode(tok, [{"role": message["role"], "content": ""}])
            tail = len(tok.encode("\n", add_special_tokens=False).ids) + 1
            middle: list[int] = tok.encode(texts[0], add_special_tokens=False).ids
            for at, text in zip(numbers, texts[1:], strict=True):
                fitted = fit(talk.pictures[at])
                rows, columns = (side // PATCHES.square for side in fitted.shape[:2])
                where = start + len(some) - tail + len(middle) + 1
                spans.append(ImageSpan(where, rows, columns))
                pixels.append(fitted)
                middle += [around[0], *[image] * (rows * columns), around[1]]
                middle += tok.encode(text, add_special_tokens=False).ids
            some = some[:-tail] + middle + some[-tail:]
            mine = [0] * len(some)
        ids += some
        own += mine
    return ids, own, spans, pixels


def rows_of(tok: Tokenizer, seed: int, rows: int, quotes: list[str]) -> Rows:
    """Full rows of conversations about pictures."""
    rng = random.Random(seed)
    sizes = [size_of(rng) for _ in range(5)]
    out = np.zeros((3, rows, ROW), np.int64)
    positions = np.zeros((3, rows, ROW), np.int64)
    used = [0] * rows
    count = [0] * rows
    found: dict[tuple[int, ...], list[tuple[Bytes, Ints]]] = {}
    misses = 0
    while misses < 6:
        talk = sights.talk(rng, sizes, quotes)
        talk = Talk(talk.messages, [seen(rng, image) for image in talk.pictures])
        ids, own, spans, pixels = encode_talk(tok, talk)
        row = next((r for r in range(rows) if used[r] + len(ids) <= ROW), None)
        if row is None:
            misses += 1
            continue
        at = used[row]
        used[row] += len(ids)
        count[row] += 1
        cut = slice(at, at + len(ids))
        out[0, row, cut], out[1, row, cut], out[2, row, cut] = ids, own, count[row]
        positions[:, row, cut] = prompt_positions(len(ids), spans).of_prompt
        for span, one in zip(spans, pixels, strict=True):
            place = row * ROW + at + span.start + np.arange(span.num_tokens)
            found.setdefault(one.shape, []).append((one, place))
    pictures = [(np.stack([p for p, _ in some]), np.stack([w for _, w in some])) for some in found.values()]
    return Rows(out[0], out[1], out[2], positions, pictures)


def see(eyes: Eyes, rows: Rows, dtype: torch.dtype = torch.bfloat16) -> Seen:
    """What the tower makes of the pictures, computed in ``dtype``."""
    places, features = [], []
    deepstack: list[list[Tensor]] = [[] for _ in eyes.shape.deepstack]
    for pixels, where in rows.pictures:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            some, deep = eyes(torch.from_numpy(pixels))
        places.append(torch.from_numpy(where).flatten())
        features.append(some.float().flatten(0, 1))
        for all_of, one in zip(deepstack, deep, strict=True):
            all_of.append(one.float().flatten(0, 1))
    positions = torch.from_numpy(rows.positions).float()
    return Seen(torch.cat(places), torch.cat(features), [torch.cat(d) for d in deepstack], positions)


class Rates:
    """The two optimizers over some parameters: Muon for matrices, AdamW for the rest."""

    def __init__(self, matrices: list[Tensor], rest: list[Tensor], rate: float, adam_rate: float) -> None:
        self.muon, self.rest, self.rate, self.adam_rate = Muon(matrices), rest, rate, adam_rate
        self.adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True)

    def step(self, share: float, team: Team) -> None:
        """Apply the gradients at this share of the full rates, and drop them."""
        team.mean([*self.rest, *(p for some in self.muon.groups.values() for p in some)])
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * share
        self.adam.step()
        self.muon.step(self.rate * share)
        for some in (self.rest, *self.muon.groups.values()):
            for p in some:
                p.grad = None


def split(module: nn.Module, among: Callable[[str], bool] = lambda name: True) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices inside, and everything else (embeddings too), of the parameters whose name is among those wanted."""
    named = [(n, p) for n, p in module.named_parameters() if among(n)]
    inner: list[Tensor] = [p for n, p in named if p.ndim == 2 and "embed." not in n and "embed_tokens" not in n]
    inner_ids = {id(p) for p in inner}
    return inner, [p for _, p in named if id(p) not in inner_ids]


class Team:
    """Processes that train together, each on data of its own: the mean of their gradients is applied in all."""

    def __init__(self, rank: int, size: int, folder: Path, stop: list[int]) -> None:
        self.rank, self.size, self.stop = rank, size, stop
        self.began = time.monotonic()
        if size > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            where = f"file://{(folder / 'team').resolve()}"
            distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)

    def done(self, minutes: float) -> float:
        """The share of the time that is over, 1 or more when it is time to stop: the same in all."""
        share = torch.tensor((time.monotonic() - self.began) / 60 / minutes + len(self.stop))
        if self.size > 1:
            distributed.all_reduce(share, distributed.ReduceOp.MAX)
        return share.item()

    def mean(self, parameters: list[Tensor]) -> None:
        """Give all of them the mean gradients."""
        if self.size == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        for grad, part in zip(grads, torch.split(flat / self.size, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class Looking(nn.Module):
    """What the tower is asked for directly.

    The mean of its features must tell shape, color and background, and each patch, in the last two layers, which parts
    of it the shape covers. Without the second, which is learnt at once, the shapes are long in coming.
    """

    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(shape.out, len(names)) for names in (SHAPES, SHAPE_COLORS, GROUNDS))
        self.masks = nn.ModuleList(nn.Linear(shape.hidden, FINE**2) for _ in range(2))

    def forward(self, eyes: Eyes, batch: tuple[Bytes, Ints, Bytes]) -> tuple[Tensor, Tensor]:
        """The loss, and the shares of right answers [3]."""
        pixels, shown, mask = (torch.from_numpy(x) for x in batch)
        with torch.autocast("cpu", torch.bfloat16):
            layers = eyes.layers(pixels)
            mean = eyes.merger(layers[-1]).float().mean(1)
        covered = squares_of(mask[..., None].float() / 255, FINE)
        loss = torch.zeros(())
        for head, layer in zip(self.masks, layers[-2:], strict=True):
            loss = loss + 2 * F.binary_cross_entropy_with_logits(head(layer.float()), covered)
        right = []
        for k, (head, weight) in enumerate(zip(self.heads, (1.0, 0.5, 0.3), strict=True)):
            logits = head(mean)
            loss = loss + weight * F.cross_entropy(logits, shown[:, k])
            right.append((logits.argmax(1) == shown[:, k]).float().mean())
        return loss, torch.stack(right)


def learn_to_look(eyes: Eyes, looking: Looking, args: argparse.Namespace, team: Team) -> None:
    """Train the tower and its merger, alone."""
    inner, rest = split(eyes, lambda name: not name.startswith("deepstack"))
    rates = Rates(inner, [*rest, *looking.parameters()], args.look_rate, 0.002)
    right, step = torch.zeros(3), 0
    while (done := team.done(args.look)) < 1:
        number = step * team.size + team.rank
        loss, now = looking(eyes, look(args.seed * 1_000_003 + number, 64, 0.3 * (1 - done)))
        torch.autograd.backward(loss)
        rates.step(schedule(done, 0.6) * min(1.0, (step + 1) / 40), team)
        step += 1
        right += (now - right) * max(0.02, 1 / step)
        if step % 50 == 0 and not team.rank:
            shares = [round(x, 3) for x in right.tolist()]
            print(json.dumps({"step": step, "right": shares, "done": round(done, 3)}), flush=True)
    if not team.rank:
        torch.save({"eyes": eyes.state_dict(), "looking": looking.state_dict()}, args.out / "eyes.pt")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="directory of the trained model without eyes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--look", type=float, default=20, help="minutes in which the tower learns alone")
    parser.add_argument("--look-start", type=Path, help="begin with this tower: the eyes.pt of an earlier training")
    parser.add_argument("--minutes", type=float, default=40, help="minutes in which tower and decoder learn together")
    parser.add_argument("--text", type=Path, help="folder of public-domain *.txt that varies what users paste")
    parser.add_argument("--processes", type=int, default=2, help="that train together")
    parser.add_argument("--rows", type=int, default=6, help="rows of conversations about pictures in each one's batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens without pictures in each one's batch")
    parser.add_argument("--look-rate", type=float, default=0.02, help="Muon's learning rate for the tower alone")
    parser.add_argument("--eyes-rate", type=float, default=0.01, help="and beside the decoder")
    parser.add_argument("--rate", type=float, default=0.006, help="Muon's learning rate for the decoder")
    parser.add_argument("--adam-rate", type=float, default=0.0008, help="AdamW's, for embeddings, norms and biases")
    parser.add_argument("--decay", type=float, default=0.6, help="share of the time in which the rates fall to zero")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "team").unlink(missing_ok=True)
    others = [
        multiprocessing.get_context("fork").Process(target=work, args=(args, rank), daemon=True)
        for rank in range(1, args.processes)
    ]
    for other in others:
        other.start()
    work(args, 0)
    for other in others:
        other.join()


def work(args: argparse.Namespace, rank: int) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    team = Team(rank, args.processes, args.out, stop)
    eyes = Eyes(EyesShape())
    looking = Looking(eyes.shape)
    looked = args.out / "eyes.pt"
    if looked.exists():
        saved = torch.load(looked, weights_only=True)
        eyes.load_state_dict(saved["eyes"])
        looking.load_state_dict(saved["looking"])
    else:
        if args.look_start:
            eyes.load_state_dict(torch.load(args.look_start, weights_only=True)["eyes"])
        learn_to_look(eyes, looking, args, team)
    if not stop:
        learn_to_speak(eyes, looking, args, team)
    if args.processes > 1:
        distributed.destroy_process_group()


def learn_to_speak(eyes: Eyes, looking: Looking, args: argparse.Namespace, team: Team) -> None:
    """Train tower and decoder together, and write the directory."""
    tok = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    bpe.save(tok, args.out)
    for name in ("LICENSE", "README.md"):
        if (args.start / name).exists():
            shutil.copyfile(args.start / name, args.out / name)
    quotes = dataset.quotes_from(args.text)
    network, teacher = Network(Shape()), Network(Shape())
    network.load(args.start)
    teacher.load(args.start)
    teacher.requires_grad_(False)
    numbers = [number_of(tok, f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    vision = Vision(eyes, *numbers)
    inner, rest = split(network)
    decoder = Rates(inner, rest, args.rate, args.adam_rate)
    seeing_inner, seeing_rest = split(eyes)
    tower = Rates(seeing_inner, [*seeing_rest, *looking.parameters()], args.eyes_rate, args.adam_rate)
    checkpoint = args.out / "checkpoint.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        eyes.load_state_dict(saved["eyes"])
        looking.load_state_dict(saved["looking"])
        step, spent = saved["step"], saved["spent"]
    else:
        with torch.no_grad():  # features as large as embeddings
            wanted, found = network.embed_tokens.square().mean().sqrt(), _size_of_features(eyes)
            eyes.merger.linear_fc2.weight.mul_(wanted / found)
            eyes.merger.linear_fc2.bias.mul_(wanted / found)

    def keep_it() -> None:
        state = {
            "network": network.state_dict(), "eyes": eyes.state_dict(), "looking": looking.state_dict(),
            "step": step, "spent": spent,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        end, pad = number_of(tok, "<|im_end|>"), number_of(tok, "<|endoftext|>")
        network.save(args.out, pad, end, pad, vision=vision)

    seed = (args.seed * 1_000 + team.rank) * 20_003 + step * 7
    packer = Packer(tok, dataset.stream(seed, quotes, long_share=0.02), args.tokens)
    none_rng = random.Random(seed)
    none = Packer(tok, iter(lambda: sights.blind(none_rng), None), 256)
    means = np.full(4, math.nan)
    team.began = time.monotonic() - spent
    last_saved, last_shown = time.monotonic(), 0.0
    while (done := team.done(args.minutes)) < 1:
        rows = rows_of(tok, (args.seed * 20_000_003 + step) * team.size + team.rank, args.rows, quotes)
        ids, mask, keep, target = tensors((rows.ids, rows.own, rows.number))
        about = F.cross_entropy(network(ids, mask, keep, torch.bfloat16, seen=see(eyes, rows)), target)
        torch.autograd.backward(about)
        kept, shapes = means[1], means[3]
        if step % 2:
            directly, right = looking(eyes, look((args.seed * 30_000_001 + step) * team.size + team.rank, 64, 0.0))
            torch.autograd.backward(directly)
            shapes = right[0].item()
        else:
            ids, mask, keep, target = tensors(packer.batch())
            with torch.no_grad():
                wanted = teacher(ids, mask, keep, torch.bfloat16).log_softmax(-1)
            said = network(ids, mask, keep, torch.bfloat16).log_softmax(-1)
            away = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
            torch.autograd.backward(2 * away)
            kept = away.item()
        blind = means[2]
        if step % 4 == 1:
            ids, mask, keep, target = tensors(none.batch())
            unseen = F.cross_entropy(network(ids, mask, keep, torch.bfloat16), target)
            torch.autograd.backward(0.3 * unseen)
            blind = unseen.item()
        share = schedule(done, args.decay) * min(1.0, (step + 1) / 8)
        decoder.step(share, team)
        tower.step(share, team)
        values = np.array([about.item(), kept, blind, shapes])
        means = np.where(np.isnan(means), values, means + 0.05 * (values - means))
        step += 1
        now = time.monotonic()
        spent = now - team.began
        if team.rank:
            continue
        if now - last_shown > 15:
            last_shown = now
            names = ("about pictures", "divergence", "blind", "shapes")
            line = {"step": step} | {name: round(float(m), 4) for name, m in zip(names, means, strict=True)}
            print(json.dumps(line | {"rate": round(share, 3), "minutes": round(spent / 60, 2)}), flush=True)
        if now - last_saved > 120:
            last_saved = now
            keep_it()
    if not team.rank:
        keep_it()
        print(json.dumps({"done": not team.stop, "steps": step}))


def _size_of_features(eyes: Eyes) -> Tensor:
    features: Tensor = eyes(torch.from_numpy(look(5, 32, 0.0)[0]))[0]
    return features.square().mean().sqrt()


if __name__ == "__main__":
    main()
