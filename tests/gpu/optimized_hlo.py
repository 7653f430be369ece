"""Reads what XLA made of a step, and names the instructions whose cost follows the vocabulary or that meet in one place."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Name, type, opcode, operands and attributes of an instruction. The type of a tuple may hold comments: /*index=5*/.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")

# These hand on a buffer, and no byte of it is touched. A fusion is judged by what lies in its computation: where one updates
# a buffer that is read later, XLA has put a `copy` before it, since the update of a fusion is always in place.
_HANDS_ON = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "fusion", "optimization-barrier"}


class Instruction(NamedTuple):
    """One line of a computation."""

    computation: str
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @property
    def elements(self) -> int:
        """Elements of the largest array of the result."""
        shapes = _ARRAY.findall(self.type)
        return max((math.prod(int(size) for size in shape.split(",") if size) for shape in shapes), default=0)


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of all computations of `compiled.as_text()`.

    Raises:
        ValueError: a line is none that this can read.
    """
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif match := _INSTRUCTION.match(line):
            yield Instruction(computation, *match.groups())
        elif re.match(r"\s+(ROOT )?%", line):
            raise ValueError(f"This is no instruction as XLA wrote them when this was made: {line}")


def violations(text: str, num_elements: int) -> list[str]:
    """What a step must not hold that updates tables in place, at a cost of the batch.

    Args:
        text: `compiled.as_text()`.
        num_elements: elements of the smallest table or slot; nothing of the batch is that large.

    Returns:
        The instructions that scatter to indices which are not known to be unique and sorted; that make an array as large
        as a table, other than by scattering into one; or that read a table other than by gathering from it or scattering
        into it. None if the step is good.
    """
    found = list(instructions(text))
    large = {(i.computation, i.name) for i in found if i.elements >= num_elements}
    bad = []
    for one in found:
        makes = (one.computation, one.name) in large
        reads = [k for k, name in enumerate(one.operands) if (one.computation, name) in large]
        if one.opcode == "scatter" and not all(
            f"{flag}=true" in one.rest for flag in ("unique_indices", "indices_are_sorted")
        ):
            bad.append(f"duplicates: {one.name} of type {one.type}")
        if one.opcode in _HANDS_ON:
            continue
        # Of all operands of a scatter or gather, the first is what it scatters into or gathers from.
        if makes and not (one.opcode == "scatter" and reads == [0]):
            bad.append(f"as large as a table: {one.opcode} {one.name} of type {one.type}")
        elif reads and not (one.opcode in ("scatter", "gather") and reads == [0]):
            bad.append(f"reads a table: {one.opcode} {one.name} of type {one.type}")
    return bad
