"""What a compiled program does, read from its text (`Compiled.as_text()`): collectives and memory traffic.

XLA's own cost analysis takes the body of each loop once. Here loops count as often as they run, as far as XLA knows
that, and of a conditional all branches count.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # the others have them in their names
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# They move nothing themselves: they name, they hand on, or what they call is counted.
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all partition-id replica-id iota "
    "opt-barrier add-dependency".split()
)
READS_A_PART = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: its name, what it gives (shapes as text), what it does, to what, and how."""

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
      kind: of `COLLECTIVES`.
      count: how often they run.
      group: devices that take part in each.
      bytes: of the whole array, gathered or before it is scattered.
    """

    kind: str
    count: int
    group: int
    bytes: int

    @property
    def wire_bytes(self) -> float:
        """What each device sends in all, by the algorithms that send least."""
        share = (self.group - 1) / self.group
        passes = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        if self.kind == "all-to-all":
            passes /= self.group
        return self.count * passes * self.bytes


class Program:
    """A compiled program of one device."""

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)
        partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self._devices = int(partitions[1]) if partitions else 1
        self._shapes = {
            name: {line.name: line.shape for line in lines} for name, lines in self._computations.items()
        }

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in a step, those inside of fusions included."""
        counts = collections.Counter()

        def visit(name, times):
            counts[name] += times
            for line in self._computations.get(name, ()):
                for called, factor in _calls(line):
                    visit(called, times * factor)

        visit(self._entry, 1)
        return dict(counts)

    def collectives(self) -> list[Collective]:
        """The collectives, largest total first."""
        found = collections.Counter()
        for name, times in self.runs.items():
            for line in self._computations.get(name, ()):
                kind = line.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    size = sum(_size(self._shapes[name].get(operand, "")) for operand in line.operands)
                    if kind == "all-gather":  # of what it gives; the first half of one gives its operands too
                        size = _size(line.shape) - size * (line.opcode != kind)
                    found[kind, _group(line.attributes) or self._devices, size] += times
        listed = [Collective(kind, count, group, size) for (kind, group, size), count in found.items()]
        return sorted(listed, key=lambda c: -c.count * c.bytes)

    def traffic(self) -> int:
        """Bytes read from and written to the device's main memory in a step: operands and results of what runs.

        Fusions read and write once; of arrays that are only sliced the slices count, of those updated in place the
        updates. Arrays that XLA keeps in faster memory do not count.
        """
        inside = {called for lines in self._computations.values() for line in lines if line.opcode == "fusion"
                  for called, _ in _calls(line)}  # fmt: skip
        total = 0
        for name, times in self.runs.items():
            if name not in inside:
                lines = self._computations.get(name, ())
                total += times * sum(self._moved(name, line) for line in lines if not self._is_reducer(name))
        return total

    def _is_reducer(self, name: str) -> bool:
        """Whether a computation is of scalars, applied to each element by what calls it."""
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
        if line.opcode.endswith("-start"):  # what it gives repeats its operands
            return 2 * sum(operands)
        result = _size(line.shape, main=True)
        if line.opcode == "fusion":
            (fused,) = (called for called, _ in _calls(line))
            operands, result = self._fusion(fused, operands, result)
        return sum(operands) + result

    def _fusion(self, fused: str, operands: list[int], result: int) -> tuple[list[int], int]:
        """Bytes of a fusion's operands and result that it reads and writes."""
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
    """The instructions of each computation, and the name of the one that starts."""
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
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or ((inside,) if opcode == "parameter" else ())
    return Instruction(name, shape, opcode, operands, rest[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _calls(line: Instruction) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    found = re.findall(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)",
                       line.attributes)  # fmt: skip
    for branches in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line.attributes):
        found += [("branch", name.strip().removeprefix("%")) for name in branches.split(",")]
    trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.attributes) if line.opcode == "while" else None
    for role, name in found:
        yield name, int(trips[1]) if trips and role in ("body", "condition") else 1


def _arrays(shape: str) -> Iterable[tuple[str, list[int], bool]]:
    """Element type, dimensions, and whether it lies in the main memory, of each array of a shape."""
    for match in re.finditer(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        dimensions = [int(size.lstrip("<=")) for size in match[2].split(",") if size]
        yield match[1], dimensions, not re.search(r"S\([1-9]", match[3] or "")


def _elements(shape: str) -> int:
    return sum(math.prod(dimensions) for _, dimensions, _ in _arrays(shape))


def _size(shape: str, *, main: bool = False) -> int:
    """Bytes of a shape; with `main` only of what lies in the main memory."""
    total = 0
    for kind, dimensions, in_main in _arrays(shape):
        if main and not in_main:
            continue
        digits = re.search(r"\d+", kind)
        bits = BITS[kind] if kind in BITS else int(digits[0]) if digits else 0
        total += math.prod(dimensions) * bits // 8
    return total


def _group(attributes: str) -> int:
    """Devices in each group of a collective, in one of the notations there are; 0 for all devices."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=@?\w*mesh\w*\[(.*?)\] ?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    return 2 if "source_target_pairs" in attributes else 0
