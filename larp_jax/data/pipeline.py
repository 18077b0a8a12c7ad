"""Batches of clips, by Grain: training data as a function of (seed, step), evaluation data in a fixed order."""

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from typing import Any, Self

import numpy as np

from larp_jax.data.buckets import ShapedClips, Turns, nearest_shapes
from larp_jax.data.clips import ClipSpec, mirror, window_starts
from larp_jax.data.folders import MANY_NAMES, NO_LABEL, cores
from larp_jax.data.sources import MixtureSource, Source, open_source
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

# More threads than this wait for Python's global lock; worker processes do not.
MAX_THREADS = 16
ENDLESS = 2**62
# Failed videos in a row after which a data set counts as unreadable.
MAX_FAILURES = 100


class Batches:
    """An iterator over batches that owns threads or processes: close it, or use it in a `with` statement.

    Attributes:
      source: the data set.
    """

    def __init__(self, source: Source, iterator: Iterator[dict[str, Any]]):
        self.source = source
        self._iterator = [iterator]  # empty when closed
        # Runs at the latest at exit, before the interpreter ends threads and processes in arbitrary order.
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
        """Stops reading ahead and ends the workers; the iterator is then exhausted."""
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
    shapes: Sequence[tuple[int, int]] = (),
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless training batches: videos epoch by epoch, without replacement, each with a random start and flip.

    The batch of a step is a function of (seed, step) and depends on neither `start_step` nor the number of workers. The
    batches of all processes, concatenated in the order of their index, are the batch of a single process.

    With weights, each part of a mixture has its own epochs; without, the parts are one list.

    With `shapes`, all clips of a step have one of them, and are from the videos to whose aspect ratio it is nearest. A
    shape comes as often as its videos, in a random order (`larp_jax.data.buckets`).

    If a video cannot be read, another one replaces it. Each such video is logged once, and their total at the end.

    Args:
      spec: the data set, as read by `parse_spec`; the split is `train` by default.
      clip: length, size and augmentation of the clips.
      batch_size: clips per step over all processes.
      seed: seed of order, starts and flips.
      shapes: (height, width) of the clips, all different; by default, all have that of `clip`.
      start_step: step to begin at.
      workers: number of reading processes; 0 reads in threads of this process, one per core.
      process_index: index of this process.
      process_count: number of processes; divides `batch_size`.

    Returns:
      Iterator over {"video": uint8 [B, T, H, W, 3], "label": int32 [B] (-1: none)} with B = batch_size / process_count.

    Raises:
      InputError: the data set cannot be opened, or the batch cannot be split. The iterator raises it if 100 videos in a
        row cannot be read.
    """
    rows = _LocalRows(batch_size, process_index, process_count, start_step)
    source = open_source(spec, clip)
    clips = (
        _shaped_clips(source, clip, shapes, seed, batch_size)
        if shapes
        else _sample_videos(source, seed).random_map(ReadClip(source, clip))
    )
    return Batches(source, _Reported(_iterate(_of_process(clips, rows), rows.local, workers)))


def sampled_batches(
    source: Sized,
    read: Callable[[int, np.random.Generator], dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless training batches of what is read of each video: epoch by epoch, without replacement.

    What holds for the batches of `train_batches` holds for these, but errors of `read` are raised.

    Args:
      source: its length is the number of videos.
      read: `read(index, rng)` returns the arrays of a video by name; can be pickled.
      batch_size: videos per step over all processes.
      seed: seed of order and `rng`.
      start_step: step to begin at.
      workers: as for `train_batches`.
      process_index: index of this process.
      process_count: number of processes; divides `batch_size`.

    Raises:
      InputError: the batch cannot be split.
    """
    rows = _LocalRows(batch_size, process_index, process_count, start_step)
    clips = _sample_videos(source, seed).random_map(read)
    return Batches(source, _iterate(_of_process(clips, rows), rows.local, workers))


class _Reported:
    """Batches without the column `unread`, which is logged here because worker processes do not log."""

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
                logger.warning("another video replaces %s", reason)
        return batch

    def close(self) -> None:
        """Logs the total of replaced clips and closes the wrapped batches."""
        if self._replaced:
            names = ", ".join(sorted(self._named)[:MANY_NAMES])
            logger.warning("%d clips were replaced because their videos could not be read: %s", self._replaced, names)
        self._replaced = 0
        self._batches.close()


def _sample_videos(source: Sized, seed: int, videos: np.ndarray | None = None):
    """An endless Grain data set of video indices: epochs without replacement, mixed if the source has weights.

    `videos` [n] are the indices to sample, in ascending order; all by default.
    """
    import grain

    def epochs(start, stop):
        numbers = grain.MapDataset.range(ENDLESS).seed(seed).map(_Epochs(start, stop, seed))
        return numbers if videos is None else numbers.map(videos.__getitem__)

    if not isinstance(source, MixtureSource) or not source.weights:
        return epochs(0, len(source) if videos is None else len(videos))
    weights, ends = source.weights, list(itertools.accumulate(map(len, source.parts), initial=0))
    if videos is not None:
        lengths, ends = np.diff(ends), np.searchsorted(videos, ends).tolist()
        weights = tuple(weights * np.diff(ends) / lengths)
    parts = [epochs(start, stop) for start, stop in itertools.pairwise(ends) if start < stop]
    return grain.MapDataset.mix(parts, weights=[weight / sum(weights) for weight in weights if weight]).seed(seed)


def _shaped_clips(
    source: Source, clip: ClipSpec, shapes: Sequence[tuple[int, int]], seed: int, batch_size: int
) -> ShapedClips:
    """Training clips by number, each step in one of the shapes."""
    nearest = nearest_shapes([source.aspect(index) for index in range(len(source))], shapes)
    often = np.ones(len(source))
    if isinstance(source, MixtureSource) and source.weights:
        lengths = [len(part) for part in source.parts]
        often = np.repeat(np.divide(source.weights, lengths), lengths)
    clips = []
    for number, shape in enumerate(shapes):
        videos = np.flatnonzero(nearest == number)
        spec = dataclasses.replace(clip, resolution=shape)
        clips.append(_sample_videos(source, seed, videos).random_map(ReadClip(source, spec)) if len(videos) else None)
        level = logging.INFO if len(videos) else logging.WARNING
        logger.log(level, "data.shapes: %d of %d videos are in %dx%d", len(videos), len(source), *shape)
    shares = np.bincount(nearest, often, len(shapes))
    return ShapedClips(clips, Turns(shares.tolist(), seed), batch_size)


class _Epochs:
    """The numbers from start to stop - 1, epoch by epoch, each epoch in its own random order.

    Grain's shuffle needs no memory, but takes half a millisecond per number if there are only about fifty.
    """

    def __init__(self, start: int, stop: int, seed: int):
        self._start, self._length, self._seed = start, stop - start, seed
        self._orders: dict[int, np.ndarray] = {}  # of the newest epochs

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self._length)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self._seed, self._start, epoch]).permutation(self._length)
            newest = sorted(self._orders.items())[-3:]  # threads are at most a few numbers apart
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

    A video shorter than a clip repeats its last frame; leftover frames at the end of a longer one are dropped. Every
    process gets the same number of batches. A window that cannot be read is logged and counts as padding.

    Args:
      spec: the data set, as read by `parse_spec` (the split is `test` by default), or already opened.
      clip: length and size of the clips; `flip` is ignored.
      batch_size: clips per step over all processes.
      max_clips: at most this many clips, spread evenly over the videos; 0 for all.
      windows: (video, first frame) of each clip, in order; replaces the choice above.
      process_index: index of this process.
      process_count: number of processes; divides `batch_size`.

    Returns:
      Iterator over batches of batch_size / process_count rows: "video" uint8 [B, T, H, W, 3], "label" int32 [B] (-1:
      none), "mask" float32 [B] (1: real, 0: padding), "index" int32 [B] (of the video), "start" int32 [B] (first
      frame), "fps" float32 [B] (0: unknown) and "name", a list of B strings.

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


def window_batches(
    source: Source,
    clip: ClipSpec,
    windows: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless training batches of given windows: epoch by epoch, without replacement, unflipped.

    What holds for the batches of `train_batches` holds for these.

    Args:
      source: the data set.
      clip: length and size of the clips.
      windows: (video, first frame) of each clip.
      batch_size: clips per step over all processes.
      seed: seed of the order.
      start_step: step to begin at.
      workers: as for `train_batches`.
      process_index: index of this process.
      process_count: number of processes; divides `batch_size`.

    Returns:
      Iterator over {"video": uint8 [B, T, H, W, 3], "label": int32 [B] (-1: none), "row": int32 [B], number of the
      window} with B = batch_size / process_count.

    Raises:
      InputError: the batch cannot be split. The iterator raises it if a window cannot be read.
    """
    import grain

    rows = _LocalRows(batch_size, process_index, process_count, start_step)
    read = _ReadChosen(source, clip, windows, rows, _Epochs(0, len(windows), seed))
    return Batches(source, _iterate(grain.MapDataset.range(rows.count).map(read), rows.local, workers))


def choose_windows(
    source: Source, clip: ClipSpec, max_clips: int = 0, *, leave_out: Collection[int] = ()
) -> list[tuple[int, int]]:
    """(video, first frame) of the windows that evaluation reads, in order.

    If `max_clips` is at most the number of videos, each clip is the middle window of another video, and only the
    headers of these videos are read. The videos in `leave_out` are skipped and not counted.
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
    """Maps clip numbers of this process to the global order: its clips are consecutive rows of each batch."""

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


def _of_process(clips, rows: _LocalRows):
    """A Grain data set of the clips of this process."""
    import grain

    return grain.MapDataset.range(rows.count).map(_Lookup(clips, rows))


class _Lookup:
    """The clips of this process, by their number in it."""

    def __init__(self, clips, rows: _LocalRows):
        self._clips, self._rows = clips, rows

    def __call__(self, number: int) -> dict[str, Any]:
        return self._clips[self._rows(number)]


class ReadClip:
    """Reads a training clip; all randomness comes from the generator that Grain provides for its position."""

    def __init__(self, source: Source, clip: ClipSpec):
        self._source, self._clip = source, clip

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A clip of the video, or of another one if it cannot be read.

        Returns:
          "video" uint8 [T, H, W, 3], "label" int32 and "unread", a line "NAME: REASON" for each video that failed.
        """
        unread = []
        for _ in range(MAX_FAILURES):
            try:
                video, label = self._source.read_clip(index, rng, self._clip)
            except InputError as error:
                unread.append(" ".join(f"{self._source.name(index)}: {error}".split()))
                index = int(rng.integers(len(self._source)))
                continue
            if self._clip.flip and rng.random() < 0.5:
                video = mirror(video)
            return {"video": video, "label": np.int32(label), "unread": "\n".join(unread)}
        raise InputError(f"{MAX_FAILURES} sampled videos in a row cannot be read, the last {self._source.name(index)}")


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


class _ReadChosen:
    """Reads a training clip that is one of given windows."""

    def __init__(
        self,
        source: Source,
        clip: ClipSpec,
        windows: Sequence[tuple[int, int]],
        rows: _LocalRows,
        order: _Epochs,
    ):
        self._source, self._clip, self._windows, self._rows, self._order = source, clip, windows, rows, order

    def __call__(self, number: int) -> dict[str, Any]:
        row = self._order(self._rows(number))
        index, start = self._windows[row]
        try:
            video, label = self._source.read_clip(index, start, self._clip)
        except InputError as error:
            raise InputError(f"frame {start} of {self._source.name(index)}: {error}") from error
        return {"video": video, "label": np.int32(label), "row": np.int32(row)}


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a batch: arrays stacked, strings listed."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: column if isinstance(column[0], str) else np.stack(column) for name, column in columns.items()}


def _iterate(clips, batch_size: int, workers: int) -> Iterator[dict[str, Any]]:
    """Reads ahead clip by clip, so that all threads or workers share the work on a batch, and stacks batches."""
    import grain

    if workers:
        from absl import flags

        # Grain passes the flags of absl to its workers, and requires that they are parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        threads = 1
    else:
        threads = min(cores(), MAX_THREADS)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads if workers else batch_size + threads)
    clips = clips.to_iter_dataset(read)
    if workers:
        # Uses pipes: shared memory that is in use when the iterator is closed early is never freed.
        clips = grain.experimental.WithOptionsIterDataset(clips, grain.experimental.DatasetOptions(min_shm_size=2**62))
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(2, -(-batch_size // workers)))
        clips = clips.mp_prefetch(options)
    return iter(clips.batch(batch_size, batch_fn=_stack))
