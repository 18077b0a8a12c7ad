"""Opening data sets of videos; data sets of folders, mixtures, and functions for all kinds."""

import bisect
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Sequence

import numpy as np

from larp_jax.data.clips import ClipSpec, last_start, repeat_last
from larp_jax.data.folders import MANY_NAMES, NO_LABEL, cores, find_videos, name_within
from larp_jax.data.pictures import video_digest, video_size
from larp_jax.data.source import Source
from larp_jax.data.spec import FORMS, DataSpec, parse_spec
from larp_jax.data.tfds import VIDEOS, PreparedSource, TfdsSource, find_data_set
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)
# The largest number of classes that a message lists.
MANY_LISTED = 20


def open_source(spec: str | DataSpec, clip: ClipSpec | None = None, *, default_split: str = "train") -> Source:
    """Opens a data set.

    Args:
      spec: text for `parse_spec`, or its result.
      clip: its longer side selects the config of moving_shapes if the spec names none; its rate is that at which the
        videos are sampled.
      default_split: the split if the spec names none; for a folder, the split to use if it has splits.

    Raises:
      InputError: the data set does not exist, contains no readable video, or is not prepared.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    source = _open(spec, clip, default_split)
    if clip is None or not clip.sampling or isinstance(source, FolderSource | MixtureSource):
        return source  # these sample each file and each part
    return SampledSource(source, clip)


def _open(spec: DataSpec, clip: ClipSpec | None, default_split: str) -> Source:
    split = spec.split or default_split
    if spec.kind == "tokens":
        raise InputError(f"data {spec} contains codes, on which only generators train; give videos: {FORMS}")
    if spec.kind == "rewards":
        raise InputError(f"data {spec} contains rewards, on which only routers train; give videos: {FORMS}")
    if spec.kind == "features":
        raise InputError(
            f"data {spec} contains clips with features, which are for data.train of a tokenizer with"
            f" loss.alignment_weight; give videos: {FORMS}"
        )
    if spec.kind == "mixture":
        parts = [open_source(part, clip, default_split=default_split) for part in spec.parts]
        return MixtureSource(parts, spec.weights)
    if spec.kind == "folder":
        return FolderSource(spec.name, split, clip)
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"data {spec} needs TensorFlow Datasets, which cannot be imported ({error}); "
            "run: pip install tensorflow-datasets"
        ) from error
    if spec.kind == "moving_shapes":
        from larp_jax.data import moving_shapes

        return TfdsSource(moving_shapes.prepare(spec.name, max((clip or ClipSpec()).size)), split)
    prepared = (find_data_set(spec.name) / VIDEOS).exists()
    return (PreparedSource if prepared else TfdsSource)(spec.name, split)


class FolderSource(Source):
    """The videos below a folder, sorted by path; see `larp_jax.data.folders.find_videos`.

    The constructor reads the header of every file and decodes its first frame. Files that fail are skipped, and one
    warning names them.

    Args:
      folder: path of the folder.
      split: "train", "validation" or "test"; used if the folder has splits.
      clip: gives the rate at which the files are sampled; None for their own.

    Attributes:
      split: the split used; empty if the folder has no splits.

    Raises:
      InputError: the folder or the split does not exist, or contains no readable video.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train", clip: ClipSpec | None = None):
        found = find_videos(folder).of_split(split)
        self.folder, self.split = found.folder, found.splits[0]
        self._videos, self._labels, unreadable = found.open(clip)
        super().__init__(found.label_names, ((str(self.folder / name), reason) for name, reason in unreadable))
        if unreadable:
            names = [name for name, _ in unreadable]
            more = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
            logger.warning(
                "%s: skipped %d of %d files that cannot be read: %s%s",
                self.folder,
                len(names),
                len(found.paths),
                ", ".join(names[:MANY_NAMES]),
                more,
            )

    def __len__(self):
        return len(self._videos)

    def name(self, index):
        """Path within the folder."""
        return name_within(self.folder, self._videos[index].path)

    def fps(self, index):
        return self._videos[index].info.fps

    def frames(self, index):
        return self._videos[index].info.frames

    def aspect(self, index):
        return self._videos[index].info.width / self._videos[index].info.height

    def label(self, index):
        return self._labels[index]

    def read_clip(self, index, start, clip):
        """If the file has fewer frames than its header claims, a random start falls back to the last full clip."""
        random_start = isinstance(start, np.random.Generator)
        if random_start:
            start = int(start.integers(last_start(self.frames(index), clip.frames) + 1))
        frames = self._videos[index].read(start, clip.frames, clip.size, exact=not random_start)
        return repeat_last(frames, clip.frames), self._labels[index]

    def size(self, index):
        return video_size(self._videos[index].path)

    def digest(self, index):
        return video_digest(self._videos[index].path)

    def origin(self, index):
        """The video itself."""
        return self.size(index), functools.partial(self.digest, index)


def digests(source: Source, indices: Iterable[int]) -> dict[int, str]:
    """`Source.digest` of each of these videos, computed in parallel."""
    indices = sorted(set(indices))
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        return dict(zip(indices, pool.map(source.digest, indices), strict=True))


def labels(source: Source) -> np.ndarray:
    """`Source.label` of every video, int64."""
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        return np.fromiter(pool.map(source.label, range(len(source))), np.int64, len(source))


def class_list(labels: Sequence[int], names: Sequence[str]) -> str:
    """Text that lists classes in a message, by number, and by name if they have one."""
    listed = [f"{label} ({names[label]})" if label < len(names) else str(label) for label in labels[:MANY_LISTED]]
    more = len(labels) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def same_videos(source: Source, other: Source) -> set[int]:
    """Indices of the videos of `source` that are also in `other`, by SHA-256. Only videos of equal size are read."""
    ours, theirs = ([one.origin(index) for index in range(len(one))] for one in (source, other))
    common = {size for size, _ in ours} & {size for size, _ in theirs}

    def compute(origins):
        wanted = {index: digest for index, (size, digest) in enumerate(origins) if size in common}
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            return dict(zip(wanted, pool.map(lambda digest: digest(), wanted.values()), strict=True))

    known = set(compute(theirs).values())
    return {index for index, digest in compute(ours).items() if digest in known}


class SampledSource(Source):
    """A data set whose videos have constant rates, sampled in time.

    Args:
      source: the data set.
      clip: gives the rate.

    Raises:
      InputError: the clip has an `fps`, and the rate of a video is unknown.
    """

    def __init__(self, source: Source, clip: ClipSpec):
        super().__init__(source.label_names, source.skipped)
        self._source, self._clip = source, clip
        if clip.fps and not all(source.fps(index) for index in range(len(source))):
            raise InputError("data whose frame rate is unknown has no fps: set data.stride, not data.fps")

    def __len__(self):
        return len(self._source)

    def name(self, index):
        return self._source.name(index)

    def label(self, index):
        return self._source.label(index)

    def size(self, index):
        return self._source.size(index)

    def digest(self, index):
        return self._source.digest(index)

    def origin(self, index):
        return self._source.origin(index)

    def aspect(self, index):
        return self._source.aspect(index)

    def fps(self, index):
        return self._clip.rate(self._source.fps(index))

    def frames(self, index):
        return self._clip.count(self._source.frames(index), self._source.fps(index))

    def read_clip(self, index, start, clip):
        if isinstance(start, np.random.Generator):
            start = int(start.integers(last_start(self.frames(index), clip.frames) + 1))
        stop = min(start + clip.frames, max(start + 1, self.frames(index)))
        numbers = [clip.number(k, self._source.fps(index)) for k in range(start, stop)]
        span = dataclasses.replace(clip, frames=numbers[-1] - numbers[0] + 1)
        frames, label = self._source.read_clip(index, numbers[0], span)
        return repeat_last(frames[np.array(numbers) - numbers[0]], clip.frames), label


class MixtureSource(Source):
    """Several data sets, concatenated.

    Classes of the same name are one class, numbered in order of first appearance.

    Args:
      parts: the data sets.
      weights: how often training samples from each, in any unit; empty: proportional to their lengths.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] = ()):
        self.parts, self.weights = list(parts), tuple(weights)
        super().__init__(
            dict.fromkeys(itertools.chain.from_iterable(part.label_names for part in parts)),
            itertools.chain.from_iterable(part.skipped for part in parts),
        )
        self._labels = [[self.label_names.index(name) for name in part.label_names] for part in parts]
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self):
        return self._ends[-1]

    def name(self, index):
        part, index = self._locate(index)
        return self.parts[part].name(index)

    def fps(self, index):
        part, index = self._locate(index)
        return self.parts[part].fps(index)

    def frames(self, index):
        part, index = self._locate(index)
        return self.parts[part].frames(index)

    def aspect(self, index):
        part, index = self._locate(index)
        return self.parts[part].aspect(index)

    def label(self, index):
        part, index = self._locate(index)
        return self._label(part, self.parts[part].label(index))

    def read_clip(self, index, start, clip):
        part, index = self._locate(index)
        frames, label = self.parts[part].read_clip(index, start, clip)
        return frames, self._label(part, label)

    def size(self, index):
        part, index = self._locate(index)
        return self.parts[part].size(index)

    def digest(self, index):
        part, index = self._locate(index)
        return self.parts[part].digest(index)

    def origin(self, index):
        part, index = self._locate(index)
        return self.parts[part].origin(index)

    def _label(self, part: int, label: int) -> int:
        """The label in the mixture of a label in one of the data sets."""
        labels = self._labels[part]
        return labels[label] if 0 <= label < len(labels) else NO_LABEL

    def _locate(self, index: int) -> tuple[int, int]:
        """(index of the data set, index of the video in it)."""
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)
