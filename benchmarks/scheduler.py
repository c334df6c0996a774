"""What the core's bookkeeping costs a step, without a device: `python -m benchmarks.scheduler [--json]`.

A step is the plan and the commit of N decodes over three models and forty tenants, while 2,000 more requests wait; now
and then one ends and the next is admitted; their ids are looked at for drafts, as on a card. Medians, and the 99th
percentile of both together, in microseconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

from aiexport_edge.engine.core.commit import commit
from aiexport_edge.engine.core.drafts import DraftCost
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.plan import StepPlan, StepResult
from aiexport_edge.engine.core.protocol import AddRequest, Priority, Sampling, encode_from_core, pack_ids
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.scheduler import Scheduler

NUM_MODELS = 3
NUM_TENANTS = 40
NUM_WAITING = 2_000
NUM_PROMPT_TOKENS = 200
MAX_TOKENS = 700
TOKENS_PER_PAGE = 16


def main() -> None:
    """Print one row for each number of running requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256], help="requests in a step")
    parser.add_argument("--steps", type=int, default=1_000, help="steps to measure")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    arguments = parser.parse_args()
    rows = [measure(num_running, arguments.steps) for num_running in arguments.running]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'running':>8} {'plan':>8} {'commit':>8} {'step p50':>9} {'step p99':>9}   µs")
    for row in rows:
        print(
            f"{row['running']:>8.0f} {row['plan_us']:>8.0f} {row['commit_us']:>8.0f} "
            f"{row['step_us']:>9.0f} {row['step_p99_us']:>9.0f}"
        )


def measure(num_running: int, num_steps: int) -> dict[str, float]:
    """Times of one number of running requests; the report's encoding counts as commit."""
    scheduler = Scheduler(
        PagePool(2 + 2 * num_running * (NUM_PROMPT_TOKENS + MAX_TOKENS) // TOKENS_PER_PAGE),
        revisions=[f"revision {model}" for model in range(NUM_MODELS)],
        tokens_per_page=[TOKENS_PER_PAGE] * NUM_MODELS,
        max_num_running=num_running,
        max_step_tokens=8_192,
        batch_floor_share=0.1,
        draft_cost=DraftCost(100.0, (math.inf,) * NUM_MODELS, num_running),
    )
    for handle in range(num_running + NUM_WAITING):
        scheduler.add(make_request(_request(handle), arrival=handle))
    while scheduler.num_running < num_running:
        _step(scheduler)
    plans, commits = [], []
    for _ in range(num_steps):
        plan_s, commit_s = _step(scheduler)
        plans.append(plan_s * 1e6)
        commits.append(commit_s * 1e6)
    steps = sorted(map(sum, zip(plans, commits, strict=True)))
    return {
        "running": num_running,
        "plan_us": round(statistics.median(plans), 1),
        "commit_us": round(statistics.median(commits), 1),
        "step_us": round(statistics.median(steps), 1),
        "step_p99_us": round(steps[len(steps) * 99 // 100], 1),
    }


def _request(handle: int) -> AddRequest:
    return AddRequest(
        handle=handle,
        model=handle % NUM_MODELS,
        prompt_ids=pack_ids([handle] * NUM_PROMPT_TOKENS),
        output_ids=b"",
        max_tokens=MAX_TOKENS - handle * 7 % 400,
        stop_ids=[2],
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0),
        tenant=f"tenant {handle % NUM_TENANTS}",
        weight=1.0,
        salt=b"",
        priority=Priority.INTERACTIVE,
    )


def _step(scheduler: Scheduler) -> tuple[float, float]:
    start = time.thread_time()
    plan = scheduler.plan()
    planned = time.thread_time()
    result = _ids(plan)
    resumed = time.thread_time()
    encode_from_core(commit(scheduler, plan, result))
    return planned - start, time.thread_time() - resumed


def _ids(plan: StepPlan) -> StepResult:
    """Ids that repeat nothing."""
    chunks = [chunk for model in plan.models for chunk in model.chunks if chunk.samples]
    return StepResult({c.request.handle: [(c.start * 7_919 + c.request.handle * 104_729) % 100_003] for c in chunks})


if __name__ == "__main__":
    main()
