"""The program of a side: it makes the side's tables, then obeys commands, a line of JSON each, and answers in such lines.

`benchmarks.processes` starts it, with: python -m benchmarks.sides.worker MODULE SETTING
"""

import contextlib
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sides.setting import Setting, Side


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since the peak was last forgotten."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))


def forget_peak() -> None:
    """Begins the peak of memory anew, where the system lets a process do that."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """A side with its tables, and what may be asked of it."""

    def __init__(self, side: Side, dim: int):
        self.side, self.dim = side, dim
        forget_peak()
        self.before = resident("VmRSS")
        start = time.perf_counter()
        side.make_tables()
        self.made_s = time.perf_counter() - start
        self.parts = side.parts()

    def time(self, part: str, first: int, count: int, untimed: int = 1) -> list[float]:
        """Milliseconds of `count` calls with batches from number `first` on, after `untimed` ones with those before it.

        So what is timed does not find its rows in caches because the call before had the same batch.
        """
        call = self.parts[part]
        for number in range(first - untimed, first):
            call(number)
        times = []
        for number in range(first, first + count):
            start = time.perf_counter()
            call(number)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def loop(self, first: int, count: int, untimed: int) -> float:
        """Milliseconds of a step, in a loop of `count` of them from batch number `first` on, as of a training program.

        `untimed` steps come before it. A side whose steps are computed while Python goes on waits for none but the last one.
        """
        begin, step = self.parts.get("begin_step", self.parts["step"]), self.parts["step"]

        def run(numbers: range) -> None:
            for number in numbers[:-1]:
                begin(number)
            step(numbers[-1])

        if untimed:
            run(range(first - untimed, first))
        start = time.perf_counter()
        run(range(first, first + count))
        return (time.perf_counter() - start) * 1e3 / count

    def sum(self, number: int, columns: int | None) -> float:
        """The sum of a batch's activations, of the first columns or of all."""
        return float(self.side.activations(number).reshape(-1, self.dim)[:, :columns].sum(dtype=np.float64))

    def rows(self, table: int, ids: str, out: str) -> None:
        """Writes rows of a table to the file `out`; `ids` is a file too."""
        np.save(out, self.side.rows(table, np.load(ids)))

    def memory(self) -> dict[str, Any]:
        """Bytes by which this process has grown since before it had tables, at most and now, and how long making them took."""
        peak, now = (resident(field) - self.before for field in ("VmHWM", "VmRSS"))
        forget_peak()
        return {"peak": peak, "now": now, "made_s": self.made_s}


def serve(commands: Any, answer: Callable[[Any], None], make: Callable[[], Worker]) -> None:
    """Obeys commands: a name and keyword arguments each."""
    worker = make()
    answer(None)
    for line in commands:
        command = json.loads(line)
        answer(getattr(worker, command.pop("do"))(**command))


def main() -> None:
    """Serves the side that the command line names."""
    name, text = sys.argv[1:]
    # Frameworks print what they like; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def make() -> Worker:
        module = importlib.import_module(f"benchmarks.sides.{name}")
        if hasattr(module, "worker"):  # Of a side that is told something else than a `Setting`.
            return module.worker(text)
        setting = Setting.from_json(text)
        return Worker(module.Side(setting, *setting.read()), setting.dim)

    serve(sys.stdin, answer, make)


if __name__ == "__main__":
    main()
