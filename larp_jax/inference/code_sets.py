"""Codes that `larp-jax tokenize` wrote, as what a generator trains on."""

import functools
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from larp_jax.data import Batches
from larp_jax.data.spec import advice
from larp_jax.errors import InputError
from larp_jax.inference.tokens import MANIFEST, read_manifest, read_shard


class CodeSet:
    """A folder of codes, in memory. Its manifest is read at once, the codes when `rows` is first asked for.

    The rows of one source (windows of a video, mirrored or not) are one video, of which training draws one at a time:
    as often and as evenly as it would draw windows of the video itself.

    Args:
      directory: the folder.

    Attributes:
      manifest: see `larp_jax.inference.tokens.tokenize`.
      label_names: names of the classes in the order of their labels; empty without classes.

    Raises:
      InputError: there is no manifest, or it is damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = pathlib.Path(directory)
        if not (self.path / MANIFEST).exists() and (found := advice(self.path)):
            raise InputError(f"{directory} holds no codes that larp-jax tokenize wrote; {found}")
        self.manifest = read_manifest(directory)
        self.label_names = tuple(self.manifest.get("label_names", ()))
        rows = self.manifest["rows"]
        self._labels = np.array([row["label"] for row in rows], np.int32)
        if self.label_names and (last := int(self._labels.max())) >= len(self.label_names):
            raise InputError(
                f"{self.path / MANIFEST} has label {last} of {len(self.label_names)} classes; tokenize again"
            )
        _, video = np.unique([row["source"] for row in rows], return_inverse=True)
        self._order = np.argsort(video, kind="stable")  # rows video by video
        self._counts = np.bincount(video)
        self._first = np.cumsum(self._counts) - self._counts

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """By name, `codes` [M, N] int32, `label` [M] int32 (-1: none) and, if there is one, `condition` [M, N] int32.

        Raises:
          InputError: the folder is incomplete or damaged.
        """
        names = ("codes", "condition") if self.manifest.get("cond_frames") else ("codes",)
        shards = range(len(self.manifest["shards"]))
        rows = {name: np.concatenate([read_shard(self.path, self.manifest, i, name) for i in shards]) for name in names}
        return rows | {"label": self._labels}

    def __len__(self) -> int:
        """How many videos there are."""
        return len(self._counts)

    def labels(self) -> np.ndarray:
        """The class of each video, [V] int32."""
        return self._labels[self._order[self._first]]

    def some(self, count: int) -> dict[str, np.ndarray]:
        """At most so many rows, spread over those that are not mirrored; 0 for all of these."""
        plain = np.flatnonzero([not row.get("flip") for row in self.manifest["rows"]])
        if 0 < count < len(plain):
            plain = plain[np.arange(count) * len(plain) // count]
        return {name: x[plain] for name, x in self.rows.items()}

    def batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Batches without end: videos epoch by epoch without replacement, of each a row at random.

        The batch of a step is a function of (seed, step), and those of all processes are the batch of one.

        Returns:
          Iterator over what `rows` holds, batch_size / process_count rows each.

        Raises:
          InputError: the batch cannot be split.
        """
        if batch_size % process_count:
            raise InputError(f"data.batch_size={batch_size} does not split evenly over {process_count} process(es)")
        local = batch_size // process_count
        mine = slice(process_index * local, (process_index + 1) * local)
        return Batches(self, self._iterate(batch_size, seed, start_step, mine))

    def _iterate(self, batch_size: int, seed: int, step: int, mine: slice) -> Iterator[dict[str, np.ndarray]]:
        @functools.lru_cache(2)  # a batch may reach into the next epoch
        def order(epoch):
            return np.random.default_rng((seed, 0, epoch)).permutation(len(self))

        while True:
            epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(self))
            videos = np.array([order(epoch)[place] for epoch, place in zip(epochs.tolist(), places, strict=True)])
            drawn = np.random.default_rng((seed, 1, step)).integers(self._counts[videos])
            rows = self._order[self._first[videos] + drawn][mine]
            yield {name: x[rows] for name, x in self.rows.items()}
            step += 1
