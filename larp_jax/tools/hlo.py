"""Collectives and memory traffic of a compiled program, read from its text (`Compiled.as_text()`).

XLA's own cost analysis counts the body of each loop once. Here, loop bodies count as often as they run, if XLA knows
the trip count or the loop counts up to a constant, as `jax.lax.scan` does. All branches of a conditional count.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # the names of other types contain their bits
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Without memory traffic of their own: they name or forward arrays, or call computations that are counted.
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all partition-id replica-id iota "
    "opt-barrier add-dependency".split()
)
READS_A_PART = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: name, result shapes (as text), opcode, operands, attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size in a step.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: number of runs in a step.
      group: number of participating devices.
      bytes: size of the whole array: after gathering, or before scattering.
    """

    kind: str
    count: int
    group: int
    bytes: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in a step, with the algorithms that send least."""
        share = (self.group - 1) / self.group
        passes = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        if self.kind == "all-to-all":
            passes /= self.group
        return self.count * passes * self.bytes


class Program:
    """A compiled program, as it runs on one device."""

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)
        partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self._devices = int(partitions[1]) if partitions else 1
        self._shapes = {
            name: {line.name: line.shape for line in lines} for name, lines in self._computations.items()
        }

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """Number of runs of each computation in a step, including those inside fusions."""
        counts = collections.Counter()

        def visit(name, times):
            counts[name] += times
            for line in self._computations.get(name, ()):
                trips = self._trips(name, line) if line.opcode == "while" else 1
                for called in _calls(line):
                    visit(called, times * trips)

        visit(self._entry, 1)
        return dict(counts)

    def _trips(self, name: str, loop: Instruction) -> int:
        """How often the loop, an instruction of the computation `name`, runs; 1 if that cannot be told.

        XLA for CPUs and GPUs notes it. libtpu does not, but leaves the condition: a counter below a constant.
        """
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        lines = {line.name: line for line in self._computations.get(condition[1] if condition else "", ())}
        root = next((line for line in lines.values() if line.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        counter, bound = (lines.get(operand) for operand in root.operands)
        index = re.search(r"index=(\d+)", counter.attributes) if counter else None
        outside = {line.name: line for line in self._computations[name]}
        start = outside.get(loop.operands[0])
        if start is not None and start.opcode == "tuple" and index:
            start = outside.get(start.operands[int(index[1])])
        while start is not None and start.opcode in ("copy", "bitcast"):
            start = outside.get(start.operands[0])
        first, end = (_integer(line) for line in (start, bound))
        return 1 if first is None or end is None else max(0, end - first)

    def collectives(self) -> list[Collective]:
        """The collectives, largest total first."""
        found = collections.Counter()
        for name, times in self.runs.items():
            for line in self._computations.get(name, ()):
                kind = line.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    size = sum(_size(self._shapes[name].get(operand, "")) for operand in line.operands)
                    if kind == "all-gather":  # the size of the result; that of all-gather-start includes the operands
                        size = _size(line.shape) - size * (line.opcode != kind)
                    found[kind, _group(line.attributes) or self._devices, size] += times
        listed = [Collective(kind, count, group, size) for (kind, group, size), count in found.items()]
        return sorted(listed, key=lambda c: -c.count * c.bytes)

    def transfers(self) -> list[Collective]:
        """What is exchanged between slices over the data center network, largest total first.

        libtpu compiles collectives over several slices into collectives within each slice and transfers of each chip to
        the chips of the same place in the other slices. `group` is the number of slices.
        """
        found = collections.Counter()
        for name, times in self.runs.items():
            for line in self._computations.get(name, ()):
                kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
                if line.opcode == "send" and kind:
                    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line.attributes)
                    size = _size(self._shapes[name].get(line.operands[0], ""))
                    found[kind[1].lower().replace("_", "-"), _count(target[1]) if target else 2, size] += times
        listed = [Collective(kind, count, group, size) for (kind, group, size), count in found.items()]
        return sorted(listed, key=lambda c: -c.count * c.bytes)

    def traffic(self) -> int:
        """Bytes read from and written to the main memory of the device in a step: operands and results of instructions.

        A fusion reads its operands and writes its result once. If an array is only sliced, the slices count; if it is
        updated in place, the updates count. Arrays that XLA keeps in faster memory do not count.
        """
        inside = {called for lines in self._computations.values() for line in lines if line.opcode == "fusion"
                  for called in _calls(line)}  # fmt: skip
        total = 0
        for name, times in self.runs.items():
            if name not in inside:
                lines = self._computations.get(name, ())
                total += times * sum(self._moved(name, line) for line in lines if not self._is_reducer(name))
        return total

    def _is_reducer(self, name: str) -> bool:
        """Whether a computation works on scalars, such as the function that a reduction applies to each element."""
        return all(_elements(line.shape) <= 1 for line in self._computations[name])

    def _moved(self, computation: str, line: Instruction) -> int:
        if line.opcode in FREE or line.opcode.endswith(("-done", "-update")):
            return 0
        shapes = self._shapes[computation]
        operands = [_size(shapes.get(operand, ""), main=True) for operand in line.operands]
        if line.opcode in READS_A_PART:
            return 2 * _size(line.shape, main=True)
        if line.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if line.opcode.endswith("-start"):  # the result includes the operands
            return 2 * sum(operands)
        result = _size(line.shape, main=True)
        if line.opcode == "fusion":
            (fused,) = _calls(line)
            operands, result = self._fusion(fused, operands, result)
        return sum(operands) + result

    def _fusion(self, fused: str, operands: list[int], result: int) -> tuple[list[int], int]:
        """Bytes that a fusion reads of each operand and writes of its result."""
        lines, shapes = self._computations[fused], self._shapes[fused]
        users = collections.defaultdict(list)
        for line in lines:
            for operand in line.operands:
                users[operand].append(line)
        operands = list(operands)
        for line in lines:
            if line.opcode == "parameter":
                index, used = int(line.operands[0]), users[line.name]
                if used and operands[index] and all(user.opcode in READS_A_PART for user in used):
                    operands[index] = min(operands[index], sum(_size(user.shape) for user in used))
            elif line.opcode == "dynamic-update-slice" and _size(line.shape) == result:
                update = _size(shapes.get(line.operands[1], ""))
                result = update
                target = next((other for other in lines if other.name == line.operands[0]), None)
                if target is not None and target.opcode == "parameter":
                    operands[int(target.operands[0])] = update
        return operands, result


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by its name, and the name of the entry computation."""
    computations, entry, lines = {}, "", None
    for row in text.splitlines():
        if lines is None:
            if row.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) ", row)):
                lines = computations[match[2]] = []
                entry = match[2] if match[1] else entry
        elif row.startswith("}"):
            lines = None
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", row):
            lines.append(_instruction(match[2], row[match.end() :], bool(match[1])))
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or ((inside,) if opcode in ("parameter", "constant") else ())
    return Instruction(name, shape, opcode, operands, rest[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _calls(line: Instruction) -> Iterator[str]:
    """Computations that an instruction calls."""
    yield from re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)",
                          line.attributes)  # fmt: skip
    for branches in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line.attributes):
        yield from (name.strip().removeprefix("%") for name in branches.split(","))


def _integer(line: Instruction | None) -> int | None:
    """The value of an integer constant; None for anything else."""
    text = line.operands[0] if line is not None and line.opcode == "constant" and line.operands else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _arrays(shape: str) -> Iterable[tuple[str, list[int], bool]]:
    """(element type, dimensions, whether it is in main memory) of each array of a shape."""
    for match in re.finditer(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        dimensions = [int(size.lstrip("<=")) for size in match[2].split(",") if size]
        yield match[1], dimensions, not re.search(r"S\([1-9]", match[3] or "")


def _elements(shape: str) -> int:
    return sum(math.prod(dimensions) for _, dimensions, _ in _arrays(shape))


def _size(shape: str, *, main: bool = False) -> int:
    """Bytes of a shape; with `main`, only of the arrays in main memory."""
    total = 0
    for kind, dimensions, in_main in _arrays(shape):
        if main and not in_main:
            continue
        digits = re.search(r"\d+", kind)
        bits = BITS[kind] if kind in BITS else int(digits[0]) if digits else 0
        total += math.prod(dimensions) * bits // 8
    return total


def _count(numbers: str) -> int:
    """How many numbers are in a list such as `1,2` or `0:3,7`, in which a range includes its end."""
    ranges = [part.split(":") for part in numbers.split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _group(attributes: str) -> int:
    """Devices in each group of a collective, from any of XLA's notations; 0 for all devices."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=@?\w*mesh\w*\[(.*?)\] ?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    return 2 if "source_target_pairs" in attributes else 0
