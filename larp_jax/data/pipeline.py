"""Batches of clips, by Grain: training data as a function of (seed, step), evaluation data in a fixed order."""

import itertools
import logging
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Self

import numpy as np

from larp_jax.data.clips import ClipSpec, mirror, window_starts
from larp_jax.data.folders import MANY_NAMES, NO_LABEL, cores
from larp_jax.data.sources import MixtureSource, Source, open_source
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

# More threads than this wait for Python's lock: use workers.
MAX_THREADS = 16
ENDLESS = 2**62
# Draws before a data set counts as unreadable.
MAX_DRAWS = 100


class Batches:
    """An iterator over batches that owns threads or processes: close it, or use it in a `with` statement.

    Attributes:
      source: the data set behind it.
    """

    def __init__(self, source: Source, iterator: Iterator[dict[str, Any]]):
        self.source = source
        self._iterator = [iterator]  # empty when closed
        # At the latest before the interpreter takes threads and processes down in an order of its own.
        self._finalizer = weakref.finalize(self, _close, self._iterator)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        for iterator in self._iterator:
            return next(iterator)
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading ahead and ends the workers; there are no more batches then."""
        self._finalizer()


def _close(iterator: list) -> None:
    while iterator:
        iterator.pop().close()


def train_batches(
    spec: str,
    clip: ClipSpec,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Training batches without end, drawn epoch by epoch without replacement, each with a random start and flip.

    The batch of a step is a function of (seed, step): neither `start_step` nor the number of workers changes
    it, and the batches of all processes, put together in the order of their index, are the batch of one.

    A mixture with weights runs through epochs of each part on its own; without, the parts are one list.

    A video that fails to be read is named in the log, once, and another is drawn in its place; how often that happened
    is said in the end.

    Args:
      spec: the data set, as `parse_spec` reads it; the split is `train` if it names none.
      clip: what a clip is.
      batch_size: clips a step over all processes.
      seed: of order, starts and flips.
      start_step: step to begin at.
      workers: processes that read; 0 reads in threads of this process, one per core.
      process_index: this host.
      process_count: of so many; divides `batch_size`.

    Returns:
      Iterator over {"video": uint8 [batch_size / process_count, T, H, W, 3], "label": int32 of as many (-1: none)}.

    Raises:
      InputError: the data set cannot be opened, or the batch cannot be split. The iterator raises it when
        100 videos in a row cannot be read.
    """
    import grain

    rows = _LocalRows(batch_size, process_index, process_count, start_step)
    source = open_source(spec, clip)
    clips = _draw_videos(source, seed).random_map(DrawClip(source, clip))
    clips = grain.MapDataset.range(rows.count).map(_Lookup(clips, rows))
    return Batches(source, _Reported(_iterate(clips, rows.local, workers)))


class _Reported:
    """Batches without their column `unread`, which is logged instead: here, because workers have no log."""

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self._batches = batches
        self._named: set[str] = set()
        self._replaced = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        reasons = [reason for text in batch.pop("unread") for reason in text.splitlines()]
        self._replaced += len(reasons)
        for reason in dict.fromkeys(reasons):
            if (name := reason.partition(": ")[0]) not in self._named:
                self._named.add(name)
                logger.warning("another video is drawn in place of %s", reason)
        return batch

    def close(self) -> None:
        """Closes the batches below."""
        if self._replaced:
            names = ", ".join(sorted(self._named)[:MANY_NAMES])
            logger.warning("%d clips came from other videos than drawn; not read: %s", self._replaced, names)
        self._replaced = 0
        self._batches.close()


def _draw_videos(source: Source, seed: int):
    """A Grain data set without end of numbers of videos: epochs, each without replacement, mixed where weighted."""
    import grain

    def epochs(start, stop):
        return grain.MapDataset.range(ENDLESS).seed(seed).map(_Epochs(start, stop, seed))

    if not isinstance(source, MixtureSource) or not source.weights:
        return epochs(0, len(source))
    weights = source.weights
    ends = list(itertools.accumulate(map(len, source.parts), initial=0))
    parts = [epochs(start, stop) for start, stop in itertools.pairwise(ends)]
    return grain.MapDataset.mix(parts, weights=[weight / sum(weights) for weight in weights]).seed(seed)


class _Epochs:
    """The numbers from start up to stop, epoch by epoch, each in an order of its own.

    Grain's shuffle needs no memory, but takes half a millisecond a number where there are only some fifty.
    """

    def __init__(self, start: int, stop: int, seed: int):
        self._start, self._length, self._seed = start, stop - start, seed
        self._orders: dict[int, np.ndarray] = {}  # of the newest epochs

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self._length)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self._seed, self._start, epoch]).permutation(self._length)
            newest = sorted(self._orders.items())[-3:]  # threads read ahead of each other by little
            self._orders = {**dict(newest), epoch: order}
        return self._start + int(order[place])


def eval_batches(
    spec: str | Source,
    clip: ClipSpec,
    *,
    batch_size: int,
    max_clips: int = 0,
    windows: Sequence[tuple[int, int]] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every window of every video in a fixed order, unflipped: consecutive windows that do not overlap.

    A video shorter than a clip repeats its last frame; the tail of a longer one that fills no window is dropped. Every
    process gets the same number of batches. A window that cannot be read is logged and counts as padding.

    Args:
      spec: the data set, as `parse_spec` reads it (the split is `test` if it names none), or already opened.
      clip: what a clip is; its `flip` is ignored.
      batch_size: clips a step over all processes.
      max_clips: at most so many, spread evenly over the videos; 0 takes all.
      windows: (video, first frame) of the clips instead, in the order wanted.
      process_index: this host.
      process_count: of so many; divides `batch_size`.

    Returns:
      Iterator over batches of batch_size / process_count rows: "video" uint8 [B, T, H, W, 3], "label" int32 [B] (-1:
      none), "mask" float32 [B] (1: real, 0: padding), "index" int32 [B] (number of the video), "start" int32 [B] (its
      first frame), "fps" float32 [B] (0: unknown) and "name", a list of B strings.

    Raises:
      InputError: the data set cannot be opened, or the batch cannot be split.
    """
    import grain

    rows = _LocalRows(batch_size, process_index, process_count)
    source = open_source(spec, clip, default_split="test") if isinstance(spec, str) else spec
    windows = choose_windows(source, clip, max_clips) if windows is None else windows
    batches = -(-len(windows) // batch_size)
    clips = grain.MapDataset.range(batches * rows.local).map(_ReadWindow(source, clip, windows, rows))
    return Batches(source, _iterate(clips, rows.local, workers=0))


def choose_windows(
    source: Source, clip: ClipSpec, max_clips: int = 0, *, leave_out: Collection[int] = ()
) -> list[tuple[int, int]]:
    """The (video, first frame) of the windows that evaluation reads, in their order.

    With fewer clips than videos, each comes from another video, out of its middle, and only those videos are looked at.
    Videos to leave out do not count.
    """
    videos = [index for index in range(len(source)) if index not in leave_out]
    if 0 < max_clips <= len(videos):
        chosen = [videos[number * len(videos) // max_clips] for number in range(max_clips)]
        starts = [window_starts(source.frames(index), clip.frames) for index in chosen]
        return [(index, start[len(start) // 2]) for index, start in zip(chosen, starts, strict=True)]
    windows = [(index, start) for index in videos for start in window_starts(source.frames(index), clip.frames)]
    if 0 < max_clips < len(windows):
        windows = [windows[number * len(windows) // max_clips] for number in range(max_clips)]
    return windows


class _LocalRows:
    """Which clips of the global order are this process's: of each batch, the rows that lie together at its index."""

    def __init__(self, batch_size: int, process_index: int, process_count: int, start_step: int = 0):
        if batch_size < 1 or batch_size % process_count:
            raise InputError(f"data.batch_size={batch_size} does not split evenly over {process_count} process(es)")
        self.local = batch_size // process_count
        self.count = ENDLESS // process_count
        self._batch_size = batch_size
        self._first = start_step * batch_size + process_index * self.local

    def __call__(self, number: int) -> int:
        step, row = divmod(number, self.local)
        return self._first + step * self._batch_size + row


class _Lookup:
    """Clips of the global order by the number of this process's."""

    def __init__(self, clips, rows: _LocalRows):
        self._clips, self._rows = clips, rows

    def __call__(self, number: int) -> dict[str, Any]:
        return self._clips[self._rows(number)]


class DrawClip:
    """Reads a training clip; all chance comes from the generator that Grain makes for its place in the order."""

    def __init__(self, source: Source, clip: ClipSpec):
        self._source, self._clip = source, clip

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The clip of a video, or of another where that fails.

        Returns:
          "video" uint8 [T, H, W, 3], "label" int32 and "unread", a line "NAME: REASON" for each video that failed.
        """
        unread = []
        for _ in range(MAX_DRAWS):
            try:
                video, label = self._source.read_clip(index, rng, self._clip)
            except InputError as error:
                unread.append(" ".join(f"{self._source.name(index)}: {error}".split()))
                index = int(rng.integers(len(self._source)))
                continue
            if self._clip.flip and rng.random() < 0.5:
                video = mirror(video)
            return {"video": video, "label": np.int32(label), "unread": "\n".join(unread)}
        raise InputError(f"{MAX_DRAWS} videos drawn in a row cannot be read, the last one {self._source.name(index)}")


class _ReadWindow:
    """Reads an evaluation clip, or a padding row after the last one."""

    def __init__(self, source: Source, clip: ClipSpec, windows: Sequence[tuple[int, int]], rows: _LocalRows):
        self._source, self._clip, self._windows, self._rows = source, clip, windows, rows

    def __call__(self, number: int) -> dict[str, Any]:
        number = self._rows(number)
        index, start = self._windows[min(number, len(self._windows) - 1)]
        video, label, mask = np.zeros(self._clip.shape, np.uint8), NO_LABEL, 0
        if number < len(self._windows):
            try:
                (video, label), mask = self._source.read_clip(index, start, self._clip), 1
            except InputError as error:
                logger.warning("left out of the evaluation: frame %d of %s: %s", start, self._source.name(index), error)
        return {
            "video": video,
            "label": np.int32(label),
            "mask": np.float32(mask),
            "index": np.int32(index),
            "start": np.int32(start),
            "fps": np.float32(self._source.fps(index)),
            "name": self._source.name(index),
        }


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a batch: arrays stacked, strings listed."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: column if isinstance(column[0], str) else np.stack(column) for name, column in columns.items()}


def _iterate(clips, batch_size: int, workers: int) -> Iterator[dict[str, Any]]:
    """Reads ahead, clip by clip, so that all threads or workers share the next batch, and stacks batches."""
    import grain

    if workers:
        from absl import flags

        # Grain hands the flags of absl to its workers, and insists that someone has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        threads = 1
    else:
        threads = min(cores(), MAX_THREADS)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads if workers else batch_size + threads)
    clips = clips.to_iter_dataset(read)
    if workers:
        # Through pipes: what lies in shared memory when the iterator is closed early is never given back.
        clips = grain.experimental.WithOptionsIterDataset(clips, grain.experimental.DatasetOptions(min_shm_size=2**62))
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(2, -(-batch_size // workers)))
        clips = clips.mp_prefetch(options)
    return iter(clips.batch(batch_size, batch_fn=_stack))
