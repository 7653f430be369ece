"""Times a training loop that packs between its steps beside one that packs ahead in a thread, by `embax.prefetch`.

Run it with: python -m benchmarks.prefetching [--write]
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax
from benchmarks.results import write_section
from benchmarks.workloads import WORKLOADS, Workload

STEPS = 40
"""Steps of a turn: enough that the first batch, which nothing overlaps with, counts little."""

LOADING = (0.0, 10.0)
"""Milliseconds for which a batch keeps its loader waiting."""


class Trainer:
    """Tables of a workload, and a step that updates them."""

    def __init__(self, workload: Workload):
        self.specs = specs = workload.specs()
        self.pack = functools.partial(embax.preprocess, specs=specs, limits="grow")
        self.variables = embax.init_embedding_variables(jax.random.key(0), specs)

        @functools.partial(jax.jit, donate_argnames="variables")
        def train(variables, packed):
            activations = embax.lookup(packed, variables, specs=specs)
            loss = sum((jnp.square(a).sum() for a in activations.values()), start=jnp.zeros(()))
            gradients = {name: 2 * a for name, a in activations.items()}
            return loss, embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)

        self._train: Any = train

    def run(self, batches: list[dict[str, np.ndarray]], loading: float, *, wait: bool, ahead: bool) -> float:
        """Steps a second of a loop that waits for each loss, or for the last one alone."""

        def loaded() -> Iterator[dict[str, np.ndarray]]:
            for number in range(STEPS):
                if loading:
                    time.sleep(loading / 1e3)
                yield batches[number % len(batches)]

        start = time.perf_counter()
        for packed in embax.prefetch(loaded(), self.pack) if ahead else map(self.pack, loaded()):
            loss, self.variables = self._train(self.variables, packed)
            if wait:
                loss.block_until_ready()
        jax.block_until_ready(self.variables)
        return STEPS / (time.perf_counter() - start)


def measure(workload: Workload, rounds: int) -> list[str]:
    """Rows of the table. The two loops take turns."""
    trainer, batches, rows = Trainer(workload), workload.batches(8), []
    trainer.run(batches, 0.0, wait=True, ahead=False)  # Compiles, and grows the limits.
    for loading in LOADING:
        for wait in (True, False):
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for ahead, some in rates.items():
                    some.append(trainer.run(batches, loading, wait=wait, ahead=ahead))
            ratios = [after / before for before, after in zip(rates[False], rates[True], strict=True)]
            rows.append(
                f"| {workload.name} | {loading:g} | {'yes' if wait else 'no'} | {statistics.median(rates[False]):.1f} "
                f"| {statistics.median(rates[True]):.1f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
            print(rows[-1], flush=True)
    return rows


def report(names: list[str], rounds: int) -> str:
    """The measurements as Markdown."""
    lines = [
        f"Command: `make bench-prefetch`. Steps a second of a loop of {STEPS} steps (Adagrad, float32, tables alone) that packs",
        "between its steps, and of one that packs ahead by `embax.prefetch` in its default size: medians of turns that",
        "alternate, and the median of their ratios with its range. `loading`: how long a batch keeps its loader waiting, which",
        "sleeps meanwhile. `waits`: whether the loop waits for each loss, or only for the end. Not shown: loaders that",
        "compute, which take cores from the step, and steps that leave cores free.",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, jax {jax.__version__}.",
        f"Its load average was {os.getloadavg()[0]:.1f} before: where that is above 0 other programs shared the cores, and",
        "differences of less than a fifth say nothing.",
        "",
        "| workload | loading, ms | waits | packed between | packed ahead | ahead / between |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        lines += measure(WORKLOADS[name], rounds)
    return "\n".join(lines)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop (default 7)")
    parser.add_argument("--write", action="store_true", help="write the section in RESULTS.md")
    options = parser.parse_args()
    text = report(options.workloads, options.rounds)
    if options.write:
        write_section("Packing ahead", text)


if __name__ == "__main__":
    main()
