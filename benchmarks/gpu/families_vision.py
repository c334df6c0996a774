"""Part b, models that see: Qwen3-VL, dense and a mixture, random weights, against transformers.

Through the real scheduler, encoder and pipeline: pictures of several sizes among text-only requests, prefills that cut
pictures in two, pages found again, few enough of them that requests push each other out. In float32 the same tokens and
logits; in bfloat16 logits as near to float32's as transformers' own are, and in deterministic mode the same bits.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aiexport_edge.engine.core.kv_memory import KVMemory, ModelNeed, pool_shape
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.protocol import AddRequest, CoreConfig, ImageInput, Sampling, pack_ids
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects
from aiexport_edge.engine.images.patches import patches
from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.models.loader import load_model
from benchmarks.gpu.models import accelerator_for
from benchmarks.gpu.report import Bench

PART = "b"
VOCABULARY, IMAGE, VIDEO, START, END = 1003, 990, 991, 992, 993
PATCH, MERGE = 16, 2
NUM_TOKENS = 32
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 700,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
MIXTURE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}
VISION = {
    "depth": 4,
    "hidden_size": 144,  # heads of 72, as the larger towers have them
    "intermediate_size": 300,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 256,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 2],
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
PREPROCESSOR = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 1024, "longest_edge": 64 * 64 * PATCH**2},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
FAMILIES = ("qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: list[int]
    images: list[ImageInput]


class _Nobody(Suspects):
    """Nobody watches here."""

    def __init__(self) -> None:
        pass

    def write(self, handles: list[int]) -> None:
        pass


def run(bench: Bench) -> None:
    """Rows for each family."""
    for name in FAMILIES[:1] if bench.dry_run else FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            exact = _make(name).to(bench.device)
            exact.save_pretrained(directory)
            (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
            prompts = _prompts(bench)
            _compare_tokens(bench, name, directory, exact, prompts)
            _compare_bfloat16(bench, name, directory, exact, prompts)
            _compare_bits(bench, name, directory, prompts)


def _make(name: str) -> Any:
    transformers: Any = importlib.import_module("transformers")
    if name == "qwen3_vl":
        config = transformers.Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **IDS)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        config = transformers.Qwen3VLMoeConfig(
            text_config=TEXT | MIXTURE, vision_config=VISION, tie_word_embeddings=False, **IDS
        )
        model = transformers.Qwen3VLMoeForConditionalGeneration(config)
        model.set_experts_implementation("eager")  # grouped products are made for bfloat16
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                parameter.copy_(noise * (1.6 / fan_in**0.5))
    return model.float().eval()


def _prompts(bench: Bench) -> list[_Prompt]:
    """One picture, three of different sizes, one of an earlier turn, the same one again, none."""
    draw = np.random.default_rng(3)
    small = bench.dry_run

    def text(length: int) -> list[int]:
        return [int(i) for i in draw.integers(3, 980, length)]

    def picture(rows: int, columns: int) -> ImageInput:
        if small:
            rows, columns = max(2, rows // 8 * 2), max(2, columns // 8 * 2)
        pixels = draw.integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8).tobytes()
        digest = hashlib.blake2b(b"%d %d " % (rows, columns) + pixels, digest_size=32).digest()
        return ImageInput(0, rows, columns, digest, pixels)

    def prompt(*parts: list[int] | ImageInput) -> _Prompt:
        ids: list[int] = []
        images: list[ImageInput] = []
        for part in parts:
            if isinstance(part, ImageInput):
                images.append(ImageInput(len(ids) + 1, part.rows, part.columns, part.digest, part.pixels))
                ids += [START, *[IMAGE] * (part.rows * part.columns // MERGE**2), END]
            else:
                ids += part
        return _Prompt(ids, images)

    beginning, large = text(40), picture(48, 40)
    return [
        prompt(beginning, large, text(20)),
        prompt(text(5), picture(8, 8), text(3), picture(20, 12), picture(4, 30), text(9)),
        prompt(text(5), picture(16, 16), text(150)),
        prompt(beginning, large, text(33)),
        prompt(text(70)),
    ]


def _runner(bench: Bench, directory: Path, dtype: str, *, graphed: bool, deterministic: bool, num_pages: int) -> Runner:
    model = load_model(directory, dtype=dtype, device=bench.device, deterministic=deterministic)
    need = ModelNeed("model", model.config.kv_bytes_per_token(model.dtype.itemsize), model.context_window)
    page_bytes = 16 * need.kv_bytes_per_token
    shape = pool_shape(
        [need], page_bytes=page_bytes, pool_bytes=num_pages * page_bytes, max_num_running=8, available_bytes=0
    )
    config = CoreConfig([], str(bench.device), 0, 0, 8, 256, 0, 0.0)
    runner = Runner(
        config,
        [model],
        KVMemory(shape, bench.device),
        keep_logits=True,
        accelerator=accelerator_for(bench),
        graphed=graphed,
    )
    runner.warm_up()
    return runner


def _answers(
    runner: Runner, prompts: list[_Prompt], num_tokens: int, *, max_step_tokens: int, together: bool
) -> tuple[list[list[int]], list[Tensor], int]:
    """Ids and float32 logits [num_tokens, vocabulary] of each prompt, and how often one was pushed out."""
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=["a"],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=max_step_tokens,
        batch_floor_share=0.0,
        pictures=Pictures(runner.eyes, capacity_bytes=runner.picture_bytes),
    )
    pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=_Nobody())
    logits: dict[int, list[Tensor]] = {}
    requests = []

    def finish() -> None:
        while pipeline.busy:
            pipeline.advance()
            for handle, row in runner.last_logits.items():
                logits.setdefault(handle, []).append(row.cpu())
            runner.last_logits.clear()  # where steps overlap, the last round launches none

    for handle, given in enumerate(prompts):
        message = AddRequest(
            handle=handle,
            model=0,
            prompt_ids=pack_ids(given.ids),
            output_ids=b"",
            max_tokens=num_tokens,
            stop_ids=[],
            sampling=Sampling(0.0, 1.0, 0, 0),
            tenant="",
            weight=1.0,
            salt=b"",
            priority=0,
            images=given.images,
        )
        requests.append(make_request(message, arrival=handle, merge_size=MERGE))
        scheduler.add(requests[-1])
        if not together:
            finish()
    finish()
    ids = [request.token_ids[request.num_prompt_tokens :] for request in requests]
    return ids, [torch.stack(logits[handle]) for handle in range(len(prompts))], scheduler.num_preemptions


@torch.inference_mode()
def _expected(model: Any, directory: Path, given: _Prompt, num_tokens: int) -> tuple[list[int], Tensor]:
    ids = torch.tensor([given.ids], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if given.images:
        config, parts = load_patch_config(directory), []
        for image in given.images:
            pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.rows * PATCH, image.columns * PATCH, 3)
            parts.append(torch.from_numpy(patches(pixels, config)[0]))
        inputs["pixel_values"] = torch.cat(parts).to(model.device, model.dtype)
        inputs["image_grid_thw"] = torch.tensor([(1, i.rows, i.columns) for i in given.images], device=model.device)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers since 5.3
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    output = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(given.ids) :].tolist(), torch.cat(output.logits).float().cpu()


def _compare_tokens(bench: Bench, name: str, directory: Path, exact: Any, prompts: list[_Prompt]) -> None:
    num_tokens = 6 if bench.dry_run else NUM_TOKENS
    expected = [_expected(exact, directory, given, num_tokens) for given in prompts]
    longest = max(len(given.ids) for given in prompts) + num_tokens
    few = -(-longest // 16) + 3
    for mode in ("graphed",) if bench.dry_run else ("eager", "graphed"):
        for scenario, step_tokens, num_pages, together in (
            ("alone", 256, 400, False),
            ("together, pictures cut", 50, 400, True),
            ("famine", 50, few, True),
        ):
            runner = _runner(
                bench, directory, "float32", graphed=mode == "graphed", deterministic=False, num_pages=num_pages
            )
            ids, logits, num_preemptions = _answers(
                runner, prompts, num_tokens, max_step_tokens=step_tokens, together=together
            )
            wrong, deviation = 0, 0.0
            for ours, got, (theirs, wanted) in zip(ids, logits, expected, strict=True):
                same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), num_tokens)
                wrong += num_tokens - same
                upto = min(same + 1, num_tokens)
                deviation = max(deviation, float((got[:upto] - wanted[:upto]).abs().max()))
            row = {"wrong": wrong, "deviation": deviation, "preemptions": num_preemptions}
            bench.add(PART, f"{name} float32 {mode} {scenario}", row | {"ok": not wrong and deviation < 2e-3})


def _compare_bfloat16(bench: Bench, name: str, directory: Path, exact: Any, prompts: list[_Prompt]) -> None:
    wanted = _expected(exact, directory, prompts[1], 1)[1][0]
    theirs = _expected(exact.to(torch.bfloat16), directory, prompts[1], 1)[1][0]
    runner = _runner(bench, directory, "bfloat16", graphed=True, deterministic=False, num_pages=400)
    ours = _answers(runner, prompts[1:2], 1, max_step_tokens=256, together=False)[1][0][0]

    def distance(logits: Tensor) -> float:
        return float((logits - wanted).square().mean().sqrt())

    values = {"ours": distance(ours), "transformers": distance(theirs)}
    bench.add(PART, f"{name} bfloat16", {**values, "ok": values["ours"] < 2 * values["transformers"]})


def _compare_bits(bench: Bench, name: str, directory: Path, prompts: list[_Prompt]) -> None:
    num_tokens = 6 if bench.dry_run else NUM_TOKENS
    seen = []
    for step_tokens, together in ((256, False), (50, True)):
        runner = _runner(bench, directory, "bfloat16", graphed=True, deterministic=True, num_pages=400)
        seen.append(_answers(runner, prompts, num_tokens, max_step_tokens=step_tokens, together=together)[1])
    differing = sum(int((a != b).any(dim=1).sum()) for a, b in zip(*seen, strict=True))
    row = {"differing": differing, "of": num_tokens * len(prompts), "ok": not differing}
    bench.add(PART, f"{name} bfloat16 deterministic", row)
