"""The real scheduler, page pool, commit and runner together, in a pool so small that requests push each other out."""

from __future__ import annotations

from pathlib import Path

from support.driver import GREEDY, load_runner
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.core.commit import commit
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.protocol import AddRequest, Priority, pack_ids
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.scheduler import Scheduler

NUM_TOKENS = 48


def test_page_famine_and_prefix_hits_change_no_token(tmp_path: Path) -> None:
    names = ["qwen3", "mistral_window"]
    directories = [save(name, tmp_path / name) for name in names]
    # 38 pages of 16 tokens for twelve requests of 5 to 10 pages each.
    runner = load_runner(*directories, max_num_running=8, pool_bytes=38 * 16 * 3 * 2 * 2 * 24 * 4)
    assert runner.num_pages == 38
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=names,
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=40,
        batch_floor_share=0.05,
    )
    beginnings = prompts([40, 33, 70, 52])
    requests = []
    for handle in range(12):
        model, prompt = handle % 2, beginnings[handle % 4] + [handle + 3] * (1 + handle // 4)
        message = AddRequest(
            handle=handle,
            model=model,
            prompt_ids=pack_ids(prompt),
            output_ids=b"",
            max_tokens=NUM_TOKENS,
            stop_ids=[],
            sampling=GREEDY,
            tenant=f"tenant-{handle % 3}",
            weight=1.0,
            salt=b"one for all",
            priority=Priority(handle % 5 == 4),
        )
        requests.append(make_request(message, arrival=handle))
        scheduler.add(requests[-1])
    while scheduler.requests:
        plan = scheduler.plan()
        commit(scheduler, plan, runner.step(plan))
    assert scheduler.num_preemptions > 0
    assert sum(request.num_cached_tokens for request in requests) > 0
    models = [make(name) for name in names]
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens]
        expected, _ = greedy(models[request.model], prompt, NUM_TOKENS)
        assert request.token_ids[request.num_prompt_tokens :] == expected
