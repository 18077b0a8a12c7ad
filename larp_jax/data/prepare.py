"""Videos into a TFDS data set of frames at training size, so that training decodes no more than it shows.

The output is a function of the input and the settings: neither the number of workers nor being killed changes a byte.
The videos, in the order of their list, are cut into shards. Each shard is made by one worker under a temporary name and
gets a note beside it when it is whole; a later run makes those without a note. When all are there they are renamed to
what TFDS calls them, and the metadata is written, the report last.

    DIR/videos-SPLIT.array_record-00000-of-00008   records of `video` (16 frames, the last one of a video fewer),
                                                   `start` (number of the first of them), `source`, `fps`, `label`
    DIR/dataset_info.json, features.json, ...      what TFDS reads
    DIR/videos.json                                which records are which video (`larp_jax.data.tfds.StoredVideo`)
    DIR/report.json                                totals, skipped files, histograms, duplicates
    DIR/.prepare/                                  until it is done
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
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

from larp_jax import files
from larp_jax.data import video
from larp_jax.data.clips import ClipSpec
from larp_jax.data.folders import cores, open_all
from larp_jax.data.listing import Item, Listing, list_videos
from larp_jax.data.prepare_report import look, make_report, readable, thumbnail
from larp_jax.data.sources import open_source
from larp_jax.data.tfds import VIDEOS, StoredVideo
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1
# Frames a record: those of a usual clip, so that a window touches two records at most.
FRAMES_PER_RECORD = 16
# name: (best quality, worst quality, default quality); see docs/data.md for what they cost.
STORAGE = {"raw": (0, 0, 0), "jpeg": (1, 31, 2), "h264": (0, 51, 14)}
SHARD_BYTES = 256 * 2**20
MIN_SHARDS = 8  # a split, where there are as many videos: work for as many workers
SAMPLED = 8  # videos that the estimate encodes a few frames of
REPORT, WORK, NAME = "report.json", ".prepare", "videos"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How videos are stored.

    Attributes:
      size: H = W of the frames. The shorter side is resized to it and the center is cut out, as training does.
      storage: "raw" (uint8), "jpeg" or "h264" (keyframes only).
      quality: of jpeg FFmpeg's scale, 1 (best) to 31; of h264 x264's CRF, 0 (best) to 51; None for the default.
    """

    size: int = 128
    storage: str = "jpeg"
    quality: int | None = None

    def __post_init__(self):
        if self.storage not in STORAGE:
            raise InputError(f"--storage {self.storage} is not known; choose from {', '.join(STORAGE)}")
        best, worst, default = STORAGE[self.storage]
        if self.quality is None:
            object.__setattr__(self, "quality", default)
        if not best <= self.quality <= worst:
            scale = f"is {best} (best) to {worst}" if worst else "does not go with raw; leave it out"
            raise InputError(f"--quality of {self.storage} {scale}, got {self.quality}")
        if self.size < 8 or self.size % 2:
            raise InputError(f"--size {self.size}: give an even number from 8 up")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a split that one worker makes: `items` with what their headers say, (frames, fps) each."""

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
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any] | None:
    """Makes a TFDS data set of videos, or goes on where an earlier call with the same arguments was stopped.

    Args:
      inputs: what `larp_jax.data.listing.list_videos` takes.
      output: folder of the data set; `tfds:OUTPUT` is then its SPEC.
      settings: size and storage.
      root: the folder that lists mean.
      workers: processes; 0 for one a core, 1 for none but this one.
      beam_options: options of Apache Beam, such as `--runner=DirectRunner`; its workers then make the shards, and need
        to see inputs and output under the same paths.
      estimate_only: whether to stop after the estimate.
      say: is told the estimate and what happens.

    Returns:
      The report as it stands in report.json; None after an estimate.

    Raises:
      InputError: the input is wrong, the disk too small, or the folder holds something else.
      RuntimeError: a worker died, or the output cannot be written.
    """
    output = files.check_folder(output)
    listing = list_videos(inputs, root)
    fingerprint = _fingerprint(listing, settings)
    if (report := _finished(output, fingerprint)) is not None:
        damaged = [name for name, size in report.get("files", {}).items() if _file_size(output / name) != size]
        if not damaged:
            say(f"{output} is complete already; nothing to do")
            return report
        say(f"{output / damaged[0]} is missing or damaged; making the data set again")
    if estimate_only:
        with _quiet():
            say(_estimate(_plan(listing), settings, output)[0])
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
            free = shutil.disk_usage(work).free
            say(text)
            if needed > free:
                raise InputError(
                    f"--output {output} has {readable(free)} free, the data set needs about {readable(needed)}; give a "
                    "folder on a larger disk, a smaller --size, or --storage jpeg"
                )
            plan["needed"] = needed
            files.write_json(work / "plan.json", plan, indent=None)
        elif plan["fingerprint"] != fingerprint:
            raise InputError(
                f"--output {output} holds a part of a data set of other videos or settings; name another folder, or "
                f"remove {work}"
            )
        shards = _cut(plan)
        missing = _missing(output, work, shards)
        if len(missing) < len(shards):
            say(f"continuing: {len(shards) - len(missing)} of {len(shards)} shards are there")
        jobs = [(str(work), settings, shard) for shard in missing]
        if beam_options is None:
            _make_all(jobs, workers or cores(), sum(len(shard.items) for shard in missing))
        else:
            _make_by_beam(jobs, beam_options)
        return _finish(output, listing, settings, plan, shards)


def _missing(output: pathlib.Path, work: pathlib.Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards that no earlier call made, or whose file is not as large any more as it was noted."""
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
    """What TFDS calls the file of each shard that holds records, by split and number; the order is the shards'."""
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
    """Which videos to decode, with (frames, fps) by their headers, and which not; as JSON has it."""
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
    """(what to tell, bytes that the data set will take), from a few frames of a few of the videos."""
    videos = plan["videos"]
    total = sum(frames for _, (frames, _) in videos)
    per_frame = 3.0 * settings.size**2
    if settings.storage != "raw":
        numbers = sorted({number * len(videos) // SAMPLED for number in range(SAMPLED)})
        stored = count = 0
        for item, header in (videos[number] for number in numbers):
            with contextlib.suppress(InputError):
                _, frames = next(_runs(Item(*item), header[0], settings.size))
                stored += sum(map(len, _encode(frames, settings)))
                count += len(frames)
        per_frame = stored / max(1, count)
    needed = int(total * per_frame) + MIN_SHARDS * 2**17
    originals = sum(_file_size(item[2]) for item, _ in videos)
    place = next(path for path in [output.absolute(), *output.absolute().parents] if path.exists())
    free = readable(shutil.disk_usage(place).free)
    return (
        f"estimate: {len(videos):,} videos, {total:,} frames at {settings.size}x{settings.size} as {settings.storage}"
        f" take {readable(needed)} (their files {readable(originals)}); {free} are free"
    ), needed


def _cut(plan: Mapping[str, Any]) -> list[Shard]:
    """The shards of each split, even by frames; a function of the plan alone."""
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
    """SHA-256 of everything that decides what is written; of the files, their names and sizes."""
    files = [(item.split, item.source, item.label, item.spec, _file_size(item.path)) for item in listing.items]
    content = [FORMAT, dataclasses.astuple(settings), files, listing.label_names, listing.missing]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_size(path: str | os.PathLike) -> int:
    """Bytes of a file; 0 of none, or one that is gone, which the report will say."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _short(reason: str, path: str) -> str:
    """A message without the path and the advice."""
    return reason.removeprefix(f"{path}: ").partition(";")[0]


# --------------------------------------------------------------------------------------------------- folder, old runs


def _finished(output: pathlib.Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of a data set that is complete, of this input."""
    report = _read_json(output / REPORT)
    if report is None:
        return None
    if report.get("fingerprint") != fingerprint:
        raise InputError(f"--output {output} holds a data set of other videos or settings; name another folder")
    shutil.rmtree(output / WORK, ignore_errors=True)  # where the earlier call was killed last
    return report


def _check_output(output: pathlib.Path) -> None:
    """Refuses a folder with anything in it that no earlier call put there."""
    if output.is_dir() and not (output / WORK).is_dir() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty; name a new folder")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove its folder and prepare anew") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what reading says of each damaged file; the report has it."""
    reader = logging.getLogger(video.__name__)
    reader.disabled = True
    try:
        yield
    finally:
        reader.disabled = False


# ------------------------------------------------------------------------------------------------------------- shards


def _make_all(jobs: Sequence[tuple], workers: int, videos: int) -> None:
    """Makes shards, by processes of their own if there are several workers."""
    from tqdm import tqdm

    with tqdm(total=videos, desc="preparing", unit="video", disable=not jobs, mininterval=1) as progress:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                make_shard(job)
                progress.update(len(job[2].items))
            return
        # Spawned: a copy of this process might hold locks of threads that it has not.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin_worker)
        try:
            running = {pool.submit(make_shard, job): len(job[2].items) for job in jobs}
            for done in concurrent.futures.as_completed(running):
                done.result()
                progress.update(running[done])
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError("a worker died, killed or crashed; the same command continues") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Makes a worker end when the process that started it does, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger(video.__name__).disabled = True
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_by_beam(jobs: Sequence[tuple], options: str) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError("--beam-options needs Apache Beam; run: pip install apache-beam") from error
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(make_shard)


def make_shard(job: tuple[str, Settings, Shard]) -> None:
    """Makes one shard of a (folder for work, settings, shard): its file, then its note. May be done over and over."""
    from array_record.python import array_record_data_source, array_record_module

    work, settings, shard = pathlib.Path(job[0]), *job[1:]
    path = _shard_path(work, shard)
    stored, skipped, records = [], [], 0
    try:
        with files.replacing(path) as temporary:
            # Frames are compressed already, or meant not to be.
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
            # What a full disk swallowed is noticed here.
            if records and len(array_record_data_source.ArrayRecordDataSource([str(temporary)])) != records:
                raise RuntimeError(f"{temporary} holds fewer records than were written")
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(f"{path} cannot be written ({error}); the same command continues") from error
    note = {"videos": stored, "skipped": skipped, "records": records, "bytes": path.stat().st_size}
    files.write_json(_note_path(work, shard), note, indent=None)


def _shard_path(work: pathlib.Path, shard: Shard) -> pathlib.Path:
    return work / f"{shard.split}-{shard.number:05d}.array_record"


def _note_path(work: pathlib.Path, shard: Shard) -> pathlib.Path:
    return work / f"{shard.split}-{shard.number:05d}.json"


def _note(work: pathlib.Path, shard: Shard) -> dict[str, Any] | None:
    """What `make_shard` noted of a shard that is whole."""
    return _read_json(_note_path(work, shard))


def _origin(item: Item) -> tuple[int, str, Item]:
    """(bytes, SHA-256) of what a video is made from, and the item with its label, which only the record knows."""
    if item.path:
        return os.path.getsize(item.path), files.digest(item.path), item
    source = _opened(item.spec)
    size, digest = source.origin(item.index)
    return size, digest(), dataclasses.replace(item, label=source.label(item.index))


_sources: dict[str, Any] = {}  # of this worker, kept open


def _opened(spec: str):
    if spec not in _sources:
        _sources[spec] = open_source(spec)
    return _sources[spec]


def _runs(item: Item, frames: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first frame, uint8 [n, size, size, 3]) of each record's frames."""
    if item.path:
        for start, run, valid in video.read_windows(item.path, ClipSpec(FRAMES_PER_RECORD, size)):
            yield start, run[:valid]
        return
    for start in range(0, frames, FRAMES_PER_RECORD):
        clip = ClipSpec(min(FRAMES_PER_RECORD, frames - start), size)
        yield start, _opened(item.spec).read_clip(item.index, start, clip)[0]


def _encode(frames: np.ndarray, settings: Settings) -> list[bytes]:
    """The values of a record's feature `video`."""
    if settings.storage == "raw":
        return [frames.tobytes()]
    encode = {"jpeg": video.encode_jpeg, "h264": video.encode_h264}[settings.storage]
    return encode(frames, settings.quality)


def _write_video(writer, item: Item, claimed: int, fps: float, settings: Settings) -> tuple[int, str]:
    """Writes the records of a video; (frames, look) of it."""
    from tensorflow_datasets.proto import tf_example_pb2

    count, gray = 0, []
    for start, frames in _runs(item, claimed, settings.size):
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
    """Gives the shards their names and writes what stands beside them, the report last."""
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
        made, path, note = _shard_path(work, shard), named[key], notes[key]
        if made.exists():
            os.replace(made, path)
        if _file_size(path) != note["bytes"]:
            raise InputError(f"{path} has vanished or is damaged; the same command makes it again")
        split = splits.setdefault(shard.split, {"shards": [], "videos": []})
        number = len(kept[shard.split])
        split["videos"] += [StoredVideo(*entry["row"])._replace(shard=number) for entry in note["videos"]]
        split["shards"].append(path.name)
        kept[shard.split].append(shard)
    described = {"format": FORMAT, **dataclasses.asdict(settings), "frames_per_record": FRAMES_PER_RECORD}
    files.write_json(output / VIDEOS, {**described, "splits": splits}, indent=None)
    _write_tfds(output, listing, settings, _template(output), kept, notes)
    made = [(split, note) for (split, _), note in notes.items()]
    report = make_report(made, listing.label_names, skipped, listing.ignored)
    sizes = {path.name: notes[key]["bytes"] for key, path in named.items()}
    report = {"fingerprint": plan["fingerprint"], **described, "encoding": _ENCODING[settings.storage], **report}
    report["files"] = sizes
    files.write_json(output / REPORT, report)
    shutil.rmtree(work)
    return report


_ENCODING = {
    "raw": "uint8 RGB",
    "jpeg": "JPEG 4:2:0 by FFmpeg's mjpeg at qmin = qmax = quality",
    "h264": "H.264 4:2:0 keyframes by x264 at CRF = quality",
}


def _write_tfds(output, listing, settings: Settings, template, kept, notes) -> None:
    import tensorflow_datasets as tfds

    picture = (settings.size, settings.size, 3)
    stored = {
        "raw": lambda: tfds.features.Tensor(shape=(None, *picture), dtype=np.uint8, encoding="bytes"),
        "jpeg": lambda: tfds.features.Sequence(tfds.features.Image(shape=picture, encoding_format="jpeg")),
        "h264": lambda: tfds.features.Sequence(tfds.features.Text()),  # TFDS has no feature of H.264
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
