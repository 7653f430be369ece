"""The processes of sides, as this program sees them: started, commanded over pipes, stopped."""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sides.model_setting import ModelSetting
from benchmarks.sides.setting import Setting

ROOT = pathlib.Path(__file__).parents[1]


class SideProgram(NamedTuple):
    """What runs as a side.

    Args:
        title: its name for readers.
        module: a module of `benchmarks.sides`.
        environment: the environment that it needs, None for that of this program.
        optimizers: those that it has.
    """

    title: str
    module: str
    environment: str | None
    optimizers: tuple[str, ...]

    @property
    def python(self) -> str:
        """The interpreter."""
        return sys.executable if self.environment is None else str(ROOT / self.environment / "bin" / "python")

    def state_factor(self) -> float:
        """How many times the memory of its tables a step needs beside tables and slots."""
        # A gradient of each table and an update.
        return 2.0 if self.module == "plain_jax" else 0.0


EMBAX = SideProgram("embax", "embax_side", None, ("sgd", "adagrad", "rowwise"))
PEERS = {
    "jax": SideProgram("plain JAX + optax", "plain_jax", None, ("sgd", "adagrad")),
    "torch": SideProgram("torch", "torch_bags", "build/venv-torch", ("sgd", "adagrad")),
    "fbgemm": SideProgram("FBGEMM", "fbgemm", "build/venv-torch", ("sgd", "adagrad", "rowwise")),
    "ipex": SideProgram("IPEX", "ipex", "build/venv-ipex", ("sgd", "adagrad")),
}


class Fault(NamedTuple):
    """What a side is known to compute wrong.

    Args:
        text: what.
        columns: how many columns of a row it computes right at least.
    """

    text: str
    columns: int


SOUND_COLUMNS = 8
"""As many floats as the shortest vector has."""


def known_fault(program: SideProgram, setting: Setting | ModelSetting) -> Fault | None:
    """What the releases that the makefile names compute wrong, of tables alone."""
    if not isinstance(setting, Setting):
        return None
    if program.module == "ipex" and setting.dim > SOUND_COLUMNS:
        return Fault("updates all columns with the gradient of the first vector of columns", SOUND_COLUMNS)
    if program.module == "fbgemm" and setting.optimizer == "rowwise" and 4 * setting.vocabulary * setting.dim > 1 << 32:
        return Fault("updates other rows instead of those beyond the first 4 GiB of a table", 0)
    return None


class SideProcess:
    """A running side. Its methods wait for its answer.

    Args:
        program: what runs.
        setting: what it is told.

    Raises:
        RuntimeError: in any method, if the process has ended; with the last lines that it printed.
    """

    def __init__(self, program: SideProgram, setting: Setting | ModelSetting):
        self.program = program
        self.fault = known_fault(program, setting)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [program.python, "-m", "benchmarks.sides.worker", program.module, setting.to_json()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Waits until tables are made."""
        self._answer()

    def time(self, number: int, count: int = 1, part: str = "step", untimed: int = 1) -> list[float]:
        """Milliseconds of `count` calls in a row, from batch `number` on, after calls that are not timed."""
        return self._ask("time", part=part, first=number, count=count, untimed=untimed)

    def loop(self, number: int, count: int, untimed: int) -> float:
        """Milliseconds of a step in a loop of `count` of them, from batch `number` on, after steps that are not timed."""
        return self._ask("loop", first=number, count=count, untimed=untimed)

    def sum(self, number: int, columns: int | None = None) -> float:
        """The sum of the activations of a batch, of the first columns or of all."""
        return self._ask("sum", number=number, columns=columns)

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: f"{folder}/{name}.npy" for name in ("ids", "out")}
            np.save(files["ids"], ids)
            self._ask("rows", table=table, **files)
            return np.load(files["out"])

    def losses(self, numbers: list[int]) -> list[float]:
        """The losses of a model's steps with these batches."""
        return self._ask("losses", numbers=numbers)

    def memory(self) -> dict[str, float]:
        """`Worker.memory`."""
        return self._ask("memory")

    def stop(self) -> None:
        """Ends the process, and waits for that."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, do: str, **arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # It has ended, and left the reason in its log.
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            printed = "".join(self._log.readlines()[-20:])
            raise RuntimeError(f"the process of {self.program.title} ended with status {status}:\n{printed}")
        return json.loads(line)


@contextlib.contextmanager
def running(*sides: tuple[SideProgram, Setting | ModelSetting]) -> Iterator[list[SideProcess]]:
    """Processes of sides, which start at the same time and whose tables are made; they are stopped in the end."""
    with contextlib.ExitStack() as stack:
        processes = []
        for program, setting in sides:
            process = SideProcess(program, setting)
            stack.callback(process.stop)
            processes.append(process)
        for process in processes:
            process.wait_until_ready()
        yield processes
