"""Statistics of continuous latents."""

import numpy as np


class LatentStatistics:
    """Mean and standard deviation over all arrays that were added, in float64.

    Args:
      *shape: of an array: (d,) for statistics of each channel, (N, d) for those of each token and channel.
    """

    def __init__(self, *shape: int):
        self._count = 0
        self._sum, self._squares = np.zeros(shape), np.zeros(shape)

    def add(self, latents: np.ndarray) -> None:
        """Adds arrays [..., *shape], floats of any dtype."""
        flat = np.asarray(latents, np.float64).reshape(-1, *self._sum.shape)
        self._count += len(flat)
        self._sum += flat.sum(axis=0)
        self._squares += np.square(flat).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        """[*shape] float64; zeros if nothing was added."""
        return self._sum / max(self._count, 1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population, [*shape] float64, as `np.std`."""
        return np.sqrt(np.maximum(self._squares / max(self._count, 1) - np.square(self.mean), 0.0))
