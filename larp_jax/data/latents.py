"""Statistics of continuous latents, which are stored with them so that generators can standardize them."""

import numpy as np


class LatentStatistics:
    """Mean and standard deviation of each channel over all latents that were added, in float64.

    Args:
      channels: d, the dimension of a latent.
    """

    def __init__(self, channels: int):
        self._count = 0
        self._sum, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, latents: np.ndarray) -> None:
        """Adds latents [..., d], floats of any dtype."""
        flat = np.asarray(latents, np.float64).reshape(-1, len(self._sum))
        self._count += len(flat)
        self._sum += flat.sum(axis=0)
        self._squares += np.square(flat).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        """[d] float64; zeros if nothing was added."""
        return self._sum / max(self._count, 1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population, [d] float64, as `np.std`."""
        return np.sqrt(np.maximum(self._squares / max(self._count, 1) - np.square(self.mean), 0.0))
