"""What others reach in part d: the same shapes, random weights, greedy decoding, in the same run on the same card.

transformers' `generate` and its continuous batching (`generate_batch`), and vLLM with dummy weights: each where it is
installed. Seconds a decode step are the difference of two runs, one of which stops at its first token; continuous
batching's start takes seconds and varies, so there they come from its tokens' timestamps.

`python -m benchmarks.gpu.peers CONFIG_DIRECTORY POINTS` is the process that measures vLLM, which takes the card whole.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import ROOT, Bench

POINTS = ((1, 1024), (32, 1024))  # batch, context
DRY_POINTS = ((1, 20),)
STEPS = 32
PAGE_SIZE = 256  # tokens, transformers' own default
BATCH_TOKENS = 4096  # of a step of its continuous batching
VLLM_TIMEOUT_S = 240


@torch.inference_mode(False)  # its continuous batching runs in a thread of its own, on tensors that it makes here
def run_transformers(bench: Bench, part: str, name: str, values: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows of `generate` and of `generate_batch`."""
    if importlib.util.find_spec("transformers") is None:
        bench.say(f"{part}: transformers is not installed")
        return
    import transformers

    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch comes: each of our accelerators turns it off
    settings = {key: value for key, value in values.items() if key not in ("architectures", "torch_dtype")}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    with torch.device(bench.device):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(transformers.Qwen3Config(**settings), dtype=dtype).eval()
    points, steps = (DRY_POINTS, 3) if bench.dry_run else (POINTS, STEPS)
    for batch, context in points:
        prompt = torch.randint(3, 200, (batch, context), device=bench.device)

        def generate(count: int, prompt: torch.Tensor = prompt) -> None:
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

        def step(generate: Callable[[int], None] = generate) -> float:
            return _step_seconds(generate, steps, bench.synchronize)

        _add(bench, part, f"{name} transformers decode B{batch} {context}", batch, step)
    cache_config: Any = transformers.ContinuousBatchingConfig
    names = {field.name for field in dataclasses.fields(cache_config)}
    page_size = "page_size" if "page_size" in names else "block_size"  # as older releases call it
    for batch, context in points:
        prompts = torch.randint(3, 200, (batch, context)).tolist()

        options = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=1 + steps, do_sample=False, eos_token_id=-1, pad_token_id=0
        )

        num_blocks = batch * (-(-(context + 1 + steps) // PAGE_SIZE) + 1)

        def decode(prompts: list[list[int]] = prompts, options: Any = options, num_blocks: int = num_blocks) -> float:
            cache = cache_config(**{page_size: PAGE_SIZE, "num_blocks": num_blocks, "max_batch_tokens": BATCH_TOKENS})
            replies = model.generate_batch(
                prompts, generation_config=options, continuous_batching_config=cache, record_timestamps=True
            ).values()
            made = {len(reply.generated_tokens) for reply in replies}
            if made != {1 + steps}:
                raise RuntimeError(f"generate_batch made {made} tokens, not {1 + steps}")
            return _seconds_a_step([reply.timestamps for reply in replies])

        _add(bench, part, f"{name} transformers continuous B{batch} {context}", batch, decode)


def run_vllm(bench: Bench, part: str, name: str, values: dict[str, Any]) -> None:
    """Rows of vLLM in a process of its own."""
    if importlib.util.find_spec("vllm") is None or bench.dry_run:
        bench.say(f"{part}: vLLM is not installed" if not bench.dry_run else f"{part}: no vLLM on a dry run")
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(values))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu.peers", directory, json.dumps(POINTS)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=VLLM_TIMEOUT_S,
                check=True,
            )
        except subprocess.SubprocessError as error:
            bench.add(part, f"{name} vllm", {"error": f"{type(error).__name__}: {getattr(error, 'stderr', '')}"[-400:]})
            return
    for (batch, context), seconds in zip(POINTS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        bench.add(part, f"{name} vllm decode B{batch} {context}", {"tokens_s": batch / seconds})


def _add(bench: Bench, part: str, name: str, batch: int, step_seconds: Callable[[], float]) -> None:
    """A row; what the peer can't do here is said in it and fails nothing of ours."""
    try:
        row: dict[str, float | str] = {"tokens_s": batch / step_seconds()}
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:300]}
    bench.add(part, name, row)


def _seconds_a_step(timestamps: list[list[float]]) -> float:
    """While all requests decode: from the latest first token to the earliest last one."""
    began, ended = max(times[0] for times in timestamps), min(times[-1] for times in timestamps)
    num_steps = sum(began < at <= ended for at in timestamps[0])
    return (ended - began) / num_steps


def _step_seconds(generate: Callable[[int], None], steps: int, synchronize: Callable[[], None]) -> float:
    generate(2)
    times = []
    for count in (1, 1 + steps):
        synchronize()
        began = time.perf_counter()
        generate(count)
        synchronize()
        times.append(time.perf_counter() - began)
    return max(times[1] - times[0], 1e-9) / steps


def main() -> None:
    """vLLM's process: prints the seconds of a step at each point."""
    directory, points = sys.argv[1], [tuple(point) for point in json.loads(sys.argv[2])]
    import vllm  # type: ignore[import-not-found, unused-ignore]

    longest = max(context for _, context in points) + 2 * STEPS
    engine = vllm.LLM(
        model=directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=max(batch for batch, _ in points),
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
    )
    seconds = []
    for batch, context in points:
        prompts = [{"prompt_token_ids": torch.randint(3, 200, (context,)).tolist()} for _ in range(batch)]

        def generate(count: int, prompts: list[dict[str, list[int]]] = prompts) -> None:
            options = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            engine.generate(prompts, options, use_tqdm=False)

        seconds.append(_step_seconds(generate, STEPS, lambda: None))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
