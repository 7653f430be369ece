"""embax's lookup and update alone beside what this machine's memory gives a small native program, in turns."""

import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Self

import numpy as np

from benchmarks.processes import EMBAX, ROOT, SideProcess, running
from benchmarks.results import table
from benchmarks.targets import Target
from benchmarks.trials import PAUSE_S, Ratio
from benchmarks.workloads import Workload

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
PROGRAM = ROOT / "build" / "benchmarks" / "ceiling"
ARRAY_BYTES = 1 << 30
PREFETCHES = tuple(itertools.product((4, 8, 16, 32, 64), (1, 2)))
"""How many rows ahead, and into the cache of which level."""
DIMS = (16, 32, 64, 128)
BATCHES = 8
CALLS = 7
"""Of each side in a turn, the fastest of which counts: what else the machine does slows both down, in different ways."""
CASES = (("lookup", "sgd", "read"), ("update", "sgd", "write"), ("update", "adagrad", "write_two"))
"""The part of a step, the optimizer, and what of the ceiling's it corresponds to."""
WANTED = {"lookup": 0.7, "update": 0.6}
ORDERS = ("scattered", "ascending")
"""Of the ceiling's rows. The first is the ceiling; in the second updates go through theirs."""


def workload_of(dim: int) -> Workload:
    """A table of `ARRAY_BYTES`, and a batch that names enough rows for the call itself, and for activations, not to count."""
    return Workload(f"ceiling{dim}", 1, ARRAY_BYTES // (4 * dim), dim, 8_192, 16, None)


def build() -> None:
    """Compiles the program, unless it is newer than its source."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(PROGRAM), str(SOURCE)], check=True)


class Ceiling:
    """The running program."""

    def __enter__(self) -> Self:
        build()
        command = [str(PROGRAM), str(ARRAY_BYTES), str(os.cpu_count() or 1)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def milliseconds(
        self,
        kind: str,
        row_bytes: int = 64,
        prefetch: tuple[int, int] = (16, 1),
        count: int = 1,
        order: str = ORDERS[0],
    ) -> float:
        """Of one pass."""
        print(kind, row_bytes, *prefetch, count, order, file=self._process.stdin, flush=True)
        assert self._process.stdout is not None
        return 1e3 * float(self._process.stdout.readline())

    def best_prefetch(self, kind: str, row_bytes: int, count: int, order: str) -> tuple[int, int]:
        """How rows are best prefetched: by the fastest of some passes each, in turns."""
        passes: dict[tuple[int, int], list[float]] = {prefetch: [] for prefetch in PREFETCHES}
        for _, prefetch in itertools.product(range(7), PREFETCHES):
            passes[prefetch].append(self.milliseconds(kind, row_bytes, prefetch, count, order))
        return min(PREFETCHES, key=lambda prefetch: min(passes[prefetch]))


def in_turns(side: SideProcess, part: str, ceiling: Ceiling, kind: str, row_bytes: int, count: int, rounds: int):
    """Milliseconds of embax, and of the ceiling in each of `ORDERS`, in each round."""
    prefetches = {order: ceiling.best_prefetch(kind, row_bytes, count, order) for order in ORDERS}
    side.time(0, part="pack_all", untimed=0)
    side.time(0, part=part, count=3, untimed=0)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {order: [] for order in ORDERS}
    for number in range(rounds):
        ours.append(min(side.time(CALLS * number + 1, count=CALLS, part=part)))
        time.sleep(PAUSE_S)
        for order, times in theirs.items():
            passes = [ceiling.milliseconds(kind, row_bytes, prefetches[order], count, order) for _ in range(CALLS)]
            times.append(min(passes))
    return ours, theirs


def report_ceiling(rounds: int) -> tuple[list[str], list[Target]]:
    """A table of lookup and update as shares of the ceiling."""
    rows = []
    shares: dict[str, list[float]] = {part: [] for part in WANTED}
    with Ceiling() as ceiling:
        sequential = ARRAY_BYTES / 1e6 / statistics.median(ceiling.milliseconds("sequential") for _ in range(5))
        for dim in DIMS:
            for optimizer in dict.fromkeys(optimizer for _, optimizer, _ in CASES):
                workload = workload_of(dim)
                with tempfile.TemporaryDirectory() as folder:
                    ids = workload.write(pathlib.Path(folder), BATCHES)
                    distinct = round(statistics.mean(len(np.unique(batch)) for batch in ids))
                    with running((EMBAX, workload.setting(optimizer, folder))) as (side,):
                        for part, of, kind in CASES:
                            if of != optimizer:
                                continue
                            ours, orders = in_turns(side, part, ceiling, kind, 4 * dim, distinct, rounds)
                            theirs = orders[ORDERS[0]]
                            ratios = [Ratio.of(orders[order], ours) for order in ORDERS]
                            shares[part].append(ratios[0].median)
                            arrays = 2 if kind == "write_two" else 1
                            cells = [part, optimizer, str(4 * dim), f"{distinct:,}"]
                            for times in (ours, theirs):
                                median = statistics.median(times)
                                cells.append(f"{distinct / median / 1e3:.1f}")
                            read = arrays * 4 * dim * distinct / statistics.median(theirs) / 1e6
                            cells.append(f"{read:.1f}")
                            cells += [f"{100 * r.median:.0f} ({100 * r.low:.0f} to {100 * r.high:.0f})" for r in ratios]
                            rows.append(cells)
                            print("ceiling:", *rows[-1], flush=True)
    w = workload_of(DIMS[0])
    text = [
        "Lookup and update alone, jitted, of batches packed before, beside a native program that reads (lookup), or reads and",
        "writes (SGD), or does so in two arrays at once (Adagrad), as many distinct random rows: on as many threads, which just",
        "before do the same with other rows, from huge pages, with the best of several ways to prefetch, in arrays of",
        f"{ARRAY_BYTES / 2**30:g} GiB. Tables are as large, ids uniform, {w.batch:,} samples of {w.valency} ids,",
        f"{BATCHES} batches in rotation. What is counted are distinct rows of a batch, once each: not the activations that a",
        "lookup writes, nor the gradients that an update reads, nor ids. Medians of",
        f"{rounds} rounds in turns, of {CALLS} calls each, the fastest of which counts; GB/s are bytes read from arrays, as many",
        "more are written by an update. Read in order, an array gives",
        f"{sequential:.1f} GB/s.",
        "",
        "The last column compares with the same program where each thread visits its rows in ascending order. Which order is the",
        "faster one depends on the length of rows and on what is done with them. embax's updates go through ascending rows, its",
        "lookups through several ascending lists, one after the other, but for the longest rows, which they read sample by",
        "sample. The rest is what the program does not do: an update first puts the entries of the SparseCores in the order of",
        "their rows, which takes as long for short rows as for long ones, and reads a gradient for each; a lookup adds to an",
        "activation for each, or puts the entries in the order of samples before.",
        "",
    ]
    heads = [
        "part",
        "optimizer",
        "row, bytes",
        "distinct rows",
        "embax, M rows/s",
        "ceiling, M rows/s",
        "ceiling, GB/s",
    ]
    found = [
        Target.at_least(
            f"{part} alone: at least {bound:.0%} of the ceiling at each row size",
            "{:.0%}, the least",
            (min(shares[part]), bound),
        )
        for part, bound in WANTED.items()
    ]
    heads += ["share of the ceiling, %", "share where its rows ascend, %"]
    return [*text, *table(heads, rows)], found
