"""Times training steps of embax beside its peers, each in an environment of its own, after checking that all compute the same.

`make bench-peers` runs it; or: python -m benchmarks.peers [--workloads wide --optimizers sgd --peers fbgemm] [--write]
"""

import argparse
import pathlib
import statistics
import subprocess
import tempfile

from benchmarks import targets
from benchmarks.picture import PICTURE, draw
from benchmarks.processes import PEERS, SideProgram, known_fault
from benchmarks.results import table, write_section
from benchmarks.sides.setting import LEARNING_RATES
from benchmarks.targets import Target
from benchmarks.timing import machine
from benchmarks.trials import SETS_OF_PROCESSES, TURNS, Ratio, Trial, compare_with_peers
from benchmarks.workloads import WORKLOADS

TITLES = {"sgd": "SGD", "adagrad": "Adagrad", "rowwise": "row-wise Adagrad"}
BEST = ("fbgemm", "ipex")
"""The peers that update tables in their backward pass, by module: where both are there, the faster one counts too."""
WANTED = (
    (("fbgemm",), ("sgd", "adagrad"), 4.0, 2.0),
    (("fbgemm",), ("rowwise",), 2.0, 1.3),
    (BEST, ("sgd", "adagrad"), 2.0, 1.3),
    (("plain_jax",), ("sgd", "adagrad"), 10.0, None),
    (("torch_bags",), ("sgd", "adagrad"), 4.0, None),
)
"""Peers, of which the fastest counts; optimizers; the geometric mean of ratios that is wanted, and the least ratio."""

Trials = dict[str, dict[str, dict[str, Trial]]]
"""By optimizer, workload, and module of the peer."""


def versions(peers: list[SideProgram]) -> str:
    """The releases of the peers' packages."""
    code = (
        "import importlib.metadata as m\n"
        "names = ('optax', 'torch', 'fbgemm-gpu-cpu', 'intel-extension-for-pytorch')\n"
        "print(*(f'{d.name} {d.version}' for n in names for d in m.distributions(name=n)), sep=', ')"
    )
    found = []
    for python in dict.fromkeys(peer.python for peer in peers):
        found.append(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    return "; ".join(found)


def fastest(trials: dict[str, Trial], modules: tuple[str, ...]) -> float | None:
    """The ratio of the fastest of some peers, None unless all of them ran."""
    if any(module not in trials for module in modules):
        return None
    return min(trials[module].ratio.median for module in modules)


def ratios_of(trials: dict[str, dict[str, Trial]], modules: tuple[str, ...]) -> list[float]:
    """The ratio of the fastest of some peers on each workload on which they ran."""
    found = [fastest(of_workload, modules) for of_workload in trials.values()]
    return [ratio for ratio in found if ratio is not None]


def table_of(trials: dict[str, dict[str, Trial]], able: list[SideProgram]) -> list[str]:
    """The table of one optimizer."""
    columns: list[tuple[str, ...]] = [(peer.module,) for peer in able]
    heads = ["workload", "embax, ms"]
    for peer in able:
        heads += [f"{peer.title}, ms", f"{peer.title} / embax"]
    if all((module,) in columns for module in BEST):
        columns.append(BEST)
        heads.append("better of FBGEMM and IPEX / embax")
    rows = []
    for workload, of in trials.items():
        # Peers that ran at once share embax's times.
        ours = [ms for times in {id(trial.embax): trial.embax for trial in of.values()}.values() for ms in times]
        cells = [workload, f"{statistics.median(ours):.2f}" if ours else "—"]
        for modules in columns:
            ratio = fastest(of, modules)
            if len(modules) == 1:
                trial = of.get(modules[0])
                cells += ["—", "—"] if trial is None else [f"{statistics.median(trial.peer):.2f}", str(trial.ratio)]
            else:
                cells.append("—" if ratio is None else f"{ratio:.2f}")
        rows.append(cells)
    for name, summary in (("geometric mean", statistics.geometric_mean), ("least", min)):
        cells = [name, ""]
        for modules in columns:
            found = ratios_of(trials, modules)
            cells += [""] * (len(modules) == 1) + [f"{summary(found):.2f}" if found else "—"]
        rows.append(cells)
    return table(heads, rows)


def costs_of(trials: Trials, peers: list[SideProgram]) -> list[str]:
    """The table of the peers' memory and first steps, with the first optimizer that was measured."""
    optimizer, of_workloads = next(iter(trials.items()))
    able = [peer for peer in peers if optimizer in peer.optimizers]
    heads = ["workload", "tables and slots, MB", *(f"{peer.title}, MB; first step, s" for peer in able)]
    rows = []
    for workload, of in of_workloads.items():
        cells = [workload, f"{WORKLOADS[workload].state_bytes(optimizer) / 1e6:.0f}"]
        for peer in able:
            trial = of.get(peer.module)
            cells.append("—" if trial is None else f"{trial.peak_bytes / 1e6:.0f}; {trial.first_step_s:.2f}")
        rows.append(cells)
    title = f"Peak memory beyond what a process had before its tables, and its first step, {TITLES[optimizer]}:"
    return [title, "", *table(heads, rows)]


def targets_of(trials: Trials) -> list[Target]:
    """What is wanted of ratios, for each optimizer whose peers ran on any workload."""
    found = []
    titles = {peer.module: peer.title for peer in PEERS.values()}
    for modules, optimizers, mean, least in WANTED:
        for optimizer in (one for one in optimizers if one in trials):
            ratios = ratios_of(trials[optimizer], modules)
            if not ratios:
                continue
            of = "better of " * (len(modules) > 1) + " and ".join(titles[module] for module in modules)
            text = f"step, {TITLES[optimizer]}, against {of}: geometric mean of ratios at least {mean:g}"
            values = [(statistics.geometric_mean(ratios), mean)]
            pattern = "{:.2f}"
            if least is not None:
                text += f", none below {least:g}"
                values.append((min(ratios), least))
                pattern += ", least {:.2f}"
            found.append(Target.at_least(text, pattern + f" ({len(ratios)} workloads)", *values))
    return found


def unequal(trials: Trials, peers: list[SideProgram]) -> list[str]:
    """A line about each peer that computed something else, and where."""
    where: dict[tuple[str, str], list[str]] = {}
    for optimizer, of_workloads in trials.items():
        for workload, of in of_workloads.items():
            for peer in (peer for peer in peers if peer.module in of and not of[peer.module].equal):
                fault = known_fault(peer, WORKLOADS[workload].setting(optimizer))
                assert fault is not None
                compared = f"only the first {fault.columns} columns were" if fault.columns else "nothing was"
                text = f"{fault.text}; {compared} compared"
                where.setdefault((peer.title, text), []).append(f"{workload} ({TITLES[optimizer]})")
    return [f"- {title} {text}: {', '.join(places)}." for (title, text), places in where.items()]


def report(trials: Trials, peers: list[SideProgram], rounds: int) -> str:
    """The measurements as Markdown."""
    lines = [
        "Command: `make bench-peers`. One training step in float32: ids in, sums of rows looked up, gradient (activations",
        "minus targets), tables updated. Packing is counted for embax; the ids of peers are in the form that each takes, made",
        "beforehand. Each side runs in a process of its own, on as many threads as there are cores, with its defaults, and in",
        f"{SETS_OF_PROCESSES} processes one after the other. The sides take {TURNS}, for up to {rounds}",
        "rounds; where two sides' tables do not fit into memory at once, their processes take turns, of one loop each. A loop is",
        "timed as a whole: it waits for its last step alone, so JAX computes a step while Python begins the next. Times are",
        "medians; a ratio is the median of the rounds' ratios, with its range, and above 1 where embax is faster. All sides are",
        "first checked to have the same rows and activations after a few steps, but for what stands below the tables. Where it",
        "is said below, `embax.auto_stack_tables` makes few tables of many; FBGEMM and IPEX take all tables in one call too. Not",
        "shown: anything but one machine's CPU, and the dense part of a model.",
        "",
        f"Machine: {machine()}; {versions(peers)}.",
    ]
    for optimizer, of_workloads in trials.items():
        able = [peer for peer in peers if optimizer in peer.optimizers]
        lines += ["", f"{TITLES[optimizer]}:", "", *table_of(of_workloads, able)]
    lines += ["", f"![Ratios]({PICTURE.name})", "", *costs_of(trials, peers), ""]
    lines += [f"- `{name}`: {WORKLOADS[name].describe()}." for name in next(iter(trials.values()))]
    lines += unequal(trials, peers)
    return "\n".join(lines)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--optimizers", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default 15)")
    parser.add_argument("--write", action="store_true", help="write the sections in RESULTS.md, and the picture")
    options = parser.parse_args()
    peers = [PEERS[name] for name in options.peers]
    trials: Trials = {}
    for name in options.workloads:
        workload = WORKLOADS[name]
        print(f"{name}: {workload.describe()}", flush=True)
        for optimizer in options.optimizers:
            with tempfile.TemporaryDirectory() as folder:
                found = compare_with_peers(workload, optimizer, peers, pathlib.Path(folder), options.rounds)
            trials.setdefault(optimizer, {})[name] = found
            for module, trial in found.items():
                times = f"{statistics.median(trial.embax):.2f} ms, {module} {statistics.median(trial.peer):.2f} ms"
                print(f"  {optimizer}: embax {times}, ratio {trial.ratio}", flush=True)
    text = report(trials, peers, options.rounds)
    print("\n" + text)
    if options.write:
        write_section("Training steps", text)
        ratios: dict[str, dict[str, dict[str, Ratio]]] = {
            TITLES[optimizer]: {
                workload: {peer.title: of[peer.module].ratio for peer in peers if peer.module in of}
                for workload, of in of_workloads.items()
            }
            for optimizer, of_workloads in trials.items()
        }
        draw(ratios)
    targets.report(targets_of(trials), options.write)


if __name__ == "__main__":
    main()
