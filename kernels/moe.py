"""A mixture of experts: which experts a token takes, and their SwiGLU layers on the tokens that took them.

Routing as in Qwen3-MoE and Mixtral (A. Jiang et al., 2024): softmax over all experts, the k largest, their weights made
to sum to one where the model says so. Every token is served: no capacity, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from aiexport_edge.kernels.linear import PackedLinear, round_for_card
from aiexport_edge.kernels.quantization import Weight, dequantized, stack
from aiexport_edge.kernels.swiglu import swiglu

if TYPE_CHECKING:
    from aiexport_edge.kernels.gpu.packed_moe import CardExperts


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
    grouped products, of quantized weights in their own bits. With `deterministic` a token's bits depend on that token
    alone.
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

        In any float dtype or quantized; taken one by one, so that what is read from files need not be there all at
        once. `quantize` as in `PackedLinear`.
        """
        self._deterministic = deterministic
        self._packed: list[tuple[PackedLinear, PackedLinear]] = []
        on_gpu: list[tuple[Weight, Weight]] = []
        for gate_up, down in experts:
            self.hidden_size = down.shape[0]
            if _is_on_card(down):
                on_gpu.append((_as_served(gate_up, dtype, quantize), _as_served([down], dtype, quantize)))
            else:
                pack = partial(PackedLinear, dtype=dtype, deterministic=deterministic, quantize=quantize)
                self._packed.append((pack(gate_up), pack(down)))
        self._stacked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._on_card: CardExperts | None = None
        self.is_decoded = any(product.is_decoded for pair in self._packed for product in pair)
        if on_gpu:
            self._stack(on_gpu, dtype)

    def _stack(self, experts: list[tuple[Weight, Weight]], dtype: torch.dtype) -> None:
        """Lay experts on a GPU one after the other, in their own bits where its products take those."""
        columns = [list(each) for each in zip(*experts, strict=True)]
        experts.clear()
        in_bits = [[weight for weight in column if not isinstance(weight, torch.Tensor)] for column in columns]
        if all(len(of) == len(column) for of, column in zip(in_bits, columns, strict=True)):
            from aiexport_edge.kernels.gpu import packed_moe

            if dtype in packed_moe.DTYPES:
                self._on_card = packed_moe.stack_experts(*in_bits)
        if self._on_card is None:
            self.is_decoded = any(in_bits)
            gate_up, down = ([dequantized(weight, dtype) for weight in column] for column in columns)
            self._stacked = torch.stack(gate_up), torch.stack(down)

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights float32 and experts int32 [T, k] from `route` -> [T, H] in x's dtype."""
        if self._on_card is not None:
            from aiexport_edge.kernels.gpu import packed_moe

            return packed_moe.packed_moe(x, weights, experts, self._on_card, batch_invariant=self._deterministic)
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


def _is_on_card(weight: Weight) -> bool:
    return weight.device.type == "cuda"


def _as_served(parts: Sequence[Weight], dtype: torch.dtype, quantize: str) -> Weight:
    """The parts one below the other in the form that a GPU multiplies, rounded as `quantize` asks."""
    weight = stack(parts, dtype)
    if isinstance(weight, torch.Tensor) and quantize != "none":
        return round_for_card(weight, quantize)
    return weight


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """[T, H] float32 of parts [T, k, H], added from the first to the last."""
    total = parts[:, 0]
    for chosen in range(1, parts.shape[1]):
        total = total + parts[:, chosen]
    return total
