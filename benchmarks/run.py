"""Times embax beside plain JAX with optax, after checking that both compute the same.

Run it with: python -m benchmarks.run [--write]
"""

import argparse
import gc
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax

from benchmarks.results import write_section
from benchmarks.steps import Embax, PlainJax, check_equal
from benchmarks.workloads import WIDE, WORKLOADS, Workload
from embax import _native


def milliseconds(call: Callable[[int], object], number: int) -> float:
    """Wall time of `call(number)`."""
    start = time.perf_counter()
    call(number)
    return (time.perf_counter() - start) * 1e3


def alternate(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Times of each call, which take turns and are given the number of the round.

    Every turn begins with a call that is not timed: it meets the memory that the other side is still giving back.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            call(number)
            times[name].append(milliseconds(call, number))
    return times


def machine() -> str:
    """One line about what was measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return (
        f"{model}, {os.cpu_count()} cores, {_native.simd()}; Python {platform.python_version()}, jax {jax.__version__}"
    )


def parts(workload: Workload, rounds: int) -> dict[str, float]:
    """Median milliseconds of packing, lookup, update and the whole step by embax, and of the step by plain JAX."""
    batches = workload.batches(8)
    ours = Embax(workload)
    other = PlainJax(workload, ours)
    check_equal(ours, other, batches[:2])
    for ids in batches:  # Buffers grow, and the step compiles, before anything is timed.
        ours.step(ids)

    def whole(number: int) -> None:
        ours.step(batches[number % 8])

    whole_step = alternate({"step": whole, "plain": lambda number: other.step(batches[number % 8])}, rounds)
    del other
    gc.collect()
    packed = ours.pack(batches[0])
    ours.lookup(packed)
    ours.update(packed)
    split = alternate(
        {
            "packing": lambda number: ours.pack(batches[number % 8]),
            "lookup": lambda _: ours.lookup(packed),
            "update": lambda _: ours.update(packed),
            "step alone": whole,
        },
        10 * rounds,
    )
    medians = {name: statistics.median(times) for name, times in (whole_step | split).items()}
    ratios = [plain / step for plain, step in zip(whole_step["plain"], whole_step["step"], strict=True)]
    return medians | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def growth(rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of a step of `wide` at 4 M and at 16 M rows, and the median ratio."""
    large = Workload("wide, 16 M rows", 1, 16_000_000, WIDE.dim, WIDE.batch, WIDE.valency, None)
    sides = {}
    for workload in (WIDE, large):
        batches, model = workload.batches(16), Embax(workload)
        for ids in batches:
            model.step(ids)
        sides[workload.name] = lambda number, model=model, batches=batches: model.step(batches[number % 16])
    times = alternate(sides, rounds)
    small, big = (times[name] for name in (WIDE.name, large.name))
    ratio = statistics.median(b / s for s, b in zip(small, big, strict=True))
    return statistics.median(small), statistics.median(big), ratio


def report(names: list[str], rounds: int, *, with_growth: bool) -> str:
    """The measurements as Markdown."""
    lines = [
        "Command: `make bench`. One training step with full-slot Adagrad in float32, ids in, tables updated, everything",
        "counted. Medians; the two sides take turns, each beginning with a call that is not timed, and the ratio is the median",
        "of the rounds' ratios, with its range. Both sides are first checked to compute the same losses and rows. Not shown:",
        "anything but one process on one CPU, and the dense part of a model.",
        "",
        f"Machine: {machine()}.",
        "",
        "| workload | packing, ms | lookup, ms | update, ms | embax step, ms | plain JAX + optax step, ms | plain / embax |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        workload = WORKLOADS[name]
        print(f"{name}: {workload.describe()}", flush=True)
        m = parts(workload, rounds)
        lines.append(
            f"| {name} | {m['packing']:.2f} | {m['lookup']:.2f} | {m['update']:.2f} | {m['step alone']:.2f} "
            f"| {m['plain']:.1f} | {m['ratio']:.1f} ({m['low']:.1f} to {m['high']:.1f}) |"
        )
        print(lines[-1], flush=True)
    lines += ["", *(f"- `{name}`: {WORKLOADS[name].describe()}." for name in names)]
    if with_growth:
        small, big, ratio = growth(100)
        lines += [
            "",
            f"Growth with the vocabulary: a step of `wide` takes {small:.2f} ms at 4 M rows and {big:.2f} ms at 16 M, "
            f"{ratio:.2f} times as long.",
        ]
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7, help="steps of plain JAX that are timed (default 7)")
    parser.add_argument("--no-growth", action="store_true", help="leave out the 16 M row table, which needs 11 GB")
    parser.add_argument("--write", action="store_true", help="write the section in RESULTS.md")
    options = parser.parse_args()
    text = report(options.workloads, options.rounds, with_growth=not options.no_growth)
    if options.write:
        write_section("Training steps", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
