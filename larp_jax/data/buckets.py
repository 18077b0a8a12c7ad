"""Training clips of several shapes: which shape a video has, and which the clips of a step have.

All clips of a step have one shape, that of their videos, so that nothing is cut off or padded to make them equal.
"""

import functools
from collections.abc import Sequence

import numpy as np

# Steps after which every shape has had exactly its turns.
BLOCK = 1000


def nearest_shapes(aspects: Sequence[float], shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the shape, (height, width), whose ratio of sides is the nearest to that of each video, [V] int.

    `aspects` are widths over heights; a video whose aspect is not known, 0, gets the first shape.
    """
    aspects = np.asarray(aspects, np.float64)
    ratios = np.log([width / height for height, width in shapes])
    distances = np.abs(np.log(np.where(aspects > 0, aspects, 1.0))[:, None] - ratios)
    return np.where(aspects > 0, distances.argmin(axis=1), 0)


class Turns:
    """Which of several shapes the clips of a step have: a function of (seed, step).

    In every `BLOCK` of steps, each shape comes as often as its share, in a random order.

    Args:
      shares: of the shapes, in any unit; a shape with a share has at least one turn, one without has none.
      seed: seed of the order.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        ends = np.round(BLOCK * np.cumsum([0.0, *shares]) / sum(shares)).astype(int)
        turns = np.maximum(np.diff(ends), [int(share > 0) for share in shares])
        self._turns, self._seed = tuple(turns.tolist()), seed

    def __call__(self, step: int) -> tuple[int, int]:
        """(number of the shape, how many earlier steps have the same)."""
        block, place = divmod(step, sum(self._turns))
        order, earlier = _block(self._seed, block, self._turns)
        shape = int(order[place])
        return shape, block * self._turns[shape] + int(earlier[place])


@functools.lru_cache(8)  # threads are at most a few steps apart
def _block(seed: int, block: int, turns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The shapes of the steps of a block, and how many steps before in the block have the same."""
    order = np.random.default_rng([seed, block]).permutation(np.repeat(np.arange(len(turns)), turns))
    same = order[:, None] == np.arange(len(turns))
    return order, (same.cumsum(axis=0) - 1)[np.arange(len(order)), order]


class ShapedClips:
    """Clips by number, of which `batch_size` consecutive ones are a step and have its shape.

    Args:
      clips: clips by number, for each shape that has turns.
      turns: the shape of each step.
      batch_size: clips per step.
    """

    def __init__(self, clips: Sequence, turns: Turns, batch_size: int):
        self._clips, self._turns, self._batch_size = clips, turns, batch_size

    def __getitem__(self, number: int):
        step, row = divmod(number, self._batch_size)
        shape, earlier = self._turns(step)
        return self._clips[shape][earlier * self._batch_size + row]
