"""TFDS data sets in array_record format, including those written by `larp-jax prepare`."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from larp_jax import files
from larp_jax.data import video
from larp_jax.data.clips import last_start, repeat_last
from larp_jax.data.folders import NO_LABEL
from larp_jax.data.source import Source
from larp_jax.data.spec import advice
from larp_jax.data.timing import stage
from larp_jax.errors import InputError, reason
from larp_jax.files import local_path, read_json

# The largest number of classes that a data set may have.
MANY_CLASSES = 1_000_000
# The file of a prepared data set that lists the videos in its records.
VIDEOS = "videos.json"


class _Records:
    """The records of a split of a TFDS data set that is prepared on disk in array_record format.

    Records are parsed here and not by the features of TFDS: `tfds.features.Video` needs TensorFlow and decodes every
    frame of a video, while this class needs no TensorFlow and decodes only the frames of a clip. Verified on data sets
    written by TFDS 4.9.10, among them one with the features of ucf101, written with TensorFlow.

    The video is the feature of type Video, Sequence of Image (PNG or JPEG) or uint8 Tensor [T, H, W, 1 or 3] of any
    encoding, and the label is the feature of type ClassLabel; if there are several, those called `video` and `label`.

    Args:
      data_set: NAME[/CONFIG][/VERSION] in the TFDS data folder ($TFDS_DATA_DIR), or the folder of the data set.
      split: a split in the syntax of TFDS, such as `train` or `train[:10%]`.

    Attributes:
      data_set: as given.
      split: as given.
      folder: folder of the data set's files.
      shape: [T, H, W, C] of the video of a record, with 0 for unknown sizes.
      encoding: encoding of the video: `image` or `text` for encoded frames, else that of the Tensor.
      label_names: names of the classes in the order of their labels; empty without classes.
      stored: random access to the records as bytes.

    Raises:
      InputError: the data set does not exist, has another format, or lacks the split or a video feature.
    """

    def __init__(self, data_set: str | os.PathLike, split: str):
        self.data_set, self.split = str(data_set), split
        with self.damage_as_input_error():
            self.folder = folder = find_data_set(self.data_set)
            features = read_json(folder / "features.json")["featuresDict"]["features"]
            self._video, self.shape, self.encoding = _video_feature(self.data_set, features)
            labels = {name: feature["classLabel"] for name, feature in features.items() if "classLabel" in feature}
            self._label = _preferred(labels, "label")
            self.label_names: tuple[str, ...] = ()
            if self._label:
                names = folder / f"{self._label}.labels.txt"
                count = int(labels[self._label].get("numClasses", 0))
                if count > MANY_CLASSES:
                    raise ValueError(f"{count} classes")
                self.label_names = tuple(
                    names.read_text(encoding="utf-8").split("\n")[:count] if names.exists() else map(str, range(count))
                )
            self.stored = _open_records(self.data_set, folder, split)

    @property
    def aspect(self) -> float:
        """Width over height of all videos; 0.0 if the features do not fix them."""
        _, height, width, _ = self.shape
        return width / height if height and width else 0.0

    def damage_as_input_error(self) -> contextlib.AbstractContextManager[None]:
        """Context manager for reading files of the data set: errors become one line."""
        return _as_input_error(f"TFDS data set {self.data_set}")

    def read(self, record: int):
        """The features of a record."""
        from tensorflow_datasets.proto import tf_example_pb2

        with stage("read"), _as_input_error(f"record {record} of {self.data_set}"):
            return tf_example_pb2.Example.FromString(self.stored[record]).features.feature

    def label(self, features) -> int:
        """The label in the features of a record; -1 for none."""
        return features[self._label].int64_list.value[0] if self._label else NO_LABEL

    def frames(self, features) -> Sequence[bytes] | np.ndarray:
        """The frames in the features of a record: encoded images, or uint8 [T, H, W, C]."""
        values = features[self._video].bytes_list.value
        if self.encoding in ("image", "text"):
            return values
        if self.encoding == "none":
            pixels = np.array(features[self._video].int64_list.value, np.uint8)
        else:
            most = math.prod(self.shape)  # 0 if the number of frames is unknown: no limit
            unpacked = zlib.decompressobj().decompress(values[0], most) if self.encoding == "zlib" else values[0]
            pixels = np.frombuffer(unpacked, np.uint8)
        return pixels.reshape(-1, *self.shape[1:])


class TfdsSource(Source):
    """A split of a TFDS data set in array_record format, with one video per record.

    Args:
      data_set: NAME[/CONFIG][/VERSION] in the TFDS data folder ($TFDS_DATA_DIR), or the folder of the data set.
      split: a split in the syntax of TFDS, such as `train` or `train[:10%]`.

    Raises:
      InputError: the data set does not exist, has another format, or lacks the split or a video feature.
    """

    def __init__(self, data_set: str | os.PathLike, split: str = "train"):
        self._records = _Records(data_set, split)
        super().__init__(self._records.label_names)
        claimed = self._records.shape[0]
        with self._records.damage_as_input_error():
            if claimed and claimed != (stored := len(self._records.frames(self._records.read(0)))):
                raise ValueError(f"its videos have {stored} frames, but its features declare {claimed}")

    def __len__(self):
        return len(self._records.stored)

    def name(self, index):
        """DATA_SET:SPLIT#RECORD."""
        return f"{self._records.data_set}:{self._records.split}#{index}"

    def fps(self, index):
        """0.0: TFDS data sets do not contain it."""
        return 0.0

    def frames(self, index):
        """Reads the record if the features of the data set do not fix the number."""
        if self._records.shape[0]:
            return self._records.shape[0]
        with _as_input_error(self.name(index)):
            return len(self._records.frames(self._records.read(index)))

    def aspect(self, index):
        """That of the features: all videos have the same, or it is unknown."""
        return self._records.aspect

    def label(self, index):
        """Reads the record."""
        with _as_input_error(self.name(index)):
            return self._records.label(self._records.read(index))

    def read_clip(self, index, start, clip):
        with _as_input_error(self.name(index)):
            features = self._records.read(index)
            stored = self._records.frames(features)
            if isinstance(start, np.random.Generator):
                start = int(start.integers(last_start(len(stored), clip.frames) + 1))
            elif start and start + clip.frames > len(stored):
                raise InputError(f"{self.name(index)} ends after {len(stored)} frames, before {start + clip.frames}")
            frames = _decoded(stored[start : start + clip.frames], clip.size)
            return repeat_last(frames, clip.frames), self._records.label(features)

    def size(self, index):
        return len(self._records.stored[index])

    def digest(self, index):
        return hashlib.sha256(self._records.stored[index]).hexdigest()

    def origin(self, index):
        """The record itself."""
        return self.size(index), functools.partial(self.digest, index)


class StoredVideo(NamedTuple):
    """A video of a prepared data set: a row of its videos.json.

    Attributes:
      source: name of the original file in the data set.
      label: class; -1 for none.
      fps: frames per second; 0.0 if unknown.
      frames: number of frames.
      shard: number of its file within the split.
      record: number of its first record within that file.
      bytes: size of the original file.
      sha256: SHA-256 of the original file.
    """

    source: str
    label: int
    fps: float
    frames: int
    shard: int
    record: int
    bytes: int
    sha256: str


class PreparedSource(Source):
    """A split of a data set written by `larp-jax prepare`.

    A record contains consecutive frames, and videos.json lists the records of each video: numbers of frames are known
    without reading, and only the records that overlap a clip are read. A part of a split, such as train[:10%],
    consists of whole videos, those that begin in it.

    Arguments and errors are those of `TfdsSource`.
    """

    def __init__(self, data_set: str | os.PathLike, split: str = "train"):
        self._records = _Records(data_set, split)
        super().__init__(self._records.label_names)
        with self._records.damage_as_input_error():
            self._find_videos()

    def _find_videos(self) -> None:
        from array_record.python import array_record_data_source

        data_set, split, folder = self._records.data_set, self._records.split, self._records.folder
        index = read_json(folder / VIDEOS)
        self._run = index["frames_per_record"]
        instructions = _instructions(data_set, folder, split)
        stored = {}
        for rows in index["splits"].values():
            for row in itertools.starmap(StoredVideo, rows["videos"]):
                stored.setdefault(rows["shards"][row.shard], []).append(row)
        whole = {file.filename: dataclasses.replace(file, skip=0, take=-1) for file in instructions}
        lengths = [0, *(file.take for file in whole.values())]
        offsets = dict(zip(whole, itertools.accumulate(lengths), strict=False))
        self._videos, self._records_of = [], []
        for file in instructions:
            for row in stored.get(os.path.basename(file.filename), ()):
                last = row.record + -(-row.frames // self._run)
                if not (row.frames > 0 <= row.record and last <= whole[file.filename].take):
                    raise ValueError(f"{row.source!r} has records that do not exist")
                if file.skip <= row.record < file.skip + file.take:
                    self._videos.append(row)
                    self._records_of.append(offsets[file.filename] + row.record)
        if not self._videos:
            raise InputError(f"no video of TFDS data set {data_set} begins in split {split!r}; choose a larger part")
        self._records.stored = array_record_data_source.ArrayRecordDataSource(list(whole.values()))
        claimed = min(self._run, self._videos[0].frames)
        stored_frames = len(self._records.frames(self._records.read(self._records_of[0])))
        if stored_frames != claimed:
            raise ValueError(f"its records have {stored_frames} frames, but {VIDEOS} declares {claimed}")

    def __len__(self):
        return len(self._videos)

    def name(self, index):
        """The name of the original file."""
        return self._videos[index].source

    def fps(self, index):
        return self._videos[index].fps

    def frames(self, index):
        return self._videos[index].frames

    def aspect(self, index):
        """That of the frames, which all have the same size."""
        return self._records.aspect

    def label(self, index):
        return self._videos[index].label

    def read_clip(self, index, start, clip):
        row = self._videos[index]
        if isinstance(start, np.random.Generator):
            start = int(start.integers(last_start(row.frames, clip.frames) + 1))
        elif start and start + clip.frames > row.frames:
            raise InputError(f"{self.name(index)} ends after {row.frames} frames, before {start + clip.frames}")
        stop = min(start + clip.frames, row.frames)
        with _as_input_error(f"{self.name(index)} of {self._records.data_set}"):
            runs = []
            for number in range(start // self._run, -(-stop // self._run)):
                run = self._records.frames(self._records.read(self._records_of[index] + number))
                first = number * self._run
                runs.append(run[max(0, start - first) : stop - first])
            as_array = self._records.encoding == "bytes"
            stored = np.concatenate(runs) if as_array else list(itertools.chain.from_iterable(runs))
            frames = _decoded(stored, clip.size)
            return repeat_last(frames, clip.frames), row.label

    def size(self, index):
        return sum(len(self._records.stored[record]) for record in self._runs(index))

    def digest(self, index):
        digest = hashlib.sha256()
        for record in self._runs(index):
            digest.update(self._records.stored[record])
        return digest.hexdigest()

    def origin(self, index):
        """The file it was prepared from; only its size and hash are known."""
        return self._videos[index].bytes, lambda: self._videos[index].sha256

    def _runs(self, index) -> range:
        first = self._records_of[index]
        return range(first, first + -(-self._videos[index].frames // self._run))


@contextlib.contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Context manager for reading files of TFDS: errors become one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # any error from json, protobuf, array_record, zlib and NumPy on a damaged file
        raise InputError(f"{what} is damaged ({reason(error)}); prepare the data set again") from error


def _decoded(frames: Sequence[bytes] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if not len(frames):
        raise InputError("it contains no frames")
    if not isinstance(frames, np.ndarray):
        return video.decode_images(frames, size)
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3))
    return frames if frames.shape[1:3] == size else video.resize_frames(frames, size)


def tfds_root() -> pathlib.Path:
    """The folder of TFDS data sets: $TFDS_DATA_DIR, or TFDS's own default."""
    from tensorflow_datasets.core import constants

    return local_path(os.environ.get("TFDS_DATA_DIR") or constants.DATA_DIR, "TFDS_DATA_DIR")


def find_data_set(data_set: str) -> pathlib.Path:
    """The folder of a prepared data set: that of the newest version, and of the only config if none is named."""
    root = tfds_root()
    # `larp-jax prepare --output DIR` writes data sets to any folder.
    local = files.local_path(data_set, "data set")
    folder = root / local
    if not folder.is_dir() and local.is_dir():
        folder = local
    cure = f"run: tfds build {data_set} --file_format=array_record --data_dir={root}"
    if data_set.partition("/")[0] == "moving_shapes":
        cure = f"give {data_set!r} without tfds:, it is generated on first use"
    elif local.is_absolute() or data_set[0] in "~.":
        cure = "give the path of a data set, or its name"
    if not folder.is_dir():
        raise InputError(f"TFDS data set {data_set} is not prepared in {root}; {advice(local) or cure}")
    if (found := _newest_version(folder)) is not None:
        return found
    configs = {path.name: found for path in sorted(folder.iterdir()) if (found := _newest_version(path)) is not None}
    if len(configs) > 1:
        raise InputError(
            f"TFDS data set {data_set} has configs {', '.join(configs)}; name one, as in {data_set}/CONFIG"
        )
    if not configs:
        raise InputError(f"{folder} contains no prepared TFDS data set; {advice(folder) if folder == local else cure}")
    return next(iter(configs.values()))


def _newest_version(folder: pathlib.Path) -> pathlib.Path | None:
    from tensorflow_datasets.core.utils import version

    for candidate in [folder, *(folder / str(v) for v in reversed(version.list_all_versions(folder)))]:
        if (candidate / "features.json").exists():
            return candidate
    return None


def _video_feature(data_set: str, features: dict) -> tuple[str, tuple[int, ...], str]:
    """(name, [T, H, W, C] with 0 for unknown sizes, encoding) of the video feature."""
    videos = {}
    for name, feature in features.items():
        if "video" in feature:
            videos[name] = _shape(feature["video"]), "image"
        elif "image" in feature.get("sequence", {}).get("feature", {}):
            length = max(0, int(feature["sequence"].get("length", 0)))
            videos[name] = (length, *_shape(feature["sequence"]["feature"]["image"])), "image"
        elif name == "video" and "text" in feature.get("sequence", {}).get("feature", {}):
            videos[name] = (0,), "text"  # H.264 keyframes, for which TFDS has no feature
        elif feature.get("tensor", {}).get("dtype") == "uint8":
            shape = _shape(feature["tensor"])
            if len(shape) == 4 and all(shape[1:]) and shape[3] in (1, 3):
                videos[name] = shape, feature["tensor"].get("encoding", "none")
    chosen = _preferred(videos, "video")
    if not chosen:
        raise InputError(
            f"TFDS data set {data_set} has no video: none of {', '.join(features)} is a Video, a Sequence of Image "
            "or a uint8 Tensor [T, H, W, 1 or 3]"
        )
    return chosen, *videos[chosen]


def _shape(feature: dict) -> tuple[int, ...]:
    return tuple(max(0, int(side)) for side in feature.get("shape", {}).get("dimensions", ()))


def _preferred(names: Iterable[str], name: str) -> str:
    """`name` if it is among the names, else the first of them in alphabetical order; empty if there are none."""
    return name if name in names else next(iter(sorted(names)), "")


def _open_records(data_set: str, folder: pathlib.Path, split: str):
    """Random access to the records of a split, as bytes."""
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource(_instructions(data_set, folder, split))


def split_names(data_set: str) -> list[str]:
    """The splits of a TFDS data set that are not empty."""
    with _as_input_error(f"TFDS data set {data_set}"):
        return [name for name, split in _splits(data_set, find_data_set(data_set)).items() if split.num_examples]


def _splits(data_set: str, folder: pathlib.Path):
    from tensorflow_datasets.core import dataset_info, naming, splits

    info = dataset_info.read_proto_from_builder_dir(folder)
    if info.file_format != "array_record":
        raise InputError(
            f"TFDS data set {data_set} in {folder} is stored as {info.file_format or 'tfrecord'}, which has no "
            f"random access; run: tfds convert_format --dataset_dir={folder} --out_file_format=array_record"
        )
    template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=info.name, filetype_suffix=info.file_format)
    return splits.SplitDict.from_proto(info.splits, template)


def _instructions(data_set: str, folder: pathlib.Path, split: str) -> list:
    """The instructions of TFDS for a split: its files, and the range of records in each."""
    known = _splits(data_set, folder)
    try:
        instructions = known[split].file_instructions
    except (KeyError, ValueError) as error:
        raise InputError(f"TFDS data set {data_set} has no split {split!r}; it has {', '.join(known)}") from error
    if not instructions:
        raise InputError(f"split {split!r} of TFDS data set {data_set} is empty; choose another")
    for file in instructions:
        if not pathlib.Path(os.path.normpath(file.filename)).is_relative_to(os.path.normpath(folder)):
            raise InputError(f"TFDS data set {data_set} names a file outside {folder}: {file.filename}")
        if file.examples_in_shard > os.path.getsize(file.filename):
            raise ValueError(f"{file.filename} is too small for {file.examples_in_shard} records")
    return instructions
