"""Folders of videos: which files they hold, and which splits and classes the names of sub-folders give.

What training, evaluation, `larp-jax prepare` and all that reads an input takes a folder for is decided here, once.
"""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

from larp_jax.data import video
from larp_jax.data.spec import advice
from larp_jax.errors import InputError
from larp_jax.files import local_path

logger = logging.getLogger(__name__)

NO_LABEL = -1
# Names of splits, as folders and files have them, and what TFDS calls them.
SPLITS = {"train": "train", "validation": "validation", "validate": "validation", "val": "validation", "test": "test"}
# The fewest files that probing shows a progress bar for: about two seconds' worth.
MANY_FILES = 500
# The most files that a warning names.
MANY_NAMES = 50
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class FolderVideos:
    """The video files below a folder, sorted by path.

    Attributes:
      folder: as given.
      paths: the files.
      splits: of each file, "train", "validation" or "test"; empty where the folder holds no splits.
      labels: of each file the number of its class, -1 without.
      label_names: the classes in the order of their labels, those of all splits; empty without classes.
      beside: names of the files that lie beside the splits, and so belong to none.
    """

    folder: pathlib.Path
    paths: list[pathlib.Path]
    splits: list[str]
    labels: list[int]
    label_names: tuple[str, ...]
    beside: list[str]

    def name(self, path: pathlib.Path) -> str:
        """Path of a file within the folder, with forward slashes."""
        return path.relative_to(self.folder).as_posix()

    def of_split(self, split: str) -> "FolderVideos":
        """The videos of one split; all where the folder holds none.

        Raises:
          InputError: the folder holds splits, but not this one.
        """
        if not any(self.splits) or (set(self.splits) == {split}):
            return self
        chosen = [number for number, one in enumerate(self.splits) if one == split]
        if not chosen:
            found = sorted({path.relative_to(self.folder).parts[0] for path in self.paths})
            raise InputError(
                f"folder {self.folder} has no split {split!r}, only the folders {', '.join(found)}; name one, as in "
                f"folder:{self.folder / found[0]}"
            )
        rows = {name: [getattr(self, name)[number] for number in chosen] for name in ("paths", "splits", "labels")}
        return dataclasses.replace(self, **rows)

    def open(self) -> tuple[list[video.VideoFile], list[int], list[tuple[str, str]]]:
        """Opens the files: (those that can be read, their labels, (name, reason) of each other).

        Raises:
          InputError: none can be read.
        """
        files, unreadable = open_all(self.paths)
        skipped = [(self.name(pathlib.Path(path)), reason) for path, reason in unreadable]
        if not files:
            raise InputError(
                f"folder {self.folder}: none of its {len(self.paths)} video files can be read; the first says: "
                f"{skipped[0][1]}"
            )
        labels = dict(zip(self.paths, self.labels, strict=True))
        return files, [labels[file.path] for file in files], skipped


def find_videos(folder: str | os.PathLike) -> FolderVideos:
    """Looks through a folder; opens no file.

    - If all sub-folders that hold videos are called train, val, validate, validation or test, they are splits, and the
      classes lie below.
    - The sub-folders are the classes: in the order of their numbers if all are called by numbers, else of their names.
      A file that can not be read counts here, so that damage moves no class.
    - A video beside the class folders has no class, one beside the splits is in none. A warning names them.
    - Hidden files and folders are left out.

    Raises:
      InputError: there is no such folder, or no video file in it.
    """
    folder = local_path(folder, "folder")
    if not folder.is_dir():
        path, _, split = str(folder).rpartition(":")
        cure = advice(folder) or (advice(path, str(folder)) if path else "") or "give one that holds videos"
        raise InputError(f"folder {folder} {'is no folder' if folder.exists() else 'does not exist'}; {cure}")
    paths = video_files(folder)
    if not paths:
        found = advice(folder)
        cure = "" if "folder:" in found else f"; {found}"
        if any(name.lower().endswith(_PICTURES) for _, _, names in os.walk(folder) for name in names):
            cure = "; make a video of each folder of pictures, as in ffmpeg -i %03d.png clip.mp4"
        raise InputError(f"folder {folder} holds no video file ({' '.join(sorted(video.EXTENSIONS))}){cure}")
    parts = [path.relative_to(folder).parts for path in paths]
    tops = sorted({part[0] for part in parts if len(part) > 1})
    named = [top for top in tops if top.lower() in SPLITS]
    beside = []
    split = bool(tops) and named == tops
    if split:
        beside = ["/".join(part) for part in parts if len(part) == 1]
        paths = [path for path, part in zip(paths, parts, strict=True) if len(part) > 1]
        parts = [part for part in parts if len(part) > 1]
        _warn(beside, f"{folder}: left out as in none of its splits {', '.join(tops)}")
    elif len({SPLITS[top.lower()] for top in named}) > 1:
        others = ", ".join(top for top in tops if top not in named)
        logger.warning(
            "%s: %s are taken for classes and not for splits, because there are other sub-folders: %s",
            folder, ", ".join(named), others,
        )  # fmt: skip
    below = [part[1:] if split else part for part in parts]
    label_names = in_class_order({part[0] for part in below if len(part) > 1})
    numbers = {name: number for number, name in enumerate(label_names)}
    labels = [numbers[part[0]] if len(part) > 1 else NO_LABEL for part in below]
    if label_names:
        strays = ["/".join(part) for part, label in zip(parts, labels, strict=True) if label == NO_LABEL]
        _warn(strays, f"{folder}: without a class, because they lie beside the folders of classes")
    splits = [SPLITS[part[0].lower()] if split else "" for part in parts]
    return FolderVideos(folder, paths, splits, labels, label_names, beside)


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
        logger.warning("%s: %s%s", what, ", ".join(names[:MANY_NAMES]), more)


def in_class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels: by number if all are numbers, else by text."""
    names = sorted(names)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def video_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The video files below a folder, by their names, sorted; links are followed, what is hidden is left out."""
    paths, visited = [], set()
    # Class folders are often links to where the disk has room; links may also lead in circles.
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name in real if real[name] not in visited]
        visited.update(real.values())
        paths += [pathlib.Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in video.EXTENSIONS and path.is_file())


def open_all(paths: Sequence[pathlib.Path]) -> tuple[list[video.VideoFile], list[tuple[str, str]]]:
    """([VideoFile of each readable path], [(path, reason) of each other]), both in the order of the paths."""
    from tqdm import tqdm

    def attempt(path):
        try:
            return video.VideoFile(path)
        except InputError as error:
            return str(path), str(error)

    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        found = pool.map(attempt, paths)
        bar = tqdm(found, total=len(paths), desc="checking videos", unit="file", disable=len(paths) < MANY_FILES)
        results = list(bar)
    return ([r for r in results if isinstance(r, video.VideoFile)], [r for r in results if isinstance(r, tuple)])


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
