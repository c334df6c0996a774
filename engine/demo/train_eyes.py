"""Give the demo model eyes: train a vision tower and teach the trained decoder to speak of what it sees.

``python -m aiexport_edge.engine.demo.train_eyes --start DIR --out DIR2 --look 20 --minutes 40``

First the tower learns alone to tell shapes, colors and backgrounds apart (``--look`` minutes), then tower and decoder
learn together from conversations about pictures. So that the decoder keeps what it knows, a part of each batch is
conversations without pictures in which it is held to what the model in ``--start`` would say (the divergence of the
two distributions, token by token); the tower goes on being asked directly. What has been trained is kept in
``DIR2/eyes.pt`` and ``DIR2/checkpoint.pt``.

``--resume MODEL`` goes on from a finished model instead, or from the checkpoint of one, with a new ``--seed`` for new
pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, distributed

from aiexport_edge.engine.images.positions import ImageSpan, prompt_positions

from . import dataset, sights
from . import tokenizer as bpe
from .eyes import PATCHES, Eyes, EyesShape
from .looking import Bytes, Ints, Looking, fit, learn_to_look, learn_to_tell, look
from .network import Network, Seen, Shape, Vision
from .pictures import seen, size_of
from .sights import Talk
from .team import Rates, Team, split
from .train import Packer, encode, number_of, schedule, tensors

ROW = 256
"""Tokens in a row of conversations about pictures."""


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


def rows_of(tok: Tokenizer, seed: int, rows: int, quotes: list[str], wide: float = 0.0) -> Rows:
    """Full rows of conversations about pictures, a share ``wide`` of them drawn as wide apart as pictures come."""
    rng = random.Random(seed)
    sizes = [size_of(rng, wide=0.6 * wide) for _ in range(5)]
    out = np.zeros((3, rows, ROW), np.int64)
    positions = np.zeros((3, rows, ROW), np.int64)
    used = [0] * rows
    count = [0] * rows
    found: dict[tuple[int, ...], list[tuple[Bytes, Ints]]] = {}
    misses = 0
    while misses < 6:
        talk = sights.talk(rng, sizes, quotes, wide=wide)
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--start", type=Path, required=True, help="directory of the model whose decoder and talk to keep"
    )
    parser.add_argument(
        "--resume", type=Path, help="go on from this: a model with eyes (its directory) or checkpoint.pt"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--look", type=float, default=20, help="minutes in which the tower learns alone")
    parser.add_argument("--look-start", type=Path, help="begin with this tower: the eyes.pt of an earlier training")
    parser.add_argument("--minutes", type=float, default=40, help="minutes in which tower and decoder learn together")
    parser.add_argument("--text", type=Path, help="folder of public-domain *.txt that varies what users paste")
    parser.add_argument("--processes", type=int, default=2, help="that train together")
    parser.add_argument("--wide", type=float, default=0.5, help="share of pictures drawn as wide apart as they come")
    parser.add_argument("--sums", type=float, default=0.2, help="share of the talk without pictures that only adds")
    parser.add_argument("--keep", type=float, default=2.0, help="weight of the divergence from the model in --start")
    parser.add_argument("--logit-scale", type=float, default=1.0, help="sharpens what is saved: see Network.save")
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
    spoken = args.resume or (args.out / "checkpoint.pt").exists()  # then the tower comes together with the decoder
    if not spoken and looked.exists():
        saved = torch.load(looked, weights_only=True)
        eyes.load_state_dict(saved["eyes"])
        looking.load_state_dict(saved["looking"])
    elif not spoken:
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
        step, spent = restore(checkpoint, network, eyes, looking)
    elif args.resume and args.resume.is_dir():
        network.load(args.resume)
        eyes.load(args.resume)
        learn_to_tell(eyes, looking, args.wide)
    elif args.resume:
        restore(args.resume, network, eyes, looking)
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
        network.save(args.out, pad, end, pad, logit_scale=args.logit_scale, vision=vision)

    seed = (args.seed * 1_000 + team.rank) * 20_003 + step * 7
    packer = Packer(tok, dataset.stream(seed, quotes, long_share=0.02, sums=args.sums), args.tokens)
    none_rng = random.Random(seed)
    none = Packer(tok, iter(lambda: sights.blind(none_rng), None), 256)
    means = np.full(4, math.nan)
    team.began = time.monotonic() - spent
    last_saved, last_shown = time.monotonic(), 0.0
    while (done := team.done(args.minutes)) < 1:
        rows = rows_of(tok, (args.seed * 20_000_003 + step) * team.size + team.rank, args.rows, quotes, args.wide)
        ids, mask, keep, target = tensors((rows.ids, rows.own, rows.number))
        about = F.cross_entropy(network(ids, mask, keep, torch.bfloat16, seen=see(eyes, rows)), target)
        torch.autograd.backward(about)
        number = (args.seed * 30_000_001 + step) * team.size + team.rank
        directly, right = looking(eyes, look(number, 64, 0.0, args.wide))
        torch.autograd.backward(directly)
        ids, mask, keep, target = tensors(packer.batch())
        with torch.no_grad():
            wanted = teacher(ids, mask, keep, torch.bfloat16).log_softmax(-1)
        said = network(ids, mask, keep, torch.bfloat16).log_softmax(-1)
        away = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
        torch.autograd.backward(args.keep * away)
        blind = means[2]
        if step % 4 == 1:
            ids, mask, keep, target = tensors(none.batch())
            unseen = F.cross_entropy(network(ids, mask, keep, torch.bfloat16), target)
            torch.autograd.backward(0.3 * unseen)
            blind = unseen.item()
        share = schedule(done, args.decay) * min(1.0, (step + 1) / 8)
        decoder.step(share, team)
        tower.step(share, team)
        values = np.array([about.item(), away.item(), blind, right[0].item()])
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


def restore(checkpoint: Path, network: Network, eyes: Eyes, looking: Looking) -> tuple[int, float]:
    """Take what a training has kept: its steps and the seconds that it has spent."""
    saved = torch.load(checkpoint, weights_only=True)
    network.load_state_dict(saved["network"])
    eyes.load_state_dict(saved["eyes"])
    looking.load_state_dict(saved["looking"])
    return saved["step"], saved["spent"]


def _size_of_features(eyes: Eyes) -> Tensor:
    features: Tensor = eyes(torch.from_numpy(look(5, 32, 0.0)[0]))[0]
    return features.square().mean().sqrt()


if __name__ == "__main__":
    main()
