"""The memory of a process that makes tables of embax at random and trains them, beside what tables and slots take."""

import dataclasses
import pathlib
import tempfile

from benchmarks.processes import EMBAX, running
from benchmarks.results import table
from benchmarks.targets import Target
from benchmarks.trials import cases
from benchmarks.workloads import Workload

MAX_SHARE = 0.1
STEPS = 8
FEW_ROWS = 1_000
LEAST_BYTES = 256e6
"""Of tables that are judged: what two processes differ by anyway is some MB."""


def peaks_of(workload: Workload, optimizer: str) -> tuple[list[float], float]:
    """Peak bytes while tables are drawn, in the first step and in those after it; and seconds that drawing them took."""
    with tempfile.TemporaryDirectory() as folder:
        workload.write(pathlib.Path(folder))
        with running((EMBAX, workload.setting(optimizer, folder, random=True))) as (side,):
            made = side.memory()
            side.time(0, untimed=0)
            first = side.memory()["peak"]
            side.time(1, count=STEPS)
            return [made["peak"], first, side.memory()["peak"]], made["made_s"]


def report_memory(names: list[str], optimizers: list[str]) -> tuple[list[str], list[Target]]:
    """A table of peaks: each case in a process of its own."""
    rows, shares = [], []
    for workload, optimizer in cases(names, optimizers):
        peaks, seconds = peaks_of(workload, optimizer)
        few = dataclasses.replace(workload, vocabulary=FEW_ROWS)
        fixed = max(peaks_of(few, optimizer)[0]) - few.state_bytes(optimizer)
        state = workload.state_bytes(optimizer)
        beyond = max(peaks) - state
        share = (beyond - fixed) / state
        if state >= LEAST_BYTES:
            shares.append(share)
        cells = [workload.name, optimizer, *(f"{size / 1e6:.0f}" for size in (state, *peaks, beyond, fixed))]
        rows.append([*cells, f"{100 * share:.1f}", f"{seconds:.1f}"])
        print("memory:", *rows[-1], flush=True)
    heads = ["workload", "optimizer", "tables and slots, MB", "while made, MB", "first step, MB", "steps, MB"]
    heads += ["beyond, MB", f"beyond with {FEW_ROWS:,} rows, MB", "difference, %", "made in, s"]
    text = [
        "Peak memory of a process beyond what it had before its tables, each case in a process of its own: while the tables are",
        "drawn at random, in the first step, which compiles, and in those after it. `beyond` is what the greatest of these peaks",
        "has beyond tables and slots: the batch's buffers, compiled programs and their making, and what grows with the tables.",
        f"The latter is what is beyond more than in the same process with {FEW_ROWS:,} rows a table: `difference`, as a share of",
        f"tables and slots, and judged where these are at least {LEAST_BYTES / 1e6:.0f} MB.",
        "",
    ]
    wanted = (
        f"peak memory beyond tables, slots and what the same process has beyond those of {FEW_ROWS:,} rows: at most "
        f"{MAX_SHARE:.0%} of tables and slots"
    )
    found = [Target.at_most(wanted, "{:.1%}, the worst case", max(shares), MAX_SHARE)] if shares else []
    return [*text, *table(heads, rows)], found
