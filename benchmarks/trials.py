"""Comparisons of sides in turns: as many processes at once as memory holds, after a check that all compute the same."""

import itertools
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.processes import EMBAX, SOUND_COLUMNS, Fault, SideProcess, SideProgram, running
from benchmarks.sides.setting import Setting
from benchmarks.workloads import WORKLOADS, Workload

CHECKED_BATCHES = (0, 1, 0)
CHECKED_TABLES = 4
CHECKED_ROWS = 5_000
PAUSE_S = 0.04
"""Between turns: threads of the side before may still wait for work in a loop, or give memory back."""
WARM_STEPS = 2
STEPS_OF_A_TURN = 12
TURNS = f"turns, each a loop of up to {STEPS_OF_A_TURN} steps"
"""What `alternate` does, for readers."""
TURN_MS = 500.0
"""A turn takes about so long at most, unless a single step takes longer."""
SETS_OF_PROCESSES = 2
"""A process may get memory from the system that is slow for all of its life, so a comparison is of several processes a side."""
ENOUGH_S = 15.0
"""The turns of one set of processes end after so long, with `FEWEST_ROUNDS` at least."""
FEWEST_ROUNDS = 4
MARGIN = 0.1
"""Share of the memory that stays free, beside what frameworks need."""
FRAMEWORK_BYTES = 600e6


class Ratio(NamedTuple):
    """A median of ratios and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> "Ratio":
        """Of the ratios of two sides, round by round."""
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Trial(NamedTuple):
    """A peer beside embax: milliseconds of each round, and what else was found."""

    embax: list[float]
    peer: list[float]
    first_step_s: float
    peak_bytes: float
    equal: bool
    """Whether the peer computed the same, but for rounding."""

    @property
    def ratio(self) -> Ratio:
        """Of peer to embax."""
        return Ratio.of(self.peer, self.embax)


def available_bytes() -> float:
    """Memory that processes may take now."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def needed_bytes(program: SideProgram, workload: Workload, optimizer: str) -> float:
    """Memory of a side, by computation."""
    extra = program.state_factor() * workload.table_bytes
    return workload.state_bytes(optimizer) + extra + FRAMEWORK_BYTES


def fits(program: SideProgram, workload: Workload, optimizer: str, available: float) -> bool:
    """Whether the memory that is available holds a side alone."""
    return needed_bytes(program, workload, optimizer) <= (1 - MARGIN) * available


def cases(names: list[str], optimizers: list[str]) -> Iterator[tuple[Workload, str]]:
    """Workloads and optimizers whose memory is there for embax, which is looked at when each comes; the others are named."""
    for name, optimizer in itertools.product(names, optimizers):
        if fits(EMBAX, WORKLOADS[name], optimizer, available_bytes()):
            yield WORKLOADS[name], optimizer
        else:
            print(f"{name}, {optimizer}: does not fit into memory", flush=True)


def groups_of(
    peers: list[SideProgram], workload: Workload, optimizer: str, available: float
) -> tuple[list[list[SideProgram]], list[list[SideProgram]], list[SideProgram]]:
    """Peers that run at the same time as embax, those that take turns with it as processes, and those that do not fit at all."""
    together: list[list[SideProgram]] = []
    in_turns, left_out = [], []
    budget = (1 - MARGIN) * available
    room = budget - needed_bytes(EMBAX, workload, optimizer)
    used = 0.0
    for peer in sorted(peers, key=lambda peer: needed_bytes(peer, workload, optimizer)):
        needed = needed_bytes(peer, workload, optimizer)
        if not fits(peer, workload, optimizer, available):
            left_out.append(peer)
        elif needed > room:
            in_turns.append(peer)
        elif together and used + needed <= room:
            together[-1].append(peer)
            used += needed
        else:
            together.append([peer])
            used = needed
    return together, [in_turns] if in_turns else [], left_out


class Observed(NamedTuple):
    """What a side has after its first steps: sums of activations, of the columns that all sides compute right and of all."""

    sound_sums: list[float]
    sums: list[float]
    rows: list[np.ndarray]
    first_step_s: float


def observed(side: SideProcess, ids: np.ndarray) -> Observed:
    """Takes the first steps of a side, in which batches repeat, and looks at activations and at touched rows of several tables.

    Args:
        side: a side that has taken no step yet.
        ids: int32[batches, num_tables, batch, valency].
    """
    start = side.time(CHECKED_BATCHES[0], untimed=0)[0]
    for number in CHECKED_BATCHES[1:]:
        side.time(number, untimed=0)
    numbers = sorted(set(CHECKED_BATCHES))
    rows = []
    for table in np.unique(np.linspace(0, ids.shape[1] - 1, CHECKED_TABLES).astype(int)):
        touched = np.unique(ids[numbers, table])
        rows.append(side.rows(int(table), touched[:: max(len(touched) // CHECKED_ROWS, 1)]))
    sound, whole = ([side.sum(number, columns) for number in numbers] for columns in (SOUND_COLUMNS, None))
    return Observed(sound, whole, rows, start / 1e3)


def compare(title: str, expected: Observed, found: Observed, fault: Fault | None = None) -> bool:
    """Whether a side computed what is expected, up to float32's rounding in another order.

    Args:
        title: the side's name.
        expected: what embax has.
        found: what the side has.
        fault: what it is known to compute wrong.

    Raises:
        AssertionError: it did not, where it is not known for that.
    """

    def check(columns: int | None) -> None:
        if columns == 0:
            return
        sums = (one.sound_sums if columns else one.sums for one in (found, expected))
        np.testing.assert_allclose(*sums, rtol=1e-4, err_msg=f"sums of activations of {title}")
        for ours, theirs in zip(expected.rows, found.rows, strict=True):
            a, b = theirs[:, :columns], ours[:, :columns]
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"rows of {title}")

    if fault is None:
        check(None)
        return True
    check(fault.columns)
    try:
        check(None)
    except AssertionError:
        return False
    return True


def alternate(sides: list[SideProcess], rounds: int) -> list[list[float]]:
    """Milliseconds of a step of each side, which take turns: each a loop of steps, after some that are not timed.

    Of slow steps a turn has fewer.
    """
    times: list[list[float]] = [[] for _ in sides]
    number = 1
    counts = [max(1, min(STEPS_OF_A_TURN, int(TURN_MS / side.loop(number, count=1, untimed=1)))) for side in sides]
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.monotonic() - start > ENOUGH_S:
            break
        for place, side in enumerate(sides):
            time.sleep(PAUSE_S)
            untimed = min(WARM_STEPS, counts[place])
            times[place].append(side.loop(number + untimed, count=counts[place], untimed=untimed))
        number += STEPS_OF_A_TURN
    return times


def trials_of(
    peers: list[SideProgram],
    times: list[list[float]],
    first_steps_s: list[float],
    peaks: list[float],
    equal: list[bool],
) -> dict[str, Trial]:
    """A trial of each peer, by module, from lists that begin with embax."""
    return {
        peer.module: Trial(times[0], times[place], first_steps_s[place], peaks[place], equal[place])
        for place, peer in enumerate(peers, start=1)
    }


def together(peers: list[SideProgram], setting: Setting, ids: np.ndarray, rounds: int) -> dict[str, Trial]:
    """Sets of processes, each of embax and of peers that run at the same time; the rounds are divided among the sets."""
    programs = [EMBAX, *peers]
    times: list[list[float]] = [[] for _ in programs]
    firsts, peaks, equal = [0.0] * len(programs), [0.0] * len(programs), [True] * len(programs)
    for number in range(min(SETS_OF_PROCESSES, rounds)):
        with running(*((program, setting) for program in programs)) as sides:
            results = [observed(side, ids) for side in sides]
            for place, (side, result) in enumerate(zip(sides, results, strict=True)):
                equal[place] &= compare(side.program.title, results[0], result, side.fault)
            rounds_of_set = rounds // SETS_OF_PROCESSES + (number < rounds % SETS_OF_PROCESSES)
            for place, of_turns in enumerate(alternate(sides, rounds_of_set)):
                times[place] += of_turns
            firsts = [result.first_step_s for result in results]
            peaks = [max(peak, side.memory()["peak"]) for peak, side in zip(peaks, sides, strict=True)]
    return trials_of(peers, times, firsts, peaks, equal)


def in_turns(peers: list[SideProgram], setting: Setting, ids: np.ndarray, rounds: int) -> dict[str, Trial]:
    """Processes of embax and of peers that take turns: each is started, warmed, timed by one loop and stopped, in each set."""
    programs = [EMBAX, *peers]
    times: list[list[float]] = [[] for _ in programs]
    firsts, peaks, equal = [0.0] * len(programs), [0.0] * len(programs), [True] * len(programs)
    for _ in range(min(SETS_OF_PROCESSES, rounds)):
        expected = None
        for place, program in enumerate(programs):
            with running((program, setting)) as (side,):
                result = observed(side, ids)
                expected = expected or result
                equal[place] &= compare(program.title, expected, result, side.fault)
                times[place].append(side.loop(WARM_STEPS, count=STEPS_OF_A_TURN, untimed=WARM_STEPS))
                firsts[place], peaks[place] = result.first_step_s, max(peaks[place], side.memory()["peak"])
    return trials_of(peers, times, firsts, peaks, equal)


def compare_with_peers(
    workload: Workload, optimizer: str, peers: list[SideProgram], folder: pathlib.Path, rounds: int
) -> dict[str, Trial]:
    """A trial of each peer that has the optimizer and whose memory is there, by module."""
    peers = [peer for peer in peers if optimizer in peer.optimizers]
    ids = workload.write(folder)
    setting = workload.setting(optimizer, str(folder))
    at_once, turns, left_out = groups_of(peers, workload, optimizer, available_bytes())
    for peer in left_out:
        needed = needed_bytes(peer, workload, optimizer) / 1e9
        print(f"{workload.name}, {optimizer}: {peer.title} would need {needed:.1f} GB and is left out", flush=True)
    trials: dict[str, Trial] = {}
    for group in at_once:
        trials |= together(group, setting, ids, rounds)
    for group in turns:
        trials |= in_turns(group, setting, ids, rounds)
    return trials
