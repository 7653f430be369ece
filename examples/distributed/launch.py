"""Starts a program as several processes of this machine, which talk over the loopback interface.

``python -m examples.distributed.launch --processes 4 examples.distributed --steps 100`` runs ``python -m
examples.distributed --steps 100`` four times. Each process finds in its environment what `initialize` of
examples/distributed/__main__.py reads: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Every line of output
gets the number of its process in front. When one process fails the others are ended, and the exit status is that of the first
that failed.
"""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0  # between asking a process to end and killing it


def launch(arguments: list[str], processes: int) -> int:
    """Runs ``python -m *arguments`` in several processes at once.

    Returns:
      0 if all of them returned 0, else what the first that failed returned; -n if signal n ended it.
    """
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    running: dict[int, subprocess.Popen[str]] = {}
    watchers: list[threading.Thread] = []
    status = 0
    try:
        for number in range(processes):
            running[number] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**environment, "JAX_PROCESS_ID": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            watchers.append(threading.Thread(target=_watch, args=(number, running[number], ended)))
            watchers[-1].start()
        while running and status == 0:
            number, status = ended.get()
            del running[number]
            if status:
                print(f"[{number}] failed with status {status}; ending the others", flush=True)
    finally:
        _end(list(running.values()))
        for watcher in watchers:
            watcher.join()
    return status


def _watch(number: int, process: "subprocess.Popen[str]", ended: "queue.Queue[tuple[int, int]]") -> None:
    """Passes the output of a process on, line by line, and then its exit status."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{number}] {line.rstrip()}", flush=True)
    ended.put((number, process.wait()))


def _end(processes: "list[subprocess.Popen[str]]") -> None:
    """Asks processes to end, and kills those that do not."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Reads the options, and runs what follows them."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.distributed.launch",
        description="Run a Python module as several processes of one machine.",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("module", help="what each process runs by python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}; it must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(launch([options.module, *options.arguments], options.processes))


if __name__ == "__main__":
    main()
