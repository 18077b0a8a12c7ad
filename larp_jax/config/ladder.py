"""How many codes each block of frames may have, and the budgets that users give (EVATok, arXiv 2603.12267).

A clip is `blocks` equal runs of frames. The numbers of codes of its blocks, in order, are its assignment.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from larp_jax.config.checks import require
from larp_jax.errors import InputError

AUTO = "auto"  # the budget with which a generator, or a router, decides for each clip
GREEDY = "greedy"
RANDOM = "random"  # the budget of a training run that draws an assignment for each clip and step
MOST_ASSIGNMENTS = 2**16  # all of them are listed, and a router has an output for each

Assignment = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The budget `greedy:TARGET`: the fewest codes with which each block reaches a quality.

    Attributes:
      metric: `psnr`, in dB and at least `target`; or `lpips`, at most `target`.
      target: the quality.
    """

    metric: str
    target: float


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Which assignments a tokenizer can encode.

    Attributes:
      rungs: numbers of codes that a block may have, ascending.
      blocks: number of blocks of a clip.
      bucket: the most codes of a clip; all its codes are stored in an array of this length.
    """

    rungs: tuple[int, ...]
    blocks: int
    bucket: int

    def check(self) -> None:
        """`InputError` unless every rung can be used in some assignment that fits the bucket."""
        rungs, text = self.rungs, f"model.ladder={','.join(map(str, self.rungs))}"
        require(self.blocks > 0, f"model.blocks must be positive, got {self.blocks}")
        require(
            rungs[0] > 0 and list(rungs) == sorted(set(rungs)),
            f"{text} must be positive numbers of codes, each above the one before",
        )
        most = self.bucket - (self.blocks - 1) * rungs[0]
        require(
            rungs[-1] <= most,
            f"{text} does not fit model.num_tokens={self.bucket}: a block of {rungs[-1]} and {self.blocks - 1} of"
            f" {rungs[0]} are {rungs[-1] + (self.blocks - 1) * rungs[0]} codes; raise model.num_tokens or leave out"
            f" {rungs[-1]}",
        )
        require(
            self.bucket <= self.blocks * rungs[-1],
            f"model.num_tokens={self.bucket} is more than {self.blocks} block(s) of {text} can have; set it to at most"
            f" {self.blocks * rungs[-1]}",
        )
        require(
            self.count <= MOST_ASSIGNMENTS,
            f"{text} and model.blocks={self.blocks} make at least {self.count} assignments, above the limit of"
            f" {MOST_ASSIGNMENTS}; leave out some numbers of codes, or use fewer blocks",
        )

    @functools.cached_property
    def count(self) -> int:
        """Number of assignments that fit the bucket; of more than `MOST_ASSIGNMENTS` only a lower bound."""
        totals = {0: 1}  # number of assignments of the blocks so far, by their total
        for left in reversed(range(self.blocks)):
            longer: dict[int, int] = {}
            for total, ways in totals.items():
                for rung in self.rungs:
                    if total + rung + left * self.rungs[0] <= self.bucket:
                        longer[total + rung] = longer.get(total + rung, 0) + ways
            totals = longer
            if sum(totals.values()) > MOST_ASSIGNMENTS:  # each can be completed, so there are at least as many
                break
        return sum(totals.values())

    @functools.cached_property
    def assignments(self) -> tuple[Assignment, ...]:
        """All assignments that fit the bucket, in lexicographic order; the output classes of a router."""
        return tuple(x for x in itertools.product(self.rungs, repeat=self.blocks) if sum(x) <= self.bucket)

    @functools.cached_property
    def uniform(self) -> tuple[Assignment, ...]:
        """The assignments with the same number of codes in every block, ascending."""
        return tuple((rung,) * self.blocks for rung in self.rungs if rung * self.blocks <= self.bucket)

    @property
    def largest(self) -> Assignment:
        """The uniform assignment with the most codes, used when no budget is given."""
        return self.uniform[-1]

    def next_rungs(self, prefix: Sequence[int]) -> list[int]:
        """Numbers of codes that the block after these blocks may have, so that those after it can have the fewest."""
        room = self.bucket - sum(prefix) - (self.blocks - len(prefix) - 1) * self.rungs[0]
        return [rung for rung in self.rungs if rung <= room]

    def checked(self, lengths: Sequence[int], name: str) -> Assignment:
        """The assignment; `InputError`, naming where it was given, if it is none of this ladder."""
        lengths = tuple(int(length) for length in lengths)
        text = ",".join(map(str, lengths))
        require(
            len(lengths) == self.blocks,
            f"{name} {text} gives {len(lengths)} numbers of codes, but a clip has {self.blocks} block(s)",
        )
        for length in lengths:
            require(
                length in self.rungs,
                f"{name} {text}: a block cannot have {length} codes; choose from {', '.join(map(str, self.rungs))}",
            )
        require(
            sum(lengths) <= self.bucket,
            f"{name} {text} has {sum(lengths)} codes, above the tokenizer's {self.bucket}; give fewer",
        )
        return lengths

    def named(self, budget: Any, codebook_size: int) -> Assignment:
        """The assignment of a budget, text as for `budget` or a number, or the one with these numbers of codes."""
        if isinstance(budget, (str, int)):
            return self.budget(str(budget), codebook_size)
        return self.checked(list(budget), "budget")

    def goal(self, text: str, codebook_size: int, name: str = "budget") -> "Assignment | Greedy | str":
        """What a budget stands for, also if it depends on the clip.

        Args:
          text: as for `budget`; or `auto`, the choice of a router; or `greedy:30` or `greedy:lpips=0.2`, the fewest
            codes that reach this PSNR in dB, or LPIPS, in each block.
          codebook_size: K.
          name: where it was given, for messages.

        Returns:
          An assignment, the same for every clip; `Greedy`; or `AUTO`.

        Raises:
          InputError: as for `budget`.
        """
        if text == AUTO:
            return AUTO
        if text.startswith(f"{GREEDY}:"):
            return _greedy(text, name)
        return self.budget(text, codebook_size, name, "bits=B, auto or greedy:DB")

    def budget(self, text: str, codebook_size: int, name: str = "budget", others: str = "or bits=B") -> Assignment:
        """The assignment that a budget stands for, the same for every clip.

        Args:
          text: `128`, that many codes in equal blocks; `32,64,32,32`, the codes of each block; or `bits=1024`, the
            most codes in equal blocks that need at most so many bits, log2(K) each.
          codebook_size: K; 0 for continuous latents.
          name: where it was given, for messages.
          others: the other forms that the message about an unknown budget lists.

        Raises:
          InputError: it is no budget, or not one of this ladder.
        """
        totals = [sum(lengths) for lengths in self.uniform]
        kind, equals, number = text.replace(" ", "").rpartition("=")
        if equals and kind == "bits" and _is_number(number):
            require(codebook_size > 0, f"{name} {text}: latents are floats, not bits; give their number")
            bits = math.log2(codebook_size)
            fitting = [x for x, total in zip(self.uniform, totals, strict=True) if total * bits <= float(number)]
            require(
                bool(fitting),
                f"{name} {text} is too small: the fewest codes, {totals[0]}, need {math.ceil(totals[0] * bits)} bits",
            )
            return fitting[-1]
        parts = number.split(",")
        if equals or not all(part.isdecimal() for part in parts):
            raise InputError(
                f"{name} {text} is not known; give a number of codes such as {totals[-1]}, the number of each block"
                f" such as {','.join(map(str, self.uniform[0]))}, {others}"
            )
        if len(parts) > 1 or self.blocks == 1:
            return self.checked([int(part) for part in parts], name)
        require(
            int(number) in totals,
            f"{name} {text} does not split into {self.blocks} equal blocks of the ladder; choose from"
            f" {', '.join(map(str, totals))}, or give the codes of each block, separated by commas",
        )
        return self.uniform[totals.index(int(number))]


def _greedy(text: str, name: str) -> Greedy:
    metric, equals, number = text.partition(":")[2].replace(" ", "").rpartition("=")
    metric = metric if equals else "psnr"
    if metric not in ("psnr", "lpips") or not _is_number(number) or (metric == "lpips" and float(number) <= 0):
        raise InputError(
            f"{name} {text} is not known; give the PSNR in dB that each block is to reach, such as greedy:30, or its"
            " LPIPS, such as greedy:lpips=0.2"
        )
    return Greedy(metric, float(number))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
