"""Measures embax alone: the parts of its steps, memory, growth, overhead, and its kernels beside what memory gives.

`make bench` runs it; or: python -m benchmarks.run [--sections ceiling memory] [--workloads wide] [--write]
"""

import argparse

from benchmarks import targets
from benchmarks.ceiling import report_ceiling
from benchmarks.memory import report_memory
from benchmarks.parts import report_growth, report_hot, report_overhead, report_parts
from benchmarks.results import write_section
from benchmarks.sides.setting import LEARNING_RATES
from benchmarks.timing import machine
from benchmarks.workloads import WORKLOADS


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--optimizers", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each kind (default 30)")
    parser.add_argument("--write", action="store_true", help="write the sections in RESULTS.md")
    reports = {
        "parts": ("Parts of a step", lambda o: report_parts(o.workloads, o.optimizers, o.rounds)),
        "hot": ("One hot id", lambda o: report_hot(o.optimizers, o.rounds)),
        "growth": ("Growth with the vocabulary", lambda o: report_growth(o.rounds)),
        "overhead": ("Overhead", lambda o: report_overhead()),
        "memory": ("Memory", lambda o: report_memory(o.workloads, o.optimizers)),
        "ceiling": ("Kernels and the memory's ceiling", lambda o: report_ceiling(o.rounds)),
    }
    parser.add_argument("--sections", nargs="+", choices=reports, default=list(reports))
    options = parser.parse_args()
    found = []
    for name in options.sections:
        title, report = reports[name]
        lines, of_section = report(options)
        found += of_section
        text = "\n".join(["Command: `make bench`.", "", f"Machine: {machine()}.", "", *lines])
        print(f"\n## {title}\n\n{text}\n", flush=True)
        if options.write:
            write_section(title, text)
    if found:
        targets.report(found, options.write)


if __name__ == "__main__":
    main()
