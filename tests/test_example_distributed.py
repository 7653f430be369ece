"""The launcher and the program in examples/distributed."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("flax.nnx")


def launch(processes: int, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.distributed.launch", f"--processes={processes}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False)


def program(folder: Path, text: str) -> Path:
    (folder / "program.py").write_text("import os, sys, time\n" + textwrap.dedent(text))
    return folder


def test_launcher_numbers_the_lines_of_each_process(tmp_path):
    path = program(tmp_path, 'print(os.environ["JAX_PROCESS_ID"], os.environ["JAX_NUM_PROCESSES"], sys.argv[1:])')
    done = launch(3, "program", "--steps", "7", path=path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i} 3 ['--steps', '7']" for i in range(3)]


def test_launcher_ends_all_when_one_fails(tmp_path):
    path = program(
        tmp_path,
        """
        if os.environ["JAX_PROCESS_ID"] == "1":
            sys.exit(3)
        time.sleep(200)
        """,
    )
    started = time.monotonic()
    done = launch(3, "program", path=path)
    assert done.returncode == 3
    assert done.stdout == "[1] failed with status 3; ending the others\n"
    assert time.monotonic() - started < 150  # and not the 200 seconds that the others sleep


def losses_of(done: subprocess.CompletedProcess) -> dict[int, float]:
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^\[0\] step (\d+): loss ([\d.]+)$", done.stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def test_processes_learn_what_one_does_and_others_go_on(tmp_path):
    """Two processes for 20 steps, then one from their checkpoint: the losses of one that was never interrupted."""
    options = ("--batch-size=64", "--save-every=20", f"--checkpoints={tmp_path}")
    whole = losses_of(launch(1, "examples.distributed", "--steps=40", "--batch-size=64"))
    first = launch(2, "examples.distributed", "--steps=20", *options)
    second = launch(1, "examples.distributed", "--steps=40", *options)
    assert "processes: 2, devices: 2" in first.stdout
    assert "resumed after step 20" in second.stdout
    assert losses_of(first) | losses_of(second) == pytest.approx(whole, rel=1e-4)
    assert min(losses_of(second)) == 30
