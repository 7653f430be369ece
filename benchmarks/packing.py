"""Times packing on the host beside the released reference, jax-tpu-embedding, after checking that both pack alike.

`make bench-packing` runs it, in an environment that has the reference; or: python -m benchmarks.packing [--rounds 40]
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax_tpu_embedding.sparsecore.lib.nn import embedding  # pyright: ignore[reportMissingImports]

import embax
from benchmarks.peer import check_equal_packing, peer_pack, peer_specs
from benchmarks.results import write_section
from benchmarks.sides.worker import resident
from benchmarks.timing import alternate, machine, milliseconds
from benchmarks.workloads import WORKLOADS, Workload

SPARSECORES = 4
SECTIONS = ("time", "memory", "validation")
OVERSIZE = 16
PACKED = ["criteo", "wide", "multihot", "small", "hot"]
"""What packs differently: the vocabulary of `huge` alone makes no difference to packing."""
MEMORY_BATCH = 16
"""Memory is measured at so many times the batch, so that pages and what threads need once do not blur it."""


class Packing:
    """A workload on both sides.

    Args:
        workload: what is packed.
        limits: `max_ids_per_partition` and `max_unique_ids_per_partition` of its tables.
    """

    def __init__(self, workload: Workload, limits: dict[str, int]):
        self.specs = {}
        for name, placed in workload.specs().items():
            table = dataclasses.replace(placed.table_spec, _stacked_table_spec=None, _setting_in_stack=None, **limits)
            self.specs[name] = embax.FeatureSpec(
                name=name, table_spec=table, input_shape=placed.input_shape, output_shape=placed.output_shape
            )
        self.peer = peer_specs(self.specs)
        embax.prepare_feature_specs_for_training(self.specs, 1, SPARSECORES)
        embedding.prepare_feature_specs_for_training(self.peer, 1, SPARSECORES)

    def ours(self, ids: dict[str, np.ndarray], **options: Any) -> embax.PreprocessedInput:
        """The batch packed by embax."""
        return embax.preprocess(ids, specs=self.specs, limits="raise", **options)

    def theirs(self, ids: dict[str, np.ndarray]) -> Any:
        """The batch packed by the reference."""
        return peer_pack(self.peer, ids, None, 1, 1, SPARSECORES)[0]


def needed_limits(workload: Workload, batches: list[dict[str, np.ndarray]], oversize: int = 1) -> dict[str, int]:
    """Limits `oversize` times as large as the fullest partition of any table and batch needs."""
    specs = workload.specs()
    stats = [embax.preprocess(ids, specs=specs, limits="grow").stats for ids in batches]
    fields = ("max_ids_per_partition", "max_unique_ids_per_partition")
    return {f: oversize * max(int(a.max()) for s in stats for a in getattr(s, f).values()) for f in fields}


def pack_batches(packing: Packing, batches: list[Any], threads: str = "", **options: Any) -> Callable[[int], object]:
    """Packs the batch of a number by embax, on as many threads; "" leaves the default."""

    def pack(number: int) -> object:
        os.environ["EMBAX_NUM_THREADS"] = threads
        return packing.ours(batches[number % len(batches)], **options)

    return pack


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Sends what native code prints nowhere: the reference warns about every table at every call."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def compare(workload: Workload, oversize: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both sides, of embax on one thread, and the median ratio with its range."""
    batches = workload.batches(8)
    packing = Packing(workload, needed_limits(workload, batches, oversize))
    calls = {
        "embax": pack_batches(packing, batches),
        "reference": lambda number: packing.theirs(batches[number % len(batches)]),
        "one thread": pack_batches(packing, batches, threads="1"),
    }
    with quiet_stderr():
        for ids in batches:
            check_equal_packing(packing.ours(ids), packing.theirs(ids))
        times = alternate(calls, rounds)
    ratios = [theirs / ours for ours, theirs in zip(times["embax"], times["reference"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def report_time(names: list[str], rounds: int) -> list[str]:
    """A table of both sides' times, with buffers as large as needed and with oversized ones."""
    lines = [
        f"Packing on the host, {SPARSECORES} SparseCores, each table by itself, ids in, buffers out. Medians of {rounds} rounds",
        "in which the sides take turns, each beginning with a call that is not timed; the ratio is the median of the rounds'",
        "ratios, with its range. Both sides pack the same buffers, which is checked first, with their default threads. A packed",
        "batch is let go at once, so embax packs the next one into its memory.",
        "",
        "| workload | buffers | embax, ms | embax, one thread, ms | reference, ms | reference / embax |",
        "|---|---|---|---|---|---|",
    ]
    for oversize, buffers in ((1, "as needed"), (OVERSIZE, f"{OVERSIZE} times as needed")):
        ratios = []
        for name in names:
            m = compare(WORKLOADS[name], oversize, rounds)
            ratios.append(m["ratio"])
            lines.append(
                f"| {name} | {buffers} | {m['embax']:.2f} | {m['one thread']:.2f} | {m['reference']:.2f} "
                f"| {m['ratio']:.2f} ({m['low']:.2f} to {m['high']:.2f}) |"
            )
            print(lines[-1], flush=True)
        lines.append(f"| geometric mean | {buffers} | | | | {statistics.geometric_mean(ratios):.2f} |")
    return lines


def large(name: str) -> Workload:
    """The workload that memory is measured with: so large that single pages do not count."""
    return dataclasses.replace(WORKLOADS[name], batch=MEMORY_BATCH * WORKLOADS[name].batch)


def measure_memory(name: str, side: str, limits: dict[str, int]) -> tuple[int, int]:
    """Bytes of a packed batch, and bytes by which packing it raised the peak of this process, which packed none before."""
    packing = Packing(large(name), limits)
    pack = packing.ours if side == "embax" else packing.theirs
    batch = large(name).batches(1)[0]
    pack({table: np.ascontiguousarray(ids[:SPARSECORES]) for table, ids in batch.items()})  # Starts the threads.
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    packed = pack(batch)
    peak = resident("VmHWM") - before
    return sum(array.nbytes for array in jax.tree.leaves(packed)), peak


def report_memory(names: list[str]) -> list[str]:
    """A table of the peak memory of both sides."""
    lines = [
        f"Memory that packing one batch adds to a process, at most, at {MEMORY_BATCH} times the batch and with limits as needed:",
        "buffers and scratch, pages touched, each side in a process of its own that packed only 4 samples before.",
        "",
        "| workload | buffers, MB | embax, MB | of its buffers | reference, MB | of its buffers |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        limits = json.dumps(needed_limits(large(name), large(name).batches(1)))
        cells = []
        for side in ("embax", "reference"):
            command = [sys.executable, "-m", "benchmarks.packing", "--memory-of", name, side, limits]
            # Every array gets pages of its own, which are counted when they are touched.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            buffers, peak = json.loads(result.stdout.splitlines()[-1])
            cells.append((buffers, f"{peak / 1e6:.1f} | {peak / buffers:.2f}"))
        lines.append(f"| {name} | {cells[0][0] / 1e6:.1f} | {' | '.join(cell for _, cell in cells)} |")
        print(lines[-1], flush=True)
    return lines


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics between which that of the population lies with 95% confidence."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    low, high = math.floor(max(middle - reach, 0)), math.ceil(min(middle + reach, len(values) - 1))
    return statistics.median(values), ordered[low], ordered[high]


def compare_pairs(first: Callable[[int], object], second: Callable[[int], object], rounds: int) -> list[list[float]]:
    """Milliseconds of two calls in each round: two of each, in the order a b b a, so that a drift of the machine cancels."""
    times = []
    for number in range(-8, rounds):  # A few to warm up, not counted.
        a1, b1, b2, a2 = (milliseconds(call, number) for call in (first, second, second, first))
        times.append([(a1 + a2) / 2, (b1 + b2) / 2])
    return times[8:]


def report_validation(names: list[str], rounds: int) -> list[str]:
    """A table of what checking ids and weights costs."""
    lines = [
        f"What checking every id and weight costs, on one thread: medians of {rounds} rounds of two calls each, in turns; the",
        "ratio is the median of the rounds' ratios, with its 95% confidence interval.",
        "",
        '| workload | validation="raise", ms | validation="trust", ms | raise / trust |',
        "|---|---|---|---|",
    ]
    ratios = []
    for name, weighted in itertools.product(names, (False, True)):
        batches = WORKLOADS[name].batches(8)
        packing = Packing(WORKLOADS[name], needed_limits(WORKLOADS[name], batches))
        weights = None
        if weighted:
            rng = np.random.default_rng(0)
            weights = {feature: rng.random(ids.shape, np.float32) for feature, ids in batches[0].items()}
        checking, trusting = (
            pack_batches(packing, batches, threads="1", weights=weights, validation=validation)
            for validation in ("raise", "trust")
        )
        times = compare_pairs(checking, trusting, rounds)
        checked, trusted = (statistics.median(column) for column in zip(*times, strict=True))
        ratio, low, high = median_interval([a / b for a, b in times])
        ratios.append(ratio)
        case = f"{name}, weights" if weighted else name
        lines.append(f"| {case} | {checked:.3f} | {trusted:.3f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |")
        print(lines[-1], flush=True)
    lines.append(f"| geometric mean | | | {statistics.geometric_mean(ratios):.3f} |")
    return lines


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=PACKED)
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each side (default 40)")
    parser.add_argument("--validation-rounds", type=int, default=500, help="rounds for validation (default 500)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--write", action="store_true", help="write the section in RESULTS.md")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        name, side, limits = options.memory_of
        print(json.dumps(measure_memory(name, side, json.loads(limits))))
        return
    reports = {
        "time": lambda: report_time(options.workloads, options.rounds),
        "memory": lambda: report_memory(options.workloads),
        "validation": lambda: report_validation(options.workloads, options.validation_rounds),
    }
    text = [f"Machine: {machine()}; jax-tpu-embedding {importlib.metadata.version('jax-tpu-embedding')}."]
    for section in options.sections:
        text += ["", *reports[section]()]
    if options.write:
        write_section("Packing", "\n".join(["Command: `make bench-packing`.", "", *text]))
    else:
        print("\n" + "\n".join(text))


if __name__ == "__main__":
    main()
