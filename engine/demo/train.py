"""Train the demo model from nothing on this machine's processor.

``python -m aiexport_edge.engine.demo.train --out DIR --minutes 70``

The tokenizer is trained first where DIR has none. The learning rate warms up, stays, and falls to zero over the last
part of the time; what has been trained is kept in ``DIR/checkpoint.pt``, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from . import dataset
from . import tokenizer as bpe
from .network import Network, Shape
from .variation import Message

Ints = NDArray[np.int64]
LENGTHS = (256, 512, 1024, 2048)
"""Row lengths: a conversation goes into the shortest rows that it fits in, together with others."""


def number_of(tok: Tokenizer, token: str) -> int:
    """The number of a control token."""
    found = tok.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return int(found)


def encode(tok: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """The conversation's tokens as the chat template lays them out, and 1 where the model is to write the token."""
    start, end = number_of(tok, "<|im_start|>"), number_of(tok, "<|im_end|>")
    newline: list[int] = tok.encode("\n", add_special_tokens=False).ids
    ids: list[int] = []
    own: list[int] = []
    for message in messages:
        head = [start, *tok.encode(message["role"] + "\n", add_special_tokens=False).ids]
        body = [*tok.encode(message["content"], add_special_tokens=False).ids, end]
        ids += head + body + newline
        own += [0] * len(head) + [int(message["role"] == "assistant")] * len(body) + [0] * len(newline)
    return ids, own


class Packer:
    """Turns conversations into rows of a fixed length without cutting one."""

    def __init__(self, tok: Tokenizer, conversations: Iterator[list[Message]], tokens: int) -> None:
        self.tok, self.source, self.tokens = tok, conversations, tokens
        self.waiting: dict[int, list[tuple[list[int], list[int]]]] = {length: [] for length in LENGTHS}

    def batch(self) -> tuple[Ints, Ints, Ints]:
        """Tokens, owner flags and conversation numbers (0 = padding), each [rows, length]."""
        while True:
            ids, own = encode(self.tok, next(self.source))
            length = next((n for n in LENGTHS if len(ids) <= n), 0)
            if not length:
                continue
            pile = self.waiting[length]
            pile.append((ids, own))
            if sum(len(i) for i, _ in pile) > 1.25 * self.tokens:
                return self._pack(length)

    def _pack(self, length: int) -> tuple[Ints, Ints, Ints]:
        pile = sorted(self.waiting[length], key=lambda p: -len(p[0]))
        n = max(1, self.tokens // length)
        rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(n)]
        room = [length] * n
        left = []
        for ids, own in pile:
            for i in range(n):
                if len(ids) <= room[i]:
                    rows[i].append((ids, own))
                    room[i] -= len(ids)
                    break
            else:
                left.append((ids, own))
        self.waiting[length] = left
        out = np.zeros((3, n, length), np.int64)
        for i, row in enumerate(rows):
            at = 0
            for number, (ids, own) in enumerate(row, 1):
                out[0, i, at : at + len(ids)] = ids
                out[1, i, at : at + len(ids)] = own
                out[2, i, at : at + len(ids)] = number
                at += len(ids)
        return out[0], out[1], out[2]


def tensors(batch: tuple[Ints, Ints, Ints]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input tokens, attention mask, flat positions that have a loss, and their targets."""
    ids, own, number = (torch.from_numpy(x) for x in batch)
    n = ids.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    mask = ((number[:, :, None] == number[:, None, :]) & causal)[:, None]
    target, wanted = torch.zeros_like(ids), torch.zeros_like(own)
    target[:, :-1], wanted[:, :-1] = ids[:, 1:], own[:, 1:]
    keep = wanted.flatten().nonzero().flatten()
    return ids, mask, keep, target.flatten()[keep]


def orthogonal(g: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices to a batch of matrices, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    result: Tensor = x.mT if tall else x
    return result.float()


class Muon:
    """Momentum whose update of each matrix is orthogonalized, for the matrices inside the layers."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients."""
        for shape, params in self.groups.items():
            grad = torch.stack([p.grad for p in params if p.grad is not None])
            mean = self.state[shape]
            mean.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(mean, self.momentum)) * (max(1.0, shape[0] / shape[1]) ** 0.5)
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - rate * self.decay).add_(u, alpha=-rate)


def schedule(done: float, decay: float) -> float:
    """The share of the full learning rate after this share of the time."""
    return min(1.0, max(0.0, (1 - done) / decay))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=70, help="training time in all, over every run")
    parser.add_argument("--text", type=Path, help="folder of public-domain *.txt that varies what users paste")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--adam-rate", type=float, default=0.004, help="AdamW's, for embeddings and norms")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the time in which the rates fall to zero")
    parser.add_argument("--long-share", type=float, default=0.02, help="share of long conversations at the full rate")
    parser.add_argument("--long-share-late", type=float, default=0.08, help="and once the rate falls below a third")
    parser.add_argument("--start", type=Path, help="begin with the weights of this checkpoint, at time zero")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logit-scale", type=float, default=1.6, help="sharpens what is saved: see Network.save")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers (needs a C++ compiler; a third quicker)"
    )
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(args.seed)
    quotes = dataset.quotes_from(args.text)
    if not (args.out / "tokenizer.json").exists():
        bpe.save(bpe.train(bpe.corpus(40_000, quotes)), args.out)
    tok = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    network = Network(Shape(), args.seed)
    inner = [p for n, p in network.named_parameters() if p.ndim == 2 and n.startswith("layers")]
    outer = [p for n, p in network.named_parameters() if not (p.ndim == 2 and n.startswith("layers"))]
    muon = Muon([*inner])
    adam = torch.optim.AdamW(outer, lr=args.adam_rate, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True)
    if args.compile:
        for layer in network.layers:
            layer.compile(dynamic=False)
    step, spent, seen = 0, 0.0, 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists() or args.start:
        saved = torch.load(checkpoint if checkpoint.exists() else args.start, weights_only=True)
        network.load_state_dict(saved["network"])
        adam.load_state_dict(saved["adam"])
        muon.state = dict(zip(muon.state, saved["muon"], strict=True))
        seen, step = saved["seen"], saved["step"]
        spent = saved["spent"] if checkpoint.exists() else 0.0

    def keep_it() -> None:
        state = {
            "network": network.state_dict(), "adam": adam.state_dict(), "muon": list(muon.state.values()),
            "step": step, "spent": spent, "seen": seen,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        end, pad = number_of(tok, "<|im_end|>"), number_of(tok, "<|endoftext|>")
        network.save(args.out, pad, end, pad, logit_scale=args.logit_scale)

    total = args.minutes * 60
    late = False
    packer = Packer(tok, dataset.stream(args.seed * 1_000_003 + step, quotes, long_share=args.long_share), args.tokens)
    mean, began, last_saved, last_shown = math.nan, time.monotonic(), time.monotonic(), 0.0
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    while spent < total and not stop:
        t0 = time.monotonic()
        share = schedule(spent / total, args.decay)
        if share < 1 / 3 and not late:
            late = True
            packer.source = dataset.stream(args.seed * 1_000_003 + step + 1, quotes, long_share=args.long_share_late)
        ids, mask, keep, target = tensors(packer.batch())
        loss = F.cross_entropy(network(ids, mask, keep, torch.float32 if args.fp32 else torch.bfloat16), target)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(outer, 1.0)
        warm = min(1.0, (step + 1) / 50)
        for group in adam.param_groups:
            group["lr"] = args.adam_rate * share * warm
        adam.step()
        muon.step(args.rate * share * warm)
        for p in network.parameters():
            p.grad = None
        step += 1
        seen += ids.numel()
        value = loss.item()
        mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
        now = time.monotonic()
        spent += now - t0
        if now - last_shown > 10 or spent >= total:
            last_shown = now
            line = {
                "step": step, "loss": round(mean, 4), "rate": round(share * warm, 3), "tokens": seen,
                "per_second": round(ids.numel() / (now - t0)),
                "minutes": round(spent / 60, 2), "left": round((total - spent) / 60, 2),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        if now - last_saved > 120:
            last_saved = now
            keep_it()
    keep_it()
    print(json.dumps({"done": not stop, "steps": step, "tokens": seen, "wall": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
