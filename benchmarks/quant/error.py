"""How far a model in few bits is from the same model in its own dtype, on texts of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiexport_edge.engine.core.kv_memory import KVMemory, PoolShape
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import LoadedModel, load_model

FORMS: dict[str, dict[str, str]] = {
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "fp8": {"quantize": "fp8"},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
    "int4 + fp8 KV": {"quantize": "int4", "kv_cache_dtype": "fp8"},
}


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids; what follows `num_prompt` of them was drawn at temperature 1 from the model in its own dtype."""

    ids: Tensor
    num_prompt: int


def logits_of(model: LoadedModel, ids: Tensor) -> Tensor:
    """float32 [tokens, vocabulary], each token's after those before it."""
    length, config = ids.shape[0], model.config
    page_bytes = config.kv_bytes_per_token(model.kv_dtype.itemsize) * length
    memory = KVMemory(PoolShape(page_bytes, 2, (length,)), torch.device("cpu"))
    caches = memory.layers(
        0,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.kv_dtype,
    )
    batch = Batch(
        input_ids=ids,
        inputs_embeds=None,
        positions=torch.arange(length).expand(3, -1),
        slots=length + torch.arange(length),
        block_tables=torch.ones(1, 1, dtype=torch.int32),
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        rows=None,
    )
    return model.decoder.logits(model.decoder.forward(batch, caches))


def drawn_texts(model: LoadedModel, *, number: int, length: int) -> list[Text]:
    """Texts of `length` tokens from random first tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(number):
        ids = torch.randint(10, model.config.vocab_size // 2, (4,), generator=generator)
        while ids.shape[0] < length:
            probabilities = torch.softmax(logits_of(model, ids)[-1], dim=-1)
            ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)))
        texts.append(Text(ids, 4))
    return texts


def greedy(model: LoadedModel, prompt: Tensor, num_tokens: int) -> Tensor:
    """What the model goes on with at temperature 0."""
    ids = prompt
    for _ in range(num_tokens):
        ids = torch.cat((ids, logits_of(model, ids)[-1].argmax(-1, keepdim=True)))
    return ids[prompt.shape[0] :]


@torch.inference_mode()
def measure(directory: Path, *, number: int, length: int, num_greedy: int) -> list[dict[str, Any]]:
    """A row for each of FORMS: divergence in nats of the next token's distribution, agreement of the likeliest token,
    and of greedy continuations the share of tokens before they part.
    """
    plain = load_model(directory)
    texts = drawn_texts(plain, number=number, length=length)
    wanted = [torch.log_softmax(logits_of(plain, text.ids), dim=-1) for text in texts]
    replies = [greedy(plain, text.ids[: length // 2], num_greedy) for text in texts]
    rows = []
    for name, options in FORMS.items():
        model = load_model(directory, **options)  # type: ignore[arg-type]
        divergences, agreements, shared = [], [], 0
        for text, before, reply in zip(texts, wanted, replies, strict=True):
            after = torch.log_softmax(logits_of(model, text.ids), dim=-1)
            divergences.append((before.exp() * (before - after)).sum(-1)[text.num_prompt :])
            agreements.append((before.argmax(-1) == after.argmax(-1))[text.num_prompt :].float())
            parted = greedy(model, text.ids[: length // 2], num_greedy) != reply
            shared += int(parted.int().argmax()) if bool(parted.any()) else num_greedy
        divergence = torch.cat(divergences)
        rows.append(
            {
                "model": directory.name if directory.name != "model" else "demo",
                "dtype": str(plain.dtype).removeprefix("torch."),
                "form": name,
                "tokens": divergence.shape[0],
                "kl_mean": round(float(divergence.mean()), 5),
                "kl_p99": round(float(divergence.quantile(0.99)), 4),
                "top1_agreement": round(float(torch.cat(agreements).mean()), 4),
                "greedy_shared": round(shared / (num_greedy * len(texts)), 4),
            }
        )
    return rows
