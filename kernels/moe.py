"""A mixture of experts: which experts a token takes, and their SwiGLU layers on the tokens that took them.

Routing as in Qwen3-MoE and Mixtral (A. Jiang et al., 2024): softmax over all experts, the k largest, their weights made
to sum to one where the model says so. Every token is served: no capacity, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.quantization import Weight, dequantized
from aiexport_edge.kernels.swiglu import swiglu


def route_reference(logits: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, top_k], experts int32 [T, top_k]) of router logits [T, E], the largest weight first.

    Of experts with equal weights the lower one goes first. float32 inside. `normalize`: a token's weights sum to one.
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    ordered, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.contiguous(), experts[:, :top_k].to(torch.int32).contiguous()


def route(logits: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `route_reference`."""
    if logits.is_cuda:
        from aiexport_edge.kernels.gpu import moe as gpu

        return gpu.route(logits, top_k, normalize=normalize)
    return route_reference(logits, top_k, normalize=normalize)


def moe_mlp_reference(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The chosen experts' layers of each token, weighted and summed: [T, H] in x's dtype.

    x [T, H]; weights float32 and experts int32 [T, k] from `route`; gate_up [E, 2*I, H], each expert's gate rows first;
    down [E, H, I]. float32 inside, but for what a token's expert layer is between its two products: in x's dtype. The
    sum runs in the order of a token's experts.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for chosen in range(experts.shape[1]):
        for expert in sorted(set(experts[:, chosen].tolist())):
            tokens = (experts[:, chosen] == expert).nonzero()[:, 0]
            gate, up = (x[tokens].float() @ gate_up[expert].float().t()).chunk(2, dim=-1)
            inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            out[tokens] += weights[tokens, chosen, None] * (inner.float() @ down[expert].float().t())
    return out.to(x.dtype)


class Experts:
    """The experts of a layer, packed for the device: `moe_mlp_reference` with weights of its own.

    On a CPU only the experts that a token chose are read, each once, by products as in `PackedLinear`; on a GPU by
    grouped products. With `deterministic` a token's bits depend on that token alone.
    """

    def __init__(
        self,
        experts: Iterable[tuple[Sequence[Weight], Weight]],
        *,
        dtype: torch.dtype,
        deterministic: bool,
        quantize: str = "none",
    ) -> None:
        """`experts`: of each, the parts of gate_up [2*I, H] to be stacked (gate rows first), and down [H, I].

        In any float dtype or quantized (a GPU decodes those into `dtype`); taken one by one, so that what is read from
        files need not be there all at once.
        """
        self._deterministic = deterministic
        self._packed: list[tuple[PackedLinear, PackedLinear]] = []
        on_gpu: list[tuple[torch.Tensor, torch.Tensor]] = []
        for gate_up, down in experts:
            self.hidden_size = down.shape[0]
            if down.device.type == "cuda":
                assert quantize == "none", "experts are quantized on CPUs only"
                parts = [dequantized(part, dtype) for part in gate_up]
                on_gpu.append((torch.cat(parts), dequantized(down, dtype)))
            else:
                pack = partial(PackedLinear, dtype=dtype, deterministic=deterministic, quantize=quantize)
                self._packed.append((pack(gate_up), pack(down)))
        self._stacked = tuple(torch.stack(each) for each in zip(*on_gpu, strict=True)) if on_gpu else None

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights float32 and experts int32 [T, k] from `route` -> [T, H] in x's dtype."""
        if self._stacked is not None:
            from aiexport_edge.kernels.gpu import moe as gpu

            return gpu.moe_mlp(x, weights, experts, *self._stacked, batch_invariant=self._deterministic)
        num_tokens, top_k = experts.shape
        slots = experts.flatten()
        order = torch.argsort(slots, stable=True)
        counts = torch.bincount(slots, minlength=len(self._packed)).tolist()
        parts = torch.empty((num_tokens * top_k, self.hidden_size), dtype=torch.float32)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                gate_up, down = self._packed[expert]
                chosen = order[start : start + count]
                parts[chosen] = down(swiglu(gate_up(x[chosen // top_k])), out_dtype=torch.float32)
                start += count
        parts *= weights.reshape(-1, 1)
        return _sum_in_order(parts.view(num_tokens, top_k, -1)).to(x.dtype)


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """[T, H] float32 of parts [T, k, H], added from the first to the last."""
    total = parts[:, 0]
    for chosen in range(1, parts.shape[1]):
        total = total + parts[:, chosen]
    return total
