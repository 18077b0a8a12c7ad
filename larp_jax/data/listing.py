"""The inputs of `larp-jax prepare` as one list of videos with splits and classes.

Videos are in the order of the lists, or sorted by path if there are no lists. Paths in lists are checked as text: none
may lead out of the folder of the videos.
"""

import collections
import contextlib
import csv
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Container, Iterable, Sequence

from larp_jax.data.folders import NO_LABEL, SPLITS, find_videos, in_class_order, video_paths
from larp_jax.data.pictures import frame_names, numbered
from larp_jax.data.sources import open_source
from larp_jax.data.spec import LISTS, DataSpec, advice, spec_of
from larp_jax.data.tfds import split_names
from larp_jax.data.video import EXTENSIONS
from larp_jax.errors import InputError
from larp_jax.files import local_path

logger = logging.getLogger(__name__)

_IN_NAME = re.compile(f"(?<![a-z])({'|'.join(SPLITS)})")
_CLASSES = "classInd.txt"  # UCF101's list of classes: a folder with this file is a folder of UCF101's lists


@dataclasses.dataclass(frozen=True)
class Item:
    """A video to prepare.

    Attributes:
      split: its split.
      source: its name in the prepared data set: its path within the folder of the videos, or SPLIT#NUMBER.
      path: its file or folder of pictures; empty for a video of a TFDS data set.
      spec: its TFDS data set and split; empty for a path.
      index: its index in that split.
      label: class; -1 for none.
    """

    split: str
    source: str
    path: str = ""
    spec: str = ""
    index: int = 0
    label: int = NO_LABEL


@dataclasses.dataclass(frozen=True)
class Listing:
    """All videos to prepare.

    Attributes:
      items: sorted by split, and within a split in the order of the lists.
      label_names: names of the classes in the order of their labels.
      missing: (split, source, reason) of each listed video that is not in the folder.
      ignored: number of other files in the folder, by suffix.
    """

    items: list[Item]
    label_names: tuple[str, ...] = ()
    missing: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)


def list_videos(inputs: Sequence[str], root: str | None = None) -> Listing:
    """Finds the videos of the inputs, which may be:

    - A folder, or `folder:PATH`; its splits and classes are those of `larp_jax.data.folders.find_videos`, and without
      splits all videos are in `train`.
    - CSV files with the columns path and label (and optionally split), the released code's id, path, action and label,
      or Kinetics' label, youtube_id, time_start and time_end, whose files are found by name. A first line without the
      name of a video is a header; the column that contains videos is the path, independent of its name.
    - UCF101's lists: the folder of classInd.txt, trainlist01.txt and testlist01.txt, or some of its lists.
    - `tfds:NAME[/CONFIG][:SPLIT]` or `moving_shapes[:SPLIT]`; all splits by default.

    Args:
      inputs: one folder or data set, or lists. The split of a list without a column split is the one in its name.
      root: the folder that the paths in lists are relative to. By default that of the first list; for UCF101's lists,
        the folder UCF-101 next to theirs if it exists.

    Raises:
      InputError: an input does not exist, a list cannot be understood, or a path leads out of `root`.
    """
    if len(inputs) == 1 and (spec := spec_of(inputs[0])) is not None:
        if spec.kind == "mixture":
            raise InputError(f"{spec} is a mixture; prepare its data sets one by one, training mixes them")
        if spec.kind != "folder":
            return _of_data_set(spec)
        inputs = [spec.name]
    paths = [local_path(text, "--input") for text in inputs]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; give a folder, CSV files, UCF101's lists or a data set")
        if path.is_file() and path.suffix.lower() not in LISTS:
            raise InputError(f"{path} is not a list of videos (.csv, .txt); {advice(path)}")
    if len(paths) == 1 and paths[0].is_dir() and not (paths[0] / _CLASSES).exists():
        if root:
            raise InputError(f"--root is for lists, and {paths[0]} is a folder of videos; leave it out")
        return _of_folder(paths[0])
    if len(paths) == 1 and paths[0].is_dir():
        paths = [paths[0] / name for name in ("trainlist01.txt", "testlist01.txt")]
    suffixes = {path.suffix.lower() for path in paths}
    read = {".csv": _csv_rows, ".txt": _ucf101_rows}.get(suffixes.pop() if len(suffixes) == 1 else "")
    if read is None or any(path.is_dir() for path in paths):
        raise InputError("give one folder, or CSV files, or UCF101's .txt lists, not several kinds at once")
    usual = paths[0].parent.parent / "UCF-101"
    folder = local_path(root or (usual if read is _ucf101_rows and usual.is_dir() else paths[0].parent), "--root")
    if not folder.is_dir():
        raise InputError(f"--root {folder} does not exist (or is not a folder); name the folder of the videos")
    rows, classes = read(paths, folder)
    return _of_rows(rows, classes, folder)


# ------------------------------------------------------------------------------------------------------ TFDS, folders


def _of_data_set(spec: DataSpec) -> Listing:
    if spec.split:
        splits = [spec.split]
    else:
        open_source(spec)  # generates moving_shapes if it does not exist
        splits = ["train", "test"] if spec.kind == "moving_shapes" else split_names(spec.name)
    items, label_names = [], ()
    for split in splits:
        part = dataclasses.replace(spec, split=split)
        source = open_source(part)
        label_names = source.label_names
        name = re.match(r"\w+", split).group()
        items += [Item(name, f"{split}#{index}", spec=str(part), index=index) for index in range(len(source))]
    return Listing(items, label_names)


def _of_folder(folder: pathlib.Path) -> Listing:
    found = find_videos(folder)
    items = [
        Item(split or "train", found.name(path), str(path), label=label)
        for path, split, label in zip(found.paths, found.splits, found.labels, strict=True)
    ]
    missing = [("train", name, "is in none of the folder's splits") for name in found.without_split]
    return Listing(_by_split(items), found.label_names, missing, ignored=_other_files(folder, set(found.paths)))


def _other_files(folder: pathlib.Path, videos: Container[pathlib.Path]) -> dict[str, int]:
    """Number of files that are not videos or their pictures, by suffix, without hidden ones."""
    suffixes: collections.Counter[str] = collections.Counter()
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if pathlib.Path(parent) in videos:
            names = set(names).difference(*numbered(names))
        suffixes.update(pathlib.PurePath(name).suffix.lower() for name in names if not name.startswith("."))
    return {suffix: count for suffix, count in sorted(suffixes.items()) if suffix not in EXTENSIONS}


def _by_split(items: list[Item]) -> list[Item]:
    order = list(dict.fromkeys(SPLITS.values()))
    return sorted(items, key=lambda item: (order.index(item.split) if item.split in order else len(order), item.split))


# -------------------------------------------------------------------------------------------------------------- lists


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of a list: its position, the split, the name, the path of the file (None: not found), the class."""

    where: str
    split: str
    name: str
    path: str | None
    label: str


def _of_rows(rows: list[_Row], classes: Sequence[str], folder: pathlib.Path) -> Listing:
    """The listing of rows. Without `classes`, the classes are those of the rows, or all numbers up to the largest."""
    names = {row.label for row in rows} - {""}
    if not classes and names and all(name.isdecimal() and len(name) < 7 for name in names):
        classes = list(map(str, range(max(map(int, names)) + 1)))
    classes = list(classes) or in_class_order(names)
    numbers = {name: number for number, name in enumerate(classes)}
    items, missing = [], []
    for row in rows:
        if row.label and row.label not in numbers:
            raise InputError(f"{row.where}: {row.label!r} is not one of the {len(classes)} classes")
        if row.path is None or not os.path.exists(row.path):
            missing.append((row.split, row.name, f"not in {folder.name or folder}"))
        else:
            items.append(Item(row.split, row.name, row.path, label=numbers.get(row.label, NO_LABEL)))
    if not items:
        first = f"; the first is {rows[0].name}" if rows else ""
        raise InputError(f"none of the {len(rows)} listed videos is in {folder}{first}; name their folder by --root")
    return Listing(_by_split(items), tuple(classes), missing)


def _ucf101_rows(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> tuple[list[_Row], list[str]]:
    """Rows of trainlistNN.txt and testlistNN.txt (CLASS/FILE.avi, then maybe a number), and classes of classInd.txt."""
    if not (paths[0].parent / _CLASSES).exists():
        raise InputError(
            f"{paths[0]} is not one of UCF101's lists ({_CLASSES} is not next to it); write your own list as .csv, "
            "with the columns path and label"
        )
    classes = [line.split()[-1] for _, line in _lines(paths[0].parent / _CLASSES)]
    rows = []
    for path in paths:
        for where, line in _lines(path):
            name = line.rsplit(maxsplit=1)[0] if line.rsplit(maxsplit=1)[-1].isdecimal() else line
            file = _inside(folder, name, where)
            rows.append(_Row(where, _split_of(path.stem), _relative(file, folder), file, name.split("/")[0]))
    return rows, classes


def _csv_rows(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> tuple[list[_Row], list[str]]:
    rows, actions, by_stem = [], {}, None
    for path in paths:
        for where, cells in _cells(path, folder):
            split = _split_column(cells.get("split", ""), where) or _split_of(path.stem)
            if "youtube_id" in cells:
                by_stem = _files_by_stem(folder) if by_stem is None else by_stem
                rows.append(_kinetics_row(cells, split, where, by_stem, folder))
                continue
            if not cells.get("path"):
                raise InputError(f"{where}: has no path; lists need the columns path and label")
            file = _inside(folder, cells["path"], where)
            label = cells.get("label", "")
            if cells.get("action") and "label" in cells:
                label = _number(label)
                if actions.setdefault(label, cells["action"]) != cells["action"] or not label.isdecimal():
                    raise InputError(f"{where}: label {label!r} is not one number per action; fix the list")
                label = cells["action"]
            rows.append(_Row(where, split, _relative(file, folder), file, label or cells.get("action", "")))
    if not actions:
        return _numbered(rows), []
    last = max(map(int, actions))
    if last > 100_000:
        raise InputError(f"{paths[0]}: a label of {last} is too large; number the classes from 0")
    return rows, [actions.get(str(number), str(number)) for number in range(last + 1)]


def _number(label: str) -> str:
    """An integer label in its shortest form ("" for -1); any other label unchanged."""
    found = re.fullmatch(r"(-?\d{1,15})(?:\.0*)?", label)
    if found is None:
        return label
    return "" if int(found[1]) == -1 else str(int(found[1]))


def _numbered(rows: list[_Row]) -> list[_Row]:
    """The rows with labels in their shortest form, if all of them are integers."""
    labels = [_number(row.label) for row in rows]
    if not all(label.isdecimal() or not label for label in labels):
        return rows
    return [dataclasses.replace(row, label=label) for row, label in zip(rows, labels, strict=True)]


def _kinetics_row(cells, split: str, where: str, by_stem, folder: pathlib.Path) -> _Row:
    """A row of Kinetics' lists; files are called ID_START_END (six digits for START and END), or ID."""
    stems = [cells["youtube_id"]]
    if cells.get("time_start", "").isdecimal() and cells.get("time_end", "").isdecimal():
        stems.insert(0, f"{stems[0]}_{int(cells['time_start']):06d}_{int(cells['time_end']):06d}")
    file = next((by_stem[stem] for stem in stems if stem in by_stem), None)
    name = stems[0] if file is None else _relative(file, folder)
    return _Row(where, split, name, file, cells.get("label", ""))


def _files_by_stem(folder: pathlib.Path) -> dict[str, str]:
    found = reversed(video_paths(folder))
    return {path.name if path.is_dir() else path.stem: str(path) for path in found}


# Names of the label column; the first one that exists is used.
_LABELS = ("label", "class", "class_name", "category", "target")


def _cells(path: pathlib.Path, folder: pathlib.Path) -> Iterable[tuple[str, dict[str, str]]]:
    """(position, cells by column) of each line except the header."""
    lines = _csv_lines(path)
    columns, header = _columns(lines[:2], folder)
    for where, cells in lines[header:]:
        if len(cells) > len(columns):
            raise InputError(
                f"{where}: has {len(cells)} cells, but the first line has {len(columns)}; put names that contain "
                "commas in double quotes"
            )
        yield where, dict(zip(columns, cells, strict=False))


def _csv_lines(path: pathlib.Path) -> list[tuple[str, list[str]]]:
    """(position, cells) of each line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(f"{path} line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    for _, cells in rows:
        while cells and not cells[-1]:
            cells.pop()
    rows = [row for row in rows if row[1]]
    if not rows:
        raise InputError(f"{path} is empty; write the columns path and label")
    return rows


def _columns(lines: list[tuple[str, list[str]]], folder: pathlib.Path) -> tuple[list[str], int]:
    """The columns of a list (path, label, split, action, those of Kinetics) and the number of header lines: 0 or 1."""
    where, first = lines[0]
    if videos := _videos_among(first, folder):
        if len(first) != 2 or len(videos) != 1:
            raise InputError(f"{where}: is not a header with a column path; write a header such as path,label above it")
        return (["path", "label"] if videos == [0] else ["label", "path"]), 0
    columns = [re.sub(r"\W+", "_", cell.lower()) for cell in first]
    if "path" not in columns and "youtube_id" not in columns:
        videos = _videos_among(lines[-1][1][: len(first)], folder)
        if not videos:
            raise InputError(f"{where}: has no column path (or youtube_id); name the columns there")
        columns[videos[0]] = "path"
    if not {"label", "action"} & set(columns):
        others = [name for name in columns if name not in ("path", "split")]
        label = next((name for name in _LABELS if name in columns), others[0] if len(columns) == 2 and others else "")
        if label:
            columns[columns.index(label)] = "label"
        elif others:
            logger.warning("%s: no column is called label, so its videos have no classes", where)
    return columns, 1


def _videos_among(cells: Sequence[str], folder: pathlib.Path) -> list[int]:
    """Indices of the cells that name a video, whether it exists or not."""
    return [
        number
        for number, cell in enumerate(cells)
        if pathlib.PurePath(cell).suffix.lower() in EXTENSIONS
        or (cell and "\0" not in cell and _is_video(os.path.join(folder, cell)))
    ]


def _is_video(path: str) -> bool:
    """Whether a path is a file, or a folder of pictures."""
    with contextlib.suppress(InputError):
        return os.path.isfile(path) or (os.path.isdir(path) and len(frame_names(path)) > 0)
    return False


def _lines(path: pathlib.Path) -> list[tuple[str, str]]:
    """(position, text) of each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UCF101's list ({error})") from error
    return [(f"{path} line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _split_of(stem: str) -> str:
    """The split in the name of a list, such as train for trainlist01."""
    found = _IN_NAME.search(stem.lower())
    return SPLITS[found.group()] if found else "train"


def _split_column(text: str, where: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z]\w*", text):
        raise InputError(f"{where}: {text!r} is not a valid name of a split; use letters, digits and _")
    return SPLITS.get(text.lower(), text)


def _inside(folder: pathlib.Path, name: str, where: str) -> str:
    """The path of a listed file; `InputError` if it is not within the folder."""
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or os.path.commonpath([root, path]) != root or path == root:
        raise InputError(f"{where}: path {name!r} leads out of {root}; name the folder of the videos by --root")
    return path


def _relative(path: str, folder: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path, folder)).as_posix()
