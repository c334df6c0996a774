"""A mend for adapters in vLLM on a processor, where a token without one would get the last slot's.

vLLM 0.32's torch operations index the slots by a token's number, which is -1 where it has none
(`vllm/lora/ops/torch_ops/lora_ops.py`). Its Triton operations on a card leave such tokens out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SHRINK = "bgmv_shrink"
_MENDED = "_aiexport_edge_mended"


def mend_adapters() -> None:
    """Let tokens without an adapter be, in the vLLM of this process; on a card there is nothing to mend."""
    import vllm

    if not vllm.platforms.current_platform.is_cpu():
        return
    import vllm.lora.ops.torch_ops as exported
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if hasattr(lora_ops, _MENDED):
        return
    mended = without_the_last_slot(lora_ops.bgmv_shrink)
    for module in (lora_ops, exported, punica_cpu):
        setattr(module, SHRINK, mended)
    setattr(lora_ops, _MENDED, True)


def without_the_last_slot(shrink: Callable[..., None]) -> Callable[..., None]:
    """`bgmv_shrink` that leaves zeros for tokens whose slot is negative: what is expanded from them adds nothing."""

    @functools.wraps(shrink)
    def mended(inputs: Any, weights: Any, output: Any, slots: Any, *rest: Any, **named: Any) -> None:
        shrink(inputs, weights, output, slots, *rest, **named)
        output[: slots.shape[0]].masked_fill_((slots < 0)[:, None], 0)

    return mended
