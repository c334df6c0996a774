"""What drafts save and what they cost, and that they change nothing: the demo model, each prompt with and without.

    python -m benchmarks.drafts [--prompts 50] [--model DIRECTORY] [--output FILE]

Five kinds of prompts: sentences to be said back, stories that have been told before (what is written stands in the
prompt), objects under a JSON Schema (the grammar forces their keys), stories, and questions without an answer in the
prompt, sampled at temperature 1. One stream
at a time, in a core of its own process: scheduler, runner and all, but no wire. Every prompt runs both ways, one right
after the other in an order that changes, so that what else the machine does meets both: the ratio of times is the
median of pairs. `ids per step` counts steps that write. In deterministic mode the ids must be equal, one by one.

With a `--model` of real shapes, the prompts are random ids, sampled at temperature 1: they repeat nothing, so its row
is what drafts cost where they can't save anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

from aiexport_edge.engine.core.loading import load
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.protocol import AddRequest, CoreConfig, CoreModel, Priority, Sampling, pack_ids
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects
from aiexport_edge.engine.demo import MODEL_DIR, echoes, structured
from aiexport_edge.engine.structured.compile import compile_grammar
from aiexport_edge.engine.structured.constraint import Constraint
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.grammar import CompiledMasks, TokenMasks
from aiexport_edge.engine.structured.vocabulary import Vocabulary
from aiexport_edge.engine.text.template import ChatTemplate, Message
from aiexport_edge.engine.text.tokenizer import Tokenizer
from benchmarks.peers.machine import commit, describe

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 30},
        "customer_identifier": {"type": "integer", "minimum": 0, "maximum": 9999},
        "delivery_address": {
            "type": "object",
            "properties": {"street_name": {"type": "string", "maxLength": 30}, "house_number": {"type": "integer"}},
            "required": ["street_name", "house_number"],
            "additionalProperties": False,
        },
    },
    "required": ["customer_name", "customer_identifier", "delivery_address"],
    "additionalProperties": False,
}
HEROES = ("a fox", "the moon", "a small boat", "Anna", "an old tree", "two frogs", "a lamp", "the baker", "a cat")
UNKNOWN = (
    "Who won the match in {n}?", "What does {n} grams of gold cost?", "Which river is {n} km long?",
    "Why is the sky blue in {n}?", "Tell me about the year {n}.", "How do I bake {n} loaves of bread?",
)  # fmt: skip


class Nobody(Suspects):
    """Nobody asks who was in flight."""

    def __init__(self) -> None:
        """There is no memory to write to."""

    def write(self, handles: list[int]) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and how ids are drawn."""

    ids: list[int]
    temperature: float
    seed: int
    max_tokens: int
    constrained: bool = False
    stop_ids: list[int] = field(default_factory=lambda: [2])  # the demo model's


@dataclass(frozen=True)
class Run:
    """One answer: its ids, the steps that wrote it and the time they took, and the guesses."""

    ids: list[int]
    steps: int
    seconds: float
    cpu_seconds: float
    guessed: int
    accepted: int


class Documents:
    """Constraints of SCHEMA for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, size: int, stop_id: int) -> None:
        tokens = [b"" if tokenizer.is_control(id_) else tokenizer.decode_bytes(id_) for id_ in range(size)]
        vocabulary = Vocabulary(tokens, [stop_id], size)
        compiled = compile_grammar(json.dumps(SCHEMA).encode())
        self._endings = Endings(compiled.reader, vocabulary)
        self._masks: CompiledMasks = TokenMasks(vocabulary).compile(compiled.lark)

    def constraint(self, max_tokens: int) -> Constraint:
        """For one answer."""
        return Constraint(self._endings, prefix=b"", max_tokens=max_tokens, matcher=self._masks.matcher())


def demo_prompts(runner: Runner, tokenizer: Tokenizer, count: int) -> dict[str, list[Prompt]]:
    """`count` of each kind, the same every time; half of them greedy, half sampled."""
    template = ChatTemplate.load(MODEL_DIR, tokenizer, image_token_id=tokenizer.encode("<|image_pad|>")[0])
    rng = random.Random(11)

    def prompt(text: str, number: int, max_tokens: int, *, constrained: bool = False, hot: bool = False) -> Prompt:
        ids = template.encode([Message("user", text)])
        return Prompt(ids, 1.0 if hot else (0.0, 0.7)[number % 2], number, max_tokens, constrained)

    def again(number: int) -> Prompt:
        question = Message("user", f"Tell me a story about {rng.choice(HEROES)}.")
        first = Prompt(template.encode([question]), 0.0, number, 200)
        ids = run(runner, first, number, None, drafts=False).ids
        story = Message("assistant", b"".join(map(tokenizer.decode_bytes, ids)).decode(errors="replace"))
        return Prompt(template.encode([question, story, question]), (0.0, 0.7)[number % 2], number, 200)

    return {
        "said back": [prompt(f"Repeat after me: {echoes.plain_sentence(rng)}", n, 80) for n in range(count)],
        "told again": [again(number) for number in range(count)],
        "JSON Schema": [prompt(structured.extraction(rng)[0], n, 120, constrained=True) for n in range(count)],
        "stories": [prompt(f"Tell me a story about {rng.choice(HEROES)}.", n, 160) for n in range(count)],
        "nothing to repeat": [
            prompt(rng.choice(UNKNOWN).format(n=rng.randrange(100, 3000)), n, 60, hot=True) for n in range(count)
        ],
    }


def random_prompts(vocabulary: int, count: int, length: int, max_tokens: int) -> dict[str, list[Prompt]]:
    """Of ids that mean nothing."""
    rng = random.Random(5)
    return {
        "random ids": [
            Prompt([rng.randrange(10, vocabulary) for _ in range(length)], 1.0, number, max_tokens, stop_ids=[])
            for number in range(count)
        ]
    }


def run(runner: Runner, prompt: Prompt, handle: int, documents: Documents | None, *, drafts: bool) -> Run:
    """The whole answer, alone."""
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=["benchmark"],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=1,
        max_step_tokens=runner.max_step_tokens,
        batch_floor_share=0.0,
        draft_cost=runner.draft_cost if drafts else None,
    )
    request = make_request(
        AddRequest(
            handle=handle,
            model=0,
            prompt_ids=pack_ids(prompt.ids),
            output_ids=b"",
            max_tokens=prompt.max_tokens,
            stop_ids=prompt.stop_ids,
            sampling=Sampling(prompt.temperature, 1.0, 0, prompt.seed),
            tenant="",
            weight=1.0,
            salt=b"",
            priority=Priority.INTERACTIVE,
        ),
        arrival=0,
    )
    if prompt.constrained:
        assert documents is not None
        request.constraint = documents.constraint(prompt.max_tokens)
    scheduler.add(request)
    pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=Nobody())
    while request.num_output_tokens == 0:
        pipeline.advance()
    steps, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while pipeline.busy:
        pipeline.advance()
        steps += 1
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Run(
        request.token_ids[request.num_prompt_tokens :],
        steps,
        seconds,
        cpu_seconds,
        scheduler.num_guessed_tokens[0],
        scheduler.num_accepted_tokens[0],
    )


def row(kind: str, pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """Figures of one kind; the pairs are (without, with)."""
    written = [(without, with_) for without, with_ in pairs if without.steps]
    steps = sum(with_.steps for _, with_ in written)
    guessed = sum(with_.guessed for _, with_ in written)
    return {
        "prompts": kind,
        "count": len(pairs),
        "equal": sum(without.ids == with_.ids for without, with_ in pairs),
        "ids_per_step": round(sum(len(with_.ids) - 1 for _, with_ in written) / max(steps, 1), 2),
        "guesses_right": round(sum(with_.accepted for _, with_ in written) / guessed, 3) if guessed else None,
        "time_ratio": round(statistics.median(with_.seconds / without.seconds for without, with_ in written), 3),
        "cpu_ratio": round(statistics.median(with_.cpu_seconds / without.cpu_seconds for without, with_ in written), 3),
    }


def compare(runner: Runner, prompts: list[Prompt], documents: Documents | None) -> list[tuple[Run, Run]]:
    """Every prompt both ways, once before anything is timed."""
    pairs = []
    for number, prompt in enumerate([*prompts[:2], *prompts]):
        order = (False, True) if number % 2 else (True, False)
        runs = {drafts: run(runner, prompt, 2 * number + drafts, documents, drafts=drafts) for drafts in order}
        if number >= 2:
            pairs.append((runs[False], runs[True]))
    return pairs


def main() -> int:
    """Print a row for each kind; 1 where any answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, help="of each kind")
    parser.add_argument("--model", type=Path, help="of real shapes, besides the demo model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    threads.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    runner = _runner(MODEL_DIR, options.threads, deterministic=True)
    tokenizer = Tokenizer.load(MODEL_DIR)
    documents = Documents(tokenizer, 2048, 2)
    for kind, prompts in demo_prompts(runner, tokenizer, options.prompts).items():
        rows.append(row(kind, compare(runner, prompts, documents)))
        print(rows[-1], flush=True)
    if options.model is not None:
        runner = _runner(options.model, options.threads, deterministic=False)
        for kind, prompts in random_prompts(30_000, max(2, options.prompts // 5), 128, 64).items():
            rows.append(row(f"{kind}, {options.model.name}", compare(runner, prompts, None)))
            print(rows[-1], flush=True)
    document = {"machine": describe(), "commit": commit(), "rows": rows, "load_average": os.getloadavg()}
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row["equal"] != row["count"] for row in rows))


def _runner(directory: Path, num_threads: int, *, deterministic: bool) -> Runner:
    model = CoreModel("model", str(directory), "auto", 0, deterministic, "")
    config = CoreConfig([model], "cpu", 0, 512 << 20, 8, 512, num_threads, 0.0, drafts=True)
    runner = load(config, lambda model, done, total: None)
    assert isinstance(runner, Runner)
    return runner


if __name__ == "__main__":
    raise SystemExit(main())
