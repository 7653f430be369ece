"""What a step of embax consists of, alone: times of packing, lookup, update and step, memory, and first steps."""

import dataclasses
import pathlib
import statistics
import tempfile
import time

from benchmarks.processes import EMBAX, running
from benchmarks.results import table
from benchmarks.targets import Target
from benchmarks.trials import PAUSE_S, Ratio, alternate, available_bytes, cases, fits
from benchmarks.workloads import WIDE, WORKLOADS, Workload

PARTS = ("packing", "lookup", "update", "step")
TINY = Workload("tiny", 1, 1_000, 16, 8, 1, None)
ROWS = (1_000_000, 64_000_000)
GROWING = Workload("growing", 1, ROWS[0], 16, 8192, 4, None)
MAX_HOT, MAX_GROWTH, MAX_OVERHEAD_US = 1.2, 2.5, 300.0


def report_parts(names: list[str], optimizers: list[str], rounds: int) -> tuple[list[str], list[Target]]:
    """A table of the parts of each workload's step; parts take turns."""
    rows = []
    for workload, optimizer in cases(names, optimizers):
        with tempfile.TemporaryDirectory() as folder:
            workload.write(pathlib.Path(folder))
            with running((EMBAX, workload.setting(optimizer, folder))) as (side,):
                first = side.time(0, untimed=0)[0] / 1e3
                side.time(1, count=8)
                peak = side.memory()["peak"]
                times: dict[str, list[float]] = {part: [] for part in PARTS}
                for number in range(rounds):
                    for part, of_part in times.items():
                        of_part += side.time(2 * number + 1, part=part)
        cells = [workload.name, optimizer, *(f"{statistics.median(of_part):.2f}" for of_part in times.values())]
        state = workload.state_bytes(optimizer)
        rows.append([*cells, f"{first:.2f}", f"{state / 1e6:.0f}", f"{peak / 1e6:.0f}"])
        print(*rows[-1], flush=True)
    heads = ["workload", "optimizer", *(f"{part}, ms" for part in PARTS)]
    heads += ["first step, s", "tables and slots, MB", "peak, MB"]
    text = [
        f"The parts of a step, each alone: medians of {rounds} rounds in which they take turns, each beginning with a call that",
        "is not timed. Lookup and update are of batches packed before. The first step compiles. The peak is that of the whole",
        "process beyond what it had before its tables, while they are made and in some steps, with what it compiled.",
        "",
    ]
    described = [f"- `{name}`: {WORKLOADS[name].describe()}." for name in names]
    return [*text, *table(heads, rows), "", *described], []


def _steps_of(first: Workload, second: Workload, optimizer: str, rounds: int) -> list[list[float]]:
    """Milliseconds of steps of two workloads in turns."""
    with tempfile.TemporaryDirectory() as folder:
        settings = []
        for workload in (first, second):
            place = pathlib.Path(folder) / workload.name
            workload.write(place, count=16)
            settings.append((EMBAX, workload.setting(optimizer, str(place))))
        with running(*settings) as sides:
            for side in sides:
                side.time(0, count=3, untimed=0)
            return alternate(sides, rounds)


def report_hot(optimizers: list[str], rounds: int) -> tuple[list[str], list[Target]]:
    """A table of steps with and without one id in every sample."""
    rows, medians = [], []
    for optimizer in optimizers:
        plain, hot = _steps_of(WIDE, WORKLOADS["hot"], optimizer, rounds)
        ratio = Ratio.of(hot, plain)
        medians.append(ratio.median)
        rows.append([optimizer, f"{statistics.median(plain):.2f}", f"{statistics.median(hot):.2f}", str(ratio)])
        print("hot:", *rows[-1], flush=True)
    text = [
        "One id in every sample: a step of `hot` and one of `wide`, which is the same with other ids, in turns.",
        "",
    ]
    found = Target.at_most(
        f"step of `hot` / step of `wide`: at most {MAX_HOT}", "{:.2f}, the worst optimizer", max(medians), MAX_HOT
    )
    return [*text, *table(["optimizer", "wide, ms", "hot, ms", "hot / wide"], rows)], [found]


def report_growth(rounds: int, optimizer: str = "adagrad") -> tuple[list[str], list[Target]]:
    """Steps at few and at many rows."""
    small, large = (dataclasses.replace(GROWING, name=f"{rows // 1_000_000} M", vocabulary=rows) for rows in ROWS)
    if not fits(EMBAX, large, optimizer, available_bytes()):
        return [f"Growth with the vocabulary: {large.describe()} does not fit into memory."], []
    few, many = _steps_of(small, large, optimizer, rounds)
    ratio = Ratio.of(many, few)
    text = (
        f"Growth with the vocabulary: a step of {optimizer} takes {statistics.median(few):.2f} ms at {small.name} rows and "
        f"{statistics.median(many):.2f} ms at {large.name} rows, {ratio} times as long, in turns "
        f"({GROWING.dim} columns, batch {GROWING.batch}, {GROWING.valency} ids each, uniform)."
    )
    print(text, flush=True)
    wanted = f"step at {large.name} rows / step at {small.name} rows: at most {MAX_GROWTH}"
    return [text], [Target.at_most(wanted, "{:.2f}", ratio.median, MAX_GROWTH)]


def report_overhead(count: int = 1000) -> tuple[list[str], list[Target]]:
    """A whole step of next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        TINY.write(pathlib.Path(folder))
        with running((EMBAX, TINY.setting("adagrad", folder))) as (side,):
            side.time(0, count=10, untimed=0)
            time.sleep(PAUSE_S)
            cells = {
                part: 1e3 * statistics.median(side.time(0, count=count, part=part)) for part in ("packing", "step")
            }
    text = (
        f"Overhead: a whole step of {TINY.describe()}, takes {cells['step']:.0f} us, of which packing {cells['packing']:.0f} us "
        f"(medians of {count} in a row)."
    )
    print(text, flush=True)
    wanted = f"whole step of a tiny batch and one table: at most {MAX_OVERHEAD_US:g} us"
    return [text], [Target.at_most(wanted, "{:.0f} us", cells["step"], MAX_OVERHEAD_US)]
