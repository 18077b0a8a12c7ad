"""Convert videos to a TFDS data set of frames at training size, so that training decodes only the frames it uses.

The output is a function of the input and the settings: neither the number of workers nor interruptions change a byte.
The videos, in the order of their list, are divided into shards. One worker writes a shard under a temporary name, and a
note next to it when it is complete; a later call writes the shards without a note. In the end, all shards get the names
that TFDS expects, and the metadata is written, the report last.

    DIR/videos-SPLIT.array_record-00000-of-00008   records of `video` (16 frames, fewer in the last one of a video),
                                                   `start` (number of the first frame), `source`, `fps`, `label`
    DIR/dataset_info.json, features.json, ...      metadata of TFDS
    DIR/videos.json                                the records of each video (`larp_jax.data.tfds.StoredVideo`)
    DIR/report.json                                totals, skipped files, histograms, duplicates
    DIR/.prepare/                                  work in progress; removed at the end
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import multiprocessing
import os
import pathlib
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from larp_jax import files, storage
from larp_jax.data import video
from larp_jax.data.clips import ClipSpec
from larp_jax.data.folders import cores, open_all
from larp_jax.data.listing import Item, Listing, list_videos
from larp_jax.data.pictures import read_windows, video_digest, video_size
from larp_jax.data.prepare_report import look, make_report, readable, thumbnail
from larp_jax.data.sources import open_source
from larp_jax.data.tfds import VIDEOS, StoredVideo
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1
# Frames per record: the length of a usual clip, so that a window overlaps at most two records.
FRAMES_PER_RECORD = 16
# name: (best quality, worst quality, default quality); see docs/data.md for their size and speed.
STORAGE = {"raw": (0, 0, 0), "jpeg": (1, 31, 2), "h264": (0, 51, 14)}
SHARD_BYTES = 256 * 2**20
MIN_SHARDS = 8  # per split, if it has as many videos, so that as many workers have something to do
SAMPLED = 8  # videos of which the estimate encodes a few frames
REPORT, WORK, NAME = "report.json", ".prepare", "videos"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How videos are stored.

    Attributes:
      size: H = W of the frames, or (H, W). They are resized to cover it and the center is cut out, as in training.
      storage: "raw" (uint8), "jpeg" or "h264" (keyframes only).
      quality: for jpeg, FFmpeg's scale from 1 (best) to 31; for h264, x264's CRF from 0 (best) to 51; None for the
        default.
    """

    size: int | tuple[int, int] = 128
    storage: str = "jpeg"
    quality: int | None = None

    def __post_init__(self):
        if self.storage not in STORAGE:
            raise InputError(f"--storage {self.storage} is not known; choose from {', '.join(STORAGE)}")
        best, worst, default = STORAGE[self.storage]
        if self.quality is None:
            object.__setattr__(self, "quality", default)
        if not best <= self.quality <= worst:
            scale = f"is {best} (best) to {worst}" if worst else "does not apply to raw; leave it out"
            raise InputError(f"--quality of {self.storage} {scale}, got {self.quality}")
        sides = self.clip.size
        if any(side < 8 or side % 2 for side in sides):
            raise InputError(f"--size must be even numbers of at least 8, got {','.join(map(str, sides))}")
        object.__setattr__(self, "size", self.clip.resolution)

    @property
    def clip(self) -> ClipSpec:
        """The frames of a record."""
        return ClipSpec(FRAMES_PER_RECORD, self.size)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a split that one worker writes: `items`, and (frames, fps) of each according to its header."""

    split: str
    number: int
    items: list[Item]
    headers: list[tuple[int, float]]


def prepare(
    inputs: Sequence[str],
    output: str | os.PathLike,
    settings: Settings,
    *,
    root: str | None = None,
    workers: int = 0,
    beam_options: str | None = None,
    estimate_only: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> dict[str, Any] | None:
    """Converts videos to a TFDS data set, or continues an interrupted call with the same arguments.

    Args:
      inputs: as for `larp_jax.data.listing.list_videos`.
      output: folder of the data set, whose SPEC is then `tfds:OUTPUT`; or a folder in a bucket, for which each worker
        writes a shard to its temporary files and uploads it.
      settings: size and storage.
      root: the folder that paths in lists are relative to.
      workers: number of processes; 0 for one per core, 1 for this process only.
      beam_options: options of Apache Beam, such as `--runner=DirectRunner`; its workers then write the shards, and need
        inputs and output under the same paths.
      estimate_only: whether to stop after the estimate.
      progress: called with each line of progress.

    Returns:
      The contents of report.json; None with `estimate_only`.

    Raises:
      InputError: the input is wrong, the disk is too small, or the folder contains something else.
      RuntimeError: a worker died, or the output cannot be written.
    """
    output = files.check_folder(output)
    listing = list_videos(inputs, root)
    fingerprint = _fingerprint(listing, settings)
    if (report := _finished(output, fingerprint)) is not None:
        damaged = [name for name, size in report.get("files", {}).items() if _file_size(output / name) != size]
        if not damaged:
            progress(f"{output} is already complete; nothing to do")
            return report
        progress(f"{output / damaged[0]} is missing or damaged; writing the data set again")
    if estimate_only:
        with _quiet():
            progress(_estimate(_plan(listing), settings, output)[0])
        return None
    if report is None:
        _check_output(output)
    with files.claim(output / WORK) as work, _quiet():
        if report is None and (report := _finished(output, fingerprint)) is not None:
            return report  # another call has just ended
        (output / REPORT).unlink(missing_ok=True)
        plan = _read_json(work / "plan.json")
        if plan is None:
            plan = {"fingerprint": fingerprint, **_plan(listing)}
            text, needed = _estimate(plan, settings, output)
            free = _free(work)
            progress(text)
            if needed > free:
                raise InputError(
                    f"--output {output} has {readable(int(free))} free, the data set needs about {readable(needed)};"
                    " give a folder on a larger disk, a smaller --size, or --storage jpeg"
                )
            plan["needed"] = needed
            files.write_json(work / "plan.json", plan, indent=None)
        elif plan["fingerprint"] != fingerprint:
            raise InputError(
                f"--output {output} contains part of a data set with other videos or settings; name another folder, or "
                f"delete {work}"
            )
        shards = _cut(plan)
        missing = _missing(output, work, shards)
        if len(missing) < len(shards):
            progress(f"continuing: {len(shards) - len(missing)} of {len(shards)} shards exist")
        jobs = [(str(work), settings, shard) for shard in missing]
        if beam_options is None:
            _write_all(jobs, workers or cores(), sum(len(shard.items) for shard in missing))
        else:
            _write_by_beam(jobs, beam_options)
        return _finish(output, listing, settings, plan, shards)


def _missing(output: pathlib.Path, work: pathlib.Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards that no earlier call wrote, or whose file has another size than noted."""
    notes = [_note(work, shard) for shard in shards]
    named = _named(output, shards, notes) if all(notes) else {}

    def is_whole(shard, note):
        paths = _shard_path(work, shard), named.get((shard.split, shard.number))
        return note is not None and any(path and _file_size(path) == note["bytes"] for path in paths)

    return [shard for shard, note in zip(shards, notes, strict=True) if not is_whole(shard, note)]


def _template(output: pathlib.Path):
    from tensorflow_datasets.core import naming

    return naming.ShardedFileTemplate(data_dir=output, dataset_name=NAME, filetype_suffix="array_record")


def _named(
    output: pathlib.Path, shards: Sequence[Shard], notes: Sequence[Mapping]
) -> dict[tuple[str, int], pathlib.Path]:
    """The final path of each shard that has records, by (split, number), in the order of the shards."""
    kept = collections.defaultdict(list)
    for shard, note in zip(shards, notes, strict=True):
        if note["records"]:
            kept[shard.split].append(shard.number)
    named = {}
    for split, numbers in kept.items():
        names = _template(output).replace(split=split).sharded_filepaths(num_shards=len(numbers))
        named |= {(split, number): output / path.name for number, path in zip(numbers, names, strict=True)}
    return named


# ------------------------------------------------------------------------------------------------------ plan, estimate


def _plan(listing: Listing) -> dict[str, Any]:
    """The videos to decode, with (frames, fps) of their headers, and the skipped ones; ready for JSON."""
    paths = [pathlib.Path(item.path) for item in listing.items if item.path]
    files, unreadable = open_all(paths)
    headers = {str(file.path): (file.info.frames, file.info.fps) for file in files}
    reasons = {path: _short(reason, path) for path, reason in unreadable}
    sources = {spec: open_source(spec) for spec in {item.spec for item in listing.items if item.spec}}
    kept, skipped = [], [list(entry) for entry in listing.missing]
    for item in listing.items:
        if item.path in reasons:
            skipped.append([item.split, item.source, reasons[item.path]])
        elif item.path:
            kept.append([dataclasses.astuple(item), headers[item.path]])
        else:
            source = sources[item.spec]
            kept.append([dataclasses.astuple(item), (source.frames(item.index), source.fps(item.index))])
    if not kept:
        raise InputError(f"none of the {len(listing.items)} videos can be read; the first: {skipped[0][1:]}")
    return {"videos": kept, "skipped": skipped}


def _estimate(plan: Mapping[str, Any], settings: Settings, output: pathlib.Path) -> tuple[str, int]:
    """(message, bytes that the data set will need), estimated from a few frames of a few videos."""
    videos = plan["videos"]
    total = sum(frames for _, (frames, _) in videos)
    height, width = settings.clip.size
    per_frame = 3.0 * height * width
    if settings.storage != "raw":
        numbers = sorted({number * len(videos) // SAMPLED for number in range(SAMPLED)})
        stored = count = 0
        for item, header in (videos[number] for number in numbers):
            with contextlib.suppress(InputError):
                _, frames = next(_runs(Item(*item), header[0], settings.clip))
                stored += sum(map(len, _encode(frames, settings)))
                count += len(frames)
        per_frame = stored / max(1, count)
    needed = int(total * per_frame) + MIN_SHARDS * 2**17
    originals = sum(_file_size(item[2]) for item, _ in videos)
    free = _free(output)
    return (
        f"estimate: {len(videos):,} videos, {total:,} frames at {height}x{width} as {settings.storage}"
        f" need {readable(needed)} (original files: {readable(originals)})"
        + ("" if free == math.inf else f"; {readable(int(free))} are free")
    ), needed


def _free(folder: pathlib.Path) -> float:
    """Free bytes on the disk of a folder, which may not exist yet; infinite in a bucket."""
    if storage.is_remote(folder):
        return math.inf
    place = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(place).free


def _cut(plan: Mapping[str, Any]) -> list[Shard]:
    """Divides each split into shards with about equal numbers of frames; a function of the plan only."""
    splits = collections.defaultdict(list)
    for item, header in plan["videos"]:
        splits[item[0]].append((Item(*item), tuple(header)))
    frames = {split: sum(header[0] for _, header in videos) for split, videos in splits.items()}
    shards = []
    for split, videos in splits.items():
        share = plan["needed"] * frames[split] / sum(frames.values())
        count = min(len(videos), max(MIN_SHARDS, -(-int(share) // SHARD_BYTES)))
        parts, done = [[] for _ in range(count)], 0
        for entry in videos:
            parts[min(count - 1, done * count // frames[split])].append(entry)
            done += entry[1][0]
        for number, part in enumerate(filter(None, parts)):
            shards.append(Shard(split, number, [item for item, _ in part], [header for _, header in part]))
    return shards


def _fingerprint(listing: Listing, settings: Settings) -> str:
    """SHA-256 of everything that determines the output; files count by name and size."""
    files = [(item.split, item.source, item.label, item.spec, _file_size(item.path)) for item in listing.items]
    content = [FORMAT, dataclasses.astuple(settings), files, listing.label_names, listing.missing]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_size(path: str | os.PathLike) -> int:
    """Bytes of a file or of a video's pictures; 0 if they do not exist, which the report will show."""
    if storage.is_remote(path):
        path = files.any_path(path)
        return files.size(path) if path.is_file() else 0
    with contextlib.suppress(InputError, OSError):
        return video_size(path)
    return 0


def _short(reason: str, path: str) -> str:
    """An error message without the path and the advice."""
    return reason.removeprefix(f"{path}: ").partition(";")[0]


# --------------------------------------------------------------------------------------------------- folder, old runs


def _finished(output: pathlib.Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of a complete data set with this fingerprint; None if there is none."""
    report = _read_json(output / REPORT)
    if report is None:
        return None
    if report.get("fingerprint") != fingerprint:
        raise InputError(f"--output {output} contains a data set of other videos or settings; name another folder")
    files.remove_tree(output / WORK)  # left if the earlier call was killed just before its end
    return report


def _check_output(output: pathlib.Path) -> None:
    """`InputError` if a folder contains anything that was not written by an earlier call."""
    if output.is_dir() and not (output / WORK).is_dir() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty; name a new folder")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); delete its folder and run larp-jax prepare again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences warnings about damaged files; the report lists them."""
    reader = logging.getLogger(video.__name__)
    reader.disabled = True
    try:
        yield
    finally:
        reader.disabled = False


# ------------------------------------------------------------------------------------------------------------- shards


def _write_all(jobs: Sequence[tuple], workers: int, videos: int) -> None:
    """Writes shards, in separate processes if there are several workers."""
    from tqdm import tqdm

    with tqdm(total=videos, desc="preparing", unit="video", disable=not jobs, mininterval=1) as progress:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                write_shard(job)
                progress.update(len(job[2].items))
            return
        # Spawned, because a forked process can inherit locks of threads that do not exist in it.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin_worker)
        try:
            running = {pool.submit(write_shard, job): len(job[2].items) for job in jobs}
            for done in concurrent.futures.as_completed(running):
                done.result()
                progress.update(running[done])
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError("a worker was killed or crashed; the same command continues") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ends this worker when its parent process ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger(video.__name__).disabled = True
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_by_beam(jobs: Sequence[tuple], options: str) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError("--beam-options needs Apache Beam; run: pip install apache-beam") from error
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(write_shard)


def write_shard(job: tuple[str, Settings, Shard]) -> None:
    """Writes the shard of a job (work folder, settings, shard): its file, then its note. Can be repeated."""
    from array_record.python import array_record_data_source, array_record_module

    work, settings, shard = files.any_path(job[0]), *job[1:]
    path = _shard_path(work, shard)
    stored, skipped, records = [], [], 0
    try:
        with files.replacing(path) as temporary:
            # Frames are already compressed, or not to be compressed.
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                for item, (claimed, fps) in zip(shard.items, shard.headers, strict=True):
                    try:
                        size, digest, item = _origin(item)
                        count, appearance = _write_video(writer, item, claimed, fps, settings)
                    except (InputError, FileNotFoundError, PermissionError) as error:
                        skipped.append([item.split, item.source, _short(str(error), item.path)])
                        continue
                    row = StoredVideo(item.source, item.label, fps, count, -1, records, size, digest)
                    stored.append({"row": row, "claimed": claimed, "look": appearance})
                    records += -(-count // FRAMES_PER_RECORD)
            finally:
                writer.close()
            # On a full disk, records may be lost without an error.
            if records and len(array_record_data_source.ArrayRecordDataSource([str(temporary)])) != records:
                raise RuntimeError(f"{temporary} contains fewer records than were written")
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(f"{path} cannot be written ({error}); the same command continues") from error
    note = {"videos": stored, "skipped": skipped, "records": records, "bytes": files.size(path)}
    files.write_json(_note_path(work, shard), note, indent=None)


def _shard_path(work: pathlib.Path, shard: Shard) -> pathlib.Path:
    return work / f"{shard.split}-{shard.number:05d}.array_record"


def _note_path(work: pathlib.Path, shard: Shard) -> pathlib.Path:
    return work / f"{shard.split}-{shard.number:05d}.json"


def _note(work: pathlib.Path, shard: Shard) -> dict[str, Any] | None:
    """The note of a complete shard; None if there is none."""
    return _read_json(_note_path(work, shard))


def _origin(item: Item) -> tuple[int, str, Item]:
    """(bytes, SHA-256) of the original of a video, and the item with its label, which only TFDS records contain."""
    if item.path:
        return video_size(item.path), video_digest(item.path), item
    source = _opened(item.spec)
    size, digest = source.origin(item.index)
    return size, digest(), dataclasses.replace(item, label=source.label(item.index))


_sources: dict[str, Any] = {}  # open data sets of this worker


def _opened(spec: str):
    if spec not in _sources:
        _sources[spec] = open_source(spec)
    return _sources[spec]


def _runs(item: Item, frames: int, clip: ClipSpec) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first frame, uint8 [n, H, W, 3]) of each record."""
    if item.path:
        for start, run, valid in read_windows(item.path, clip):
            yield start, run[:valid]
        return
    for start in range(0, frames, clip.frames):
        record = dataclasses.replace(clip, frames=min(clip.frames, frames - start))
        yield start, _opened(item.spec).read_clip(item.index, start, record)[0]


def _encode(frames: np.ndarray, settings: Settings) -> list[bytes]:
    """The values of the feature `video` of a record."""
    if settings.storage == "raw":
        return [frames.tobytes()]
    encode = {"jpeg": video.encode_jpeg, "h264": video.encode_h264}[settings.storage]
    return encode(frames, settings.quality)


def _write_video(writer, item: Item, claimed: int, fps: float, settings: Settings) -> tuple[int, str]:
    """Writes the records of a video and returns (number of frames, look)."""
    from tensorflow_datasets.proto import tf_example_pb2

    count, gray = 0, []
    for start, frames in _runs(item, claimed, settings.clip):
        example = tf_example_pb2.Example()
        features = example.features.feature
        features["video"].bytes_list.value.extend(_encode(frames, settings))
        features["source"].bytes_list.value.append(os.fsencode(item.source))
        features["fps"].float_list.value.append(fps)
        features["start"].int64_list.value.append(start)
        features["label"].int64_list.value.append(item.label)
        writer.write(example.SerializeToString(deterministic=True))
        count += len(frames)
        gray += [thumbnail(frame) for frame in frames]
    return count, look(gray)


# ----------------------------------------------------------------------------------------------------- finish, report


def _finish(
    output: pathlib.Path, listing: Listing, settings: Settings, plan: Mapping[str, Any], shards: Sequence[Shard]
) -> dict[str, Any]:
    """Renames the shards to their final names and writes the other files, the report last."""
    work = output / WORK
    notes = {(shard.split, shard.number): _note(work, shard) for shard in shards}
    skipped = plan["skipped"] + [entry for note in notes.values() for entry in note["skipped"]]
    named = _named(output, shards, list(notes.values()))
    if not named:
        raise InputError(f"none of the videos can be read; the first: {skipped[0][1:]}")
    kept = collections.defaultdict(list)
    splits: dict[str, dict[str, list]] = {}
    for shard in shards:
        key = shard.split, shard.number
        if key not in named:
            continue
        written, path, note = _shard_path(work, shard), named[key], notes[key]
        if written.exists():
            files.move(written, path)
        if _file_size(path) != note["bytes"]:
            raise InputError(f"{path} is missing or damaged; run the same command to write it again")
        split = splits.setdefault(shard.split, {"shards": [], "videos": []})
        number = len(kept[shard.split])
        split["videos"] += [StoredVideo(*entry["row"])._replace(shard=number) for entry in note["videos"]]
        split["shards"].append(path.name)
        kept[shard.split].append(shard)
    described = {"format": FORMAT, **dataclasses.asdict(settings), "frames_per_record": FRAMES_PER_RECORD}
    files.write_json(output / VIDEOS, {**described, "splits": splits}, indent=None)
    _write_tfds(output, listing, settings, _template(output), kept, notes)
    written = [(split, note) for (split, _), note in notes.items()]
    report = make_report(written, listing.label_names, skipped, listing.ignored)
    sizes = {path.name: notes[key]["bytes"] for key, path in named.items()}
    report = {"fingerprint": plan["fingerprint"], **described, "encoding": _ENCODING[settings.storage], **report}
    report["files"] = sizes
    files.write_json(output / REPORT, report)
    files.remove_tree(work)
    return report


_ENCODING = {
    "raw": "uint8 RGB",
    "jpeg": "JPEG 4:2:0 by FFmpeg's mjpeg at qmin = qmax = quality",
    "h264": "H.264 4:2:0 keyframes by x264 at CRF = quality",
}


def _write_tfds(output, listing, settings: Settings, template, kept, notes) -> None:
    import tensorflow_datasets as tfds

    image = (*settings.clip.size, 3)
    stored = {
        "raw": lambda: tfds.features.Tensor(shape=(None, *image), dtype=np.uint8, encoding="bytes"),
        "jpeg": lambda: tfds.features.Sequence(tfds.features.Image(shape=image, encoding_format="jpeg")),
        "h264": lambda: tfds.features.Sequence(tfds.features.Text()),  # TFDS has no feature for H.264
    }
    features = {
        "video": stored[settings.storage](),
        "source": tfds.features.Text(),
        "fps": tfds.features.Scalar(np.float32),
        "start": tfds.features.Scalar(np.int64),
        "label": tfds.features.ClassLabel(names=listing.label_names) if listing.label_names
        else tfds.features.Scalar(np.int64),
    }  # fmt: skip
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[notes[split, shard.number]["records"] for shard in parts],
            num_bytes=sum(notes[split, shard.number]["bytes"] for shard in parts),
            filename_template=template.replace(split=split),
        )
        for split, parts in kept.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=output,
        features=tfds.features.FeaturesDict(features),
        split_infos=sorted(infos, key=lambda info: info.name),
        filename_template=template,
        check_data=False,
        description="Videos at training size, written by larp-jax prepare.",
        disable_shuffling=True,
    )
