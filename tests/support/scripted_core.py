"""A core process without a model: the real process, loop and scheduler around a runner that draws ids by a rule.

    python scripted_core.py [--step-s S] [--load-s S] [--fail-load FILE] [--pages FILE] [--poison ID]
                            [--broken ID] --fd N --shared-fd M

The id that follows a sequence is `next_id` of it, so that what a request must answer is known beforehand. A step in
which a request has the poison id among its tokens aborts the process; with the broken id, its logits are faulty. Where
the file of `--fail-load` exists, loading fails with what is in it; where that of `--pages` does, the pool has as many
pages as it says.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import types
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from aiexport_edge.engine.core.pictures import Eyes
from aiexport_edge.engine.core.plan import StepPlan, StepResult
from aiexport_edge.engine.core.protocol import AdapterRoom, CoreConfig, CoreModel, pack_ids
from aiexport_edge.engine.models.vision_config import VisionConfig

NUM_IDS = 90  # the ids drawn are below; with a byte-level tokenizer, printable ASCII
TOKENS_PER_PAGE = 4
NUM_PAGES = 4097


def next_id(ids: list[int]) -> int:
    """The id that follows `ids`."""
    return int.from_bytes(blake2b(pack_ids(ids), digest_size=8).digest(), "little") % NUM_IDS


def undisturbed(prompt: Sequence[int], num_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """The output of a request that nothing disturbs."""
    ids, output = list(prompt), list[int]()
    while len(output) < num_tokens and not (output and output[-1] in stop_ids):
        output.append(next_id(ids + output))
    return output


def command(*options: object) -> tuple[str, ...]:
    """How a backend starts this core."""
    return (sys.executable, str(Path(__file__).resolve()), *map(str, options))


def core_config(*, num_models: int = 1, max_num_running: int = 64) -> CoreConfig:
    """A configuration for it; no directory is read."""
    models = [
        CoreModel(
            name=f"m{index}", path="", dtype="auto", context_window=4096, deterministic=True, revision=f"r{index}"
        )
        for index in range(num_models)
    ]
    return CoreConfig(
        models=models,
        device="cpu",
        page_bytes=0,
        pool_bytes=0,
        max_num_running=max_num_running,
        max_step_tokens=512,
        num_threads=1,
        batch_floor_share=0.05,
    )


# What the scheduler has to know of a tower that sees at no cost.
EYES = Eyes(
    VisionConfig(
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        in_channels=3,
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        out_hidden_size=8,
        num_positions=16,
        deepstack_layers=(),
        rope_theta=10000.0,
        image_token_id=0,
        video_token_id=0,
        vision_start_id=0,
        vision_end_id=0,
    ),
    block_patches=64,
    token_operations=1e9,
    token_bytes=32,
    largest_patches=256,
)


class ScriptedRunner:
    """Draws by the rule; sleeps in each step as a device would compute."""

    def __init__(self, num_models: int, *, step_s: float, poison: int, broken: int, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_bytes = 64
        self.max_step_tokens = 512
        self.tokens_per_page = [TOKENS_PER_PAGE] * num_models
        self.weight_bytes = [0] * num_models
        self.overlaps = False
        self.pace = None
        self.draft_cost = None
        self.eyes = [EYES] * num_models
        self.picture_bytes = 1 << 20
        self.adapter_room = AdapterRoom()
        self._step_s = step_s
        self._poison = poison
        self._broken = broken

    def launch(self, plan: StepPlan) -> StepResult:
        chunks = [chunk for model in plan.models for chunk in model.chunks]
        if any(self._poison in chunk.request.token_ids[: chunk.end] for chunk in chunks):
            os.abort()
        time.sleep(self._step_s)
        drawn = [chunk.request for chunk in chunks if chunk.samples]
        return StepResult(
            {request.handle: [next_id(request.token_ids[:-1])] for request in drawn},
            frozenset(request.handle for request in drawn if self._broken in request.token_ids[:-1]),
        )

    def draw(self, launched: StepResult) -> None:
        """All is drawn at the launch."""

    def collect(self, launched: StepResult) -> StepResult:
        return launched


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--fail-load", type=Path)
    parser.add_argument("--pages", type=Path)
    parser.add_argument("--poison", type=int, default=-1)
    parser.add_argument("--broken", type=int, default=-1)
    options, rest = parser.parse_known_args()

    def load(config: CoreConfig, progress: Any, warming: Any) -> ScriptedRunner:
        progress(0, 1, 2)
        time.sleep(options.load_s)
        warming(3, 4)
        if options.fail_load is not None and options.fail_load.exists():
            raise RuntimeError(options.fail_load.read_text())
        given = options.pages is not None and options.pages.exists()
        num_pages = int(options.pages.read_text()) if given else NUM_PAGES
        return ScriptedRunner(
            len(config.models),
            step_s=options.step_s,
            poison=options.poison,
            broken=options.broken,
            num_pages=num_pages,
        )

    # In the places of the two modules that a real core imports late, for their weight.
    loading = types.ModuleType("aiexport_edge.engine.core.loading")
    loading.load = load  # type: ignore[attr-defined]
    sys.modules["aiexport_edge.engine.core.loading"] = loading
    sys.modules["torch"] = types.ModuleType("torch")
    from aiexport_edge.engine.core.process import main as core_main

    return core_main(rest)


if __name__ == "__main__":
    os._exit(main())
