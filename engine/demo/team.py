"""Processes that train together, and the two optimizers that they apply their mean gradients with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from .train import Muon


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
