"""Times training steps of whole models, tables and dense layers, of embax beside torch with FBGEMM's tables.

`make bench-models` runs it; or: python -m benchmarks.models [--models dlrm --rounds 25 --stacked] [--write]
"""

import argparse
import pathlib
import statistics
import tempfile
from typing import NamedTuple

import numpy as np

from benchmarks import targets
from benchmarks.model_settings import MODELS
from benchmarks.peers import versions
from benchmarks.processes import SideProcess, SideProgram, running
from benchmarks.results import table, write_section
from benchmarks.sides.model_setting import ModelSetting
from benchmarks.targets import Target
from benchmarks.timing import machine
from benchmarks.trials import TURNS, Ratio, alternate

EMBAX = SideProgram("embax", "embax_models", None, ("adagrad",))
PEER = SideProgram("torch + FBGEMM", "fbgemm_models", "build/venv-torch", ("adagrad",))
CHECKED_BATCHES = [0, 1, 2, 0, 1, 2, 3, 4]
"""Of the steps whose losses are compared; they repeat, so that what tables and layers learned shows."""
TOLERANCE = 1e-4
"""By which losses may differ, relatively."""
WANTED = 1.0
"""The ratio that is wanted of each model."""
PARTS = {"embax": ("packing", "lookup", "dense", "update"), "peer": ("tables", "dense")}


class Trial(NamedTuple):
    """embax beside its peer on one model: milliseconds of each round's steps, and medians of parts of a step."""

    setting: ModelSetting
    embax: list[float]
    peer: list[float]
    parts: dict[str, dict[str, float]]

    @property
    def ratio(self) -> Ratio:
        """Of embax's samples a second to the peer's."""
        return Ratio.of(self.peer, self.embax)

    @property
    def of_fastest(self) -> float:
        """The same ratio, of the fastest turns of each: other load of the machine delays the two sides in different ways."""
        return min(self.peer) / min(self.embax)

    def rate(self, times: list[float]) -> float:
        """Samples a second."""
        return self.setting.batch / statistics.median(times) * 1e3


def medians(side: SideProcess, parts: tuple[str, ...], count: int) -> dict[str, float]:
    """Milliseconds of parts of a step."""
    return {part: statistics.median(side.time(1, count, part)) for part in parts}


def compare(setting: ModelSetting, rounds: int) -> Trial:
    """A trial of a model.

    Raises:
        AssertionError: the losses of the two sides differ.
    """
    with running((EMBAX, setting), (PEER, setting)) as sides:
        ours, theirs = (side.losses(CHECKED_BATCHES) for side in sides)
        np.testing.assert_allclose(theirs, ours, rtol=TOLERANCE, err_msg=f"losses of {PEER.title}, {setting.name}")
        embax, peer = alternate(sides, rounds)
        parts = {who: medians(side, PARTS[who], rounds) for who, side in zip(PARTS, sides, strict=True)}
    return Trial(setting, embax, peer, parts)


def describe(setting: ModelSetting) -> str:
    """One line about a model."""
    deep, wide = ({setting.tables[name] for name in of.values()} for of in (setting.deep, setting.wide))
    rows = sum(one.rows for one in setting.tables.values())
    (dim,) = {one.dim for one in deep}
    parts = [
        f"{len(setting.tables)} tables of {rows:,} rows in all{', stacked by embax' if setting.stacked else ''}",
        f"{len(setting.deep)} features of {dim} columns" + (f" and {len(setting.wide)} wide ones" if wide else ""),
        f"{setting.inputs} dense inputs",
        f"bottom MLP {'-'.join(map(str, setting.bottom))}, top MLP {'-'.join(map(str, setting.top))}",
        f"batch {setting.batch}",
        "exact Adagrad on tables, " + ("AdamW" if setting.adamw else "SGD") + " on the rest",
    ]
    return ", ".join(parts)


def report(trials: list[Trial], rounds: int) -> str:
    """The measurements as Markdown."""
    heads = ["model", "embax, samples/s", f"{PEER.title}, samples/s", f"embax / {PEER.title}", "of fastest turns"]
    rows = []
    for trial in trials:
        rates = [f"{trial.rate(times):,.0f}" for times in (trial.embax, trial.peer)]
        rows.append([trial.setting.name, *rates, str(trial.ratio), f"{trial.of_fastest:.2f}"])
    part_heads = ["model", *(f"embax, {part}" for part in PARTS["embax"]), "embax, step"]
    part_heads += [*(f"{PEER.title}, {part}" for part in PARTS["peer"]), f"{PEER.title}, step"]
    part_rows = []
    for trial in trials:
        cells = [trial.setting.name]
        for who, times in (("embax", trial.embax), ("peer", trial.peer)):
            cells += [f"{ms:.2f}" for ms in (*trial.parts[who].values(), statistics.median(times))]
        part_rows.append(cells)
    lines = [
        "Command: `make bench-models`. A training step of a whole model in float32: ids in, rows looked up, dense layers forward",
        "and backward, tables and layers updated. embax: packing on the host, counted, and one jitted step, its state donated.",
        f"{PEER.title}: eager, FBGEMM's tables, whose backward pass updates them, and PyTorch's layers; ids, offsets and tensors",
        "are made beforehand. The gradient of the products of vectors is written by hand on both sides, which is faster on both",
        "than automatic differentiation, and both let the C library keep memory from step to step. Each side runs in a process",
        f"of its own, on as many threads as there are cores. They take {TURNS}, for",
        f"up to {rounds} rounds; times are medians, a ratio is the median of the rounds' ratios, with its range, and above 1",
        "where embax is faster; the ratio of each side's fastest turns stands beside it, as other load of the machine delays the",
        f"two in different ways. First the losses of {len(CHECKED_BATCHES)} steps are checked to agree to {TOLERANCE:g}.",
        "A loop waits for its last step alone: JAX computes a step while Python packs the batch of the next one, so the parts",
        "below add up to more than a step.",
        "Not shown: `torch.compile`; dropout, whose masks would differ.",
        "",
        f"Machine: {machine()}; {versions([PEER])}.",
        "",
        *table(heads, rows),
        "",
        f"Parts of a step by themselves, ms; the tables of {PEER.title} are looked up and updated:",
        "",
        *table(part_heads, part_rows),
        "",
        *(f"- {trial.setting.name}: {describe(trial.setting)}." for trial in trials),
    ]
    return "\n".join(lines)


def targets_of(trials: list[Trial]) -> list[Target]:
    """What is wanted of each model."""
    return [
        Target.at_least(
            f"whole model, {trial.setting.name}: at least {WANTED:g} times the samples/s of {PEER.title}",
            "{:.2f}",
            (trial.ratio.median, WANTED),
        )
        for trial in trials
    ]


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=25, help="turns of each side (default 25)")
    parser.add_argument("--stacked", action="store_true", help="let embax stack the tables")
    parser.add_argument("--write", action="store_true", help="write the section in RESULTS.md")
    options = parser.parse_args()
    trials = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            trial = compare(MODELS[name](pathlib.Path(folder), options.stacked), options.rounds)
        trials.append(trial)
        print(f"{name}: embax / {PEER.title} {trial.ratio}", flush=True)
    text = report(trials, options.rounds)
    print("\n" + text)
    if options.write:
        write_section("Whole models", text)
    targets.report(targets_of(trials), options.write)


if __name__ == "__main__":
    main()
