"""`python -m aiexport_edge.kernels.gpu.aot`: compile the server's kernels for every architecture, without a card.

Prints what each takes of its SM and exits with 1 where one would not run (over the registers or shared memory of its
architecture), where one that must not spill does, or where global memory is not read 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import triton

from aiexport_edge.kernels.gpu.compile import Resources, compile_launch, resources
from aiexport_edge.kernels.gpu.launch import KNOWN, Architecture, shared_limit
from aiexport_edge.kernels.gpu.service import Case, representative_cases, service_cases

WIDE_LOAD = 16
REPRESENTATIVE_CAPABILITIES = (80, 90, 120)


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    detail: str
    capability: int
    resources: Resources
    faults: tuple[str, ...]


def _key(case: Case) -> tuple[object, ...]:
    """Launches that differ in neither code nor settings compile to the same thing."""
    kinds = tuple(
        (str(each.dtype), each.data_ptr() % 16) if hasattr(each, "dtype") else (type(each).__name__, _kind(each))
        for each in case.launch.arguments
    )
    return (case.kernel, kinds, tuple(sorted((name, str(value)) for name, value in case.launch.constants.items())))


def _kind(number: object) -> object:
    return (number == 1, number % 16 == 0, number >= 1 << 31) if isinstance(number, int) else None


def check(capability: int, *, representative: bool) -> list[Row]:
    """Compile the cases of one architecture."""
    architecture = _architecture(capability)
    rows: list[Row] = []
    seen = set()
    for case in representative_cases(architecture) if representative else service_cases(architecture):
        key = _key(case)
        if key in seen:
            continue
        seen.add(key)
        taken = resources(compile_launch(case.launch, capability), capability)
        faults = taken.faults(capability, may_spill=case.may_spill)
        if case.wide and taken.widest_load < WIDE_LOAD:
            faults.append(f"reads {taken.widest_load} bytes at a time, not {WIDE_LOAD}")
        rows.append(Row(case.kernel, case.detail, capability, taken, tuple(faults)))
        print(f"sm_{capability}: {len(rows)} compiled, {case.kernel}", file=sys.stderr, flush=True)
    return rows


def _architecture(capability: int) -> Architecture:
    return next(each for each in KNOWN if each.capability == capability)


def table(rows: list[Row]) -> str:
    """The rows as text, with a line that sums them up."""
    lines = [
        f"{'kernel':18} {'configuration':44} {'arch':6} {'regs':>4} {'spills':>6} {'shared':>7} {'limit':>7} "
        f"{'warps':>5} {'per SM':>6} {'load':>4}"
    ]
    for row in rows:
        taken = row.resources
        lines.append(
            f"{row.kernel:18} {row.detail:44} sm_{row.capability:<3} {taken.registers:4} {taken.spills:6} "
            f"{taken.shared:7} {shared_limit(row.capability):7} {taken.num_warps:5} {taken.blocks_per_sm:6} "
            f"{taken.widest_load:4} {'; '.join(row.faults)}".rstrip()
        )
    faulty = sum(bool(row.faults) for row in rows)
    spilling = sum(row.resources.spills > 0 for row in rows)
    lines.append(f"{len(rows)} kernels, triton {triton.__version__}: {faulty} with faults, {spilling} that spill")
    return "\n".join(lines)


def main() -> int:
    """Exit status 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m aiexport_edge.kernels.gpu.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=[each.capability for each in KNOWN])
    parser.add_argument("--representative", action="store_true", help="a small part, for three architectures")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    everywhere = REPRESENTATIVE_CAPABILITIES if options.representative else [each.capability for each in KNOWN]
    capabilities = options.arch or everywhere
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(check, each, representative=options.representative) for each in capabilities]
        for future in futures:
            rows += future.result()
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": [dataclasses.asdict(row) for row in rows]}))
    else:
        print(table(rows))
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
