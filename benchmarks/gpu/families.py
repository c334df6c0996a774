"""Part b: models of every family, random weights, against transformers: the same logits and greedy tokens.

In float32, so that the tokens are the same ones; in bfloat16 the logits are to be as near to float32's as transformers'
own are. Each eager, by graphs, batched, chunked and preempted. In deterministic mode all of these give the same bits.
Models that see come after, in `families_vision.py`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiexport_edge.engine.core.kv_memory import KVMemory, ModelNeed, pool_shape
from aiexport_edge.engine.core.protocol import CoreConfig
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.loader import load_model
from benchmarks.gpu import families_vision
from benchmarks.gpu.models import accelerator_for
from benchmarks.gpu.report import Bench
from benchmarks.gpu.sequences import Sequences

PART = "b"
VOCABULARY = 1003
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 700,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 8, "head_dim": 96}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 64}),
    "mistral": ("MistralConfig", {"sliding_window": 100, "head_dim": 128}),
    "qwen2": ("Qwen2Config", {"head_dim": 80}),
    "qwen3": ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": True}),
}
LENGTHS = (1, 5, 37, 130, 300)
NUM_TOKENS = 32


def run(bench: Bench) -> None:
    """A row for each family and dtype."""
    if importlib.util.find_spec("transformers") is None:
        bench.say("b: transformers is not installed; there is nothing to compare with")
        bench.add(PART, "transformers", {"ok": None, "reason": "not installed"})
        return
    for name in ["llama3", "qwen3"] if bench.dry_run else FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            exact = _make(name).to(bench.device)
            exact.save_pretrained(directory)
            _compare_tokens(bench, name, Path(directory), exact)
            _compare_bfloat16(bench, name, Path(directory), exact)
            _compare_bits(bench, name, Path(directory))
    families_vision.run(bench)


def _make(name: str) -> Any:
    import transformers

    config_class, changes = FAMILIES[name]
    config = getattr(transformers, config_class)(**SHAPE | changes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = None, 1, 2
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (1.6 / parameter.shape[1] ** 0.5))
    return model


def _prompts(bench: Bench) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = LENGTHS[:3] if bench.dry_run else LENGTHS
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def _runner(bench: Bench, directory: Path, dtype: str, *, graphed: bool, deterministic: bool = False) -> Runner:
    model = load_model(directory, dtype=dtype, device=bench.device, deterministic=deterministic)
    need = ModelNeed("model", model.config.kv_bytes_per_token(model.dtype.itemsize), model.context_window)
    shape = pool_shape([need], page_bytes=0, pool_bytes=64 << 20, max_num_running=16, available_bytes=0)
    accelerator = accelerator_for(bench)
    config = CoreConfig([], str(bench.device), 0, 0, 16, 1024, 0, 0.0)
    memory = KVMemory(shape, bench.device)
    runner = Runner(config, [model], memory, keep_logits=True, accelerator=accelerator, graphed=graphed)
    runner.warm_up()
    return runner


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """ids and the logits [num_tokens, vocabulary] behind them, by transformers without a cache."""
    ids, logits = list(prompt), []
    for _ in range(num_tokens):
        row = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
        logits.append(row.cpu())
        ids.append(int(row.argmax()))
    return ids[len(prompt) :], torch.stack(logits)


def _scenarios(sequences: Sequences, prompts: list[list[int]], num_tokens: int) -> dict[str, list[Any]]:
    """Requests that have run, by the way that they ran."""
    alone = [sequences.add(prompt) for prompt in prompts]
    for request in alone:
        sequences.run([request], num_tokens)
    batched = [sequences.add(prompt) for prompt in prompts]
    for arrived in range(1, len(batched)):
        sequences.step(batched[:arrived])
    sequences.run(batched, num_tokens)
    chunked = [sequences.add(prompt) for prompt in prompts]
    sequences.run(chunked, num_tokens, chunk=7)
    preempted = [sequences.add(prompt) for prompt in prompts]
    sequences.run(preempted, num_tokens // 2)
    for request in preempted:
        sequences.preempt(request)
    sequences.run(preempted, num_tokens, chunk=23)
    return {"alone": alone, "batched": batched, "chunked": chunked, "preempted": preempted}


def _compare_tokens(bench: Bench, name: str, directory: Path, exact: Any) -> None:
    prompts, num_tokens = _prompts(bench), 6 if bench.dry_run else NUM_TOKENS
    expected = [_greedy(exact, prompt, num_tokens) for prompt in prompts]
    for mode in ("eager", "graphed"):
        sequences = Sequences(_runner(bench, directory, "float32", graphed=mode == "graphed"))
        for scenario, requests in _scenarios(sequences, prompts, num_tokens).items():
            wrong, deviation = 0, 0.0
            for request, (ids, logits) in zip(requests, expected, strict=True):
                ours = request.token_ids[request.num_prompt_tokens :][:num_tokens]
                same = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=True)) if a != b), num_tokens)
                wrong += num_tokens - same
                # The logits are comparable up to the first token that differs, that one's included.
                upto = min(same + 1, num_tokens)
                got = torch.stack(sequences.logits[request.handle][:upto])
                deviation = max(deviation, float((got - logits[:upto]).abs().max()))
            ok = not wrong and deviation < 2e-3
            bench.add(PART, f"{name} float32 {mode} {scenario}", {"wrong": wrong, "deviation": deviation, "ok": ok})


@torch.inference_mode()
def _compare_bfloat16(bench: Bench, name: str, directory: Path, exact: Any) -> None:
    prompt = _prompts(bench)[-1]
    wanted = _greedy(exact, prompt, 1)[1][0]
    theirs = _greedy(exact.to(torch.bfloat16), prompt, 1)[1][0]
    sequences = Sequences(_runner(bench, directory, "bfloat16", graphed=True))
    request = sequences.add(prompt)
    sequences.run([request], 1)
    ours = sequences.logits[request.handle][0]

    def distance(logits: Tensor) -> float:
        return float((logits - wanted).square().mean().sqrt())

    values = {"ours": distance(ours), "transformers": distance(theirs)}
    bench.add(PART, f"{name} bfloat16", {**values, "ok": values["ours"] < 2 * values["transformers"]})


def _compare_bits(bench: Bench, name: str, directory: Path) -> None:
    """Deterministic mode: every logit of every way to run, bit for bit that of the request alone."""
    prompts, num_tokens = _prompts(bench), 6 if bench.dry_run else NUM_TOKENS
    sequences = Sequences(_runner(bench, directory, "bfloat16", graphed=True, deterministic=True))
    scenarios = _scenarios(sequences, prompts, num_tokens)
    alone = [torch.stack(sequences.logits[request.handle][:num_tokens]) for request in scenarios.pop("alone")]
    for scenario, requests in scenarios.items():
        got = [torch.stack(sequences.logits[request.handle][:num_tokens]) for request in requests]
        differing = sum(int((a != b).any(dim=1).sum()) for a, b in zip(got, alone, strict=True))
        row = {"differing": differing, "of": num_tokens * len(prompts), "ok": not differing}
        bench.add(PART, f"{name} bfloat16 deterministic {scenario}", row)
