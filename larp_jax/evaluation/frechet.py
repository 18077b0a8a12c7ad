"""Frechet distance between sets of feature vectors, from mergeable statistics (Heusel et al. 2017, arXiv 1706.08500).

Everything is computed on the host in float64, because sums of squares in float32 are too inaccurate.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from larp_jax import files, npz
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json

COVARIANCES = ("population", "sample")  # scatter divided by n, or by n - 1


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Number, mean and scatter of feature vectors; the statistics of two sets merge into those of their union.

    The scatter is about the mean, so there is no cancellation even if the features are far from zero.

    Attributes:
      count: number of vectors.
      mean: [D] float64.
      scatter: [D, D] float64, the sum of (x - mean) (x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dimension: int) -> Self:
        """Statistics of no vectors."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features: np.ndarray, mask: np.ndarray | None = None) -> Self:
        """Statistics of features [B, D].

        Args:
          features: any float dtype.
          mask: [B], 1 for real clips and 0 for padding, whose features are ignored even if they are NaN.

        Raises:
          InputError: a feature of a real clip is NaN or infinite.
        """
        features = np.asarray(features, np.float64)
        if mask is not None:
            features = features[np.asarray(mask, bool)]
        wrong = int((~np.isfinite(features)).any(axis=1).sum())
        if wrong:
            raise InputError(
                f"features of {wrong} of {len(features)} clips are NaN or infinite, and so would their Frechet distance"
                " be; look for NaN in the videos, and in the weights that generated them"
            )
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def merge(self, other: Self) -> Self:
        """Statistics of the union (Chan et al. 1983).

        Raises:
          InputError: the features differ in dimension.
        """
        _check_same_dimension(self, other)
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return type(self)(count, self.mean + difference * (other.count / count), self.scatter + other.scatter + between)

    def covariance(self, kind: str = "population") -> np.ndarray:
        """[D, D] float64.

        Args:
          kind: one of `COVARIANCES`.

        Raises:
          InputError: the kind is unknown, or there are too few vectors: none, or a single one for `sample`.
        """
        if kind not in COVARIANCES:
            raise InputError(f"covariance={kind!r} is not known; choose {' or '.join(COVARIANCES)}")
        if not self.count:
            raise InputError("there is no clip to compute a Frechet distance of; give at least one")
        if kind == "sample" and self.count == 1:
            raise InputError("one clip has no sample covariance; give at least 2, or use the population covariance")
        return self.scatter / (self.count - (kind == "sample"))

    def save(self, path: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes an npz file atomically. Creates the folder.

        Args:
          path: the file.
          metadata: JSON values to store with the numbers.

        Raises:
          InputError: the folder cannot be created.
          OSError: the file cannot be written.
        """
        path = files.any_path(path)
        files.make_folder(path.parent)
        text = np.frombuffer(json.dumps(dict(metadata or {}), sort_keys=True).encode(), np.uint8)
        with files.writing(path) as file:
            np.savez(file, count=np.int64(self.count), mean=self.mean, scatter=self.scatter, metadata=text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[Self, dict[str, Any]]:
        """Reads the statistics and metadata that `save` wrote.

        Raises:
          InputError: the file is missing or damaged.
        """
        expected = {
            "count": npz.Array("i8", ()),
            "mean": npz.Array("f8", (None,)),
            "scatter": npz.Array("f8", (None, None)),
            "metadata": npz.Array("u1", (None,)),
        }
        found = npz.read(path, expected, "delete it")
        count, mean, scatter = int(found["count"]), found["mean"], found["scatter"]
        try:
            metadata = parse_json(found["metadata"].tobytes())
            if count < 0 or scatter.shape != 2 * mean.shape or not isinstance(metadata, dict):
                raise ValueError(f"{count} vectors, arrays of shapes {mean.shape} and {scatter.shape}")
        except ValueError as error:
            raise InputError(f"{path} is not a valid statistics file ({reason(error)}); delete it") from None
        return cls(count, mean, scatter), metadata


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics, *, covariance: str = "population") -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2).

    Nothing is added to singular covariances, which occur with fewer clips than features: roots come from symmetric
    eigendecompositions, and the trace of the last root is the sum of the singular values of C_a^1/2 C_b^1/2. (The
    eigenvalues of C_a C_b are not used, because the root would amplify their rounding errors to 1e-8.)

    Args:
      a: statistics of the first set.
      b: statistics of the second set, of the same dimension.
      covariance: one of `COVARIANCES`; the released code of LARP uses `population`.

    Returns:
      At least 0.

    Raises:
      InputError: the dimensions differ, or a set has too few vectors for its covariance.
    """
    _check_same_dimension(a, b)
    (values_a, vectors_a), (values_b, vectors_b) = (_eigen(x.covariance(covariance)) for x in (a, b))
    root = (vectors_a * np.sqrt(values_a)).T @ (vectors_b * np.sqrt(values_b))
    overlap = np.linalg.svd(root, compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + values_a.sum() + values_b.sum() - 2.0 * overlap
    return max(0.0, float(distance))


def _eigen(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, set to zero if they are zero up to rounding, and eigenvectors in columns."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.where(values > rounding, values, 0.0), vectors


def _check_same_dimension(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"features of dimensions {len(a.mean)} and {len(b.mean)} cannot be compared; compute both with one network"
        )
