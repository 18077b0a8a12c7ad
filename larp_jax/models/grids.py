"""Grids of patches, and the coordinates of patches in clips of other sizes."""

from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]  # (time, height, width)


def patch_grid(shape: Sequence[int], patch: Grid) -> Grid:
    """Number of patches (time, height, width) of a clip [T, H, W, ...]."""
    t, h, w = (n // p for n, p in zip(shape, patch, strict=False))
    return t, h, w


def grid_coordinates(grid: Grid, of: Grid | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates of the patches of a grid along each axis, in those of the grid `of`; by default its own.

    Frames of another size have the same edges. In time, patches are those from the first on.
    """
    t, *sides = grid
    h, w = map(coordinates, sides, (of or grid)[1:])
    return np.arange(t), h, w


def coordinates(count: int, of: int) -> np.ndarray:
    """Centers of `count` equal parts of an axis, in coordinates in which those of `of` parts are 0, 1, 2 and so on."""
    return np.arange(count) if count == of else (np.arange(count) + 0.5) * of / count - 0.5
