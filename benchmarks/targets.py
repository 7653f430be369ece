"""What this project wants to reach, beside what was measured: a section of the page that several benchmarks fill."""

import re
from typing import NamedTuple

from benchmarks.results import read_section, write_section

SECTION = "Targets"


class Target(NamedTuple):
    """One line of the section.

    Args:
        text: what is wanted.
        measured: what was found.
        met: whether it is reached.
    """

    text: str
    measured: str
    met: bool

    @classmethod
    def at_least(cls, text: str, pattern: str, *values_and_bounds: tuple[float, float]) -> "Target":
        """Of values that reach their bounds or not; `pattern` formats the values."""
        values = [value for value, _ in values_and_bounds]
        return cls(text, pattern.format(*values), all(value >= bound for value, bound in values_and_bounds))

    @classmethod
    def at_most(cls, text: str, pattern: str, value: float, bound: float) -> "Target":
        """Of a value that stays within its bound or not."""
        return cls(text, pattern.format(value), value <= bound)

    def line(self) -> str:
        """The line of the table."""
        return f"| {self.text} | {self.measured} | {'yes' if self.met else '**no**'} |"


def table(targets: list[Target], others: str = "") -> str:
    """The targets as a table, after those lines of another table that are about others."""
    lines = {line.split("|")[1].strip(): line for line in others.splitlines() if re.match(r"\| (?!target )", line)}
    lines |= {target.text: target.line() for target in targets}
    header = ["| target | measured | met |", "|---|---|---|"]
    return "\n".join([*header, *(lines[text] for text in sorted(lines))])


def report(targets: list[Target], write: bool) -> None:
    """Prints targets, and writes them into the section if asked for; what it says of others stays."""
    print("\n" + table(targets), flush=True)
    if write:
        text = "Each line is of the last run of a benchmark that measured it on all of its workloads."
        write_section(SECTION, text + "\n\n" + table(targets, read_section(SECTION)))
