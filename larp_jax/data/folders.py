"""Folders of videos: those they contain, and the splits and classes given by the names of subfolders.

A video is a file, or a folder of pictures (`larp_jax.data.pictures`).

Training, evaluation, `larp-jax prepare` and all other commands use these rules.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

from larp_jax.data import pictures, video
from larp_jax.data.clips import ClipSpec
from larp_jax.data.random_access import Video
from larp_jax.data.spec import advice
from larp_jax.errors import InputError
from larp_jax.files import local_path

logger = logging.getLogger(__name__)

NO_LABEL = -1
# Names of splits in folders and files, and their names in TFDS.
SPLITS = {"train": "train", "validation": "validation", "validate": "validation", "val": "validation", "test": "test"}
# The smallest number of files with a progress bar: opening them takes about two seconds.
MANY_FILES = 500
# The largest number of files that a warning names.
MANY_NAMES = 50


@dataclasses.dataclass(frozen=True)
class FolderVideos:
    """The videos below a folder, sorted by path.

    Attributes:
      folder: as given.
      paths: the files and the folders of pictures; the folder itself if it is one.
      splits: split of each video: "train", "validation" or "test"; empty strings if the folder has no splits.
      labels: class of each video; -1 for none.
      label_names: names of the classes of all splits, in the order of their labels; empty without classes.
      without_split: names of the videos next to the folders of splits, which belong to no split.
    """

    folder: pathlib.Path
    paths: list[pathlib.Path]
    splits: list[str]
    labels: list[int]
    label_names: tuple[str, ...]
    without_split: list[str]

    def name(self, path: pathlib.Path) -> str:
        """Path of a video within the folder, with forward slashes; the name of the folder if that is the video."""
        return name_within(self.folder, path)

    def of_split(self, split: str) -> "FolderVideos":
        """The videos of one split; all videos if the folder has no splits.

        Raises:
          InputError: the folder has splits, but not this one.
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

    def open(self, clip: ClipSpec | None = None) -> tuple[list[Video], list[int], list[tuple[str, str]]]:
        """Opens the videos and returns (readable ones, their labels, (name, reason) of each unreadable one).

        `clip` gives the rate at which they are sampled.

        Raises:
          InputError: none can be read.
        """
        videos, unreadable = open_all(self.paths, clip)
        skipped = [(self.name(pathlib.Path(path)), reason) for path, reason in unreadable]
        if not videos:
            raise InputError(
                f"folder {self.folder}: none of its {len(self.paths)} videos can be read; the first error: "
                f"{skipped[0][1]}"
            )
        labels = dict(zip(self.paths, self.labels, strict=True))
        return videos, [labels[one.path] for one in videos], skipped


def find_videos(folder: str | os.PathLike) -> FolderVideos:
    """Lists the videos of a folder without opening them.

    - If all subfolders that contain videos are called train, val, validate, validation or test, they are splits, and
      their subfolders are classes.
    - Otherwise the subfolders are classes. Classes are in numerical order if all their names are numbers, else in
      alphabetical order. Unreadable files count, so that damage does not renumber classes.
    - A video next to class folders has no class, and one next to split folders has no split. A warning names them.
    - If all videos are folders of pictures next to each other, they may be meant as classes. A warning names them.
    - Hidden files and folders are ignored.

    Raises:
      InputError: the folder does not exist, or contains no video.
    """
    folder = local_path(folder, "folder")
    if not folder.is_dir():
        path, _, split = str(folder).rpartition(":")
        cure = advice(folder) or (advice(path, str(folder)) if path else "") or "give a folder of videos"
        raise InputError(f"folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}; {cure}")
    paths = video_paths(folder)
    if not paths:
        found = advice(folder)
        cure = "" if "folder:" in found else f"; {found}"
        if any(name.lower().endswith(tuple(video.IMAGES)) for _, _, names in os.walk(folder) for name in names):
            cure = f" and no folder of {pictures.RULE}; name the pictures of a video so, in a folder of their own"
        raise InputError(f"folder {folder} contains no video file ({' '.join(sorted(video.EXTENSIONS))}){cure}")
    parts = [path.relative_to(folder).parts for path in paths]
    tops = sorted({part[0] for part in parts if len(part) > 1})
    named = [top for top in tops if top.lower() in SPLITS]
    without_split = []
    split = bool(tops) and named == tops
    if split:
        without_split = ["/".join(part) for part in parts if len(part) == 1]
        paths = [path for path, part in zip(paths, parts, strict=True) if len(part) > 1]
        parts = [part for part in parts if len(part) > 1]
        _warn(without_split, f"{folder}: left out, because they are in none of the splits {', '.join(tops)}")
    elif len({SPLITS[top.lower()] for top in named}) > 1:
        others = ", ".join(top for top in tops if top not in named)
        logger.warning(
            "%s: %s are classes and not splits, because there are other subfolders: %s",
            folder, ", ".join(named), others,
        )  # fmt: skip
    below = [part[1:] if split else part for part in parts]
    label_names = in_class_order({part[0] for part in below if len(part) > 1})
    numbers = {name: number for number, name in enumerate(label_names)}
    labels = [numbers[part[0]] if len(part) > 1 else NO_LABEL for part in below]
    if label_names:
        strays = ["/".join(part) for part, label in zip(parts, labels, strict=True) if label == NO_LABEL]
        _warn(strays, f"{folder}: without a class, because they are in none of the class folders")
    elif len(paths) > 1 and all(map(os.path.isdir, paths)):  # maybe classes of an image data set
        _warn(
            ["/".join(part) for part in parts],
            f"{folder}: folders of pictures that are read as one video each, without a class (if they are classes, give"
            " each video a folder in them, CLASS/VIDEO/001.jpg; pictures that are not frames of a video cannot be used)"
        )
    splits = [SPLITS[part[0].lower()] if split else "" for part in parts]
    return FolderVideos(folder, paths, splits, labels, label_names, without_split)


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
        logger.warning("%s: %s%s", what, ", ".join(names[:MANY_NAMES]), more)


def in_class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels: numerical if all are numbers, else alphabetical."""
    names = sorted(names)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def name_within(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Path of a video within a folder, with forward slashes; the name of the folder if that is the video."""
    return path.relative_to(folder).as_posix() if path != folder else os.path.basename(os.path.abspath(folder))


def video_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """The videos of a folder, sorted; follows links and ignores hidden files and folders.

    They are files (by suffix), and folders of pictures that contain no other video; the folder itself may be one. A
    warning names folders of pictures that are no videos because their names are of several kinds.
    """
    paths, of_pictures, several, visited = [], [], [], set()
    # Class folders are often links to larger disks; links may also form cycles.
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name in real if real[name] not in visited]
        visited.update(real.values())
        paths += [
            pathlib.Path(parent, name)
            for name in files
            if os.path.splitext(name)[1].lower() in video.EXTENSIONS and not name.startswith(".")
        ]
        if groups := pictures.numbered(files):
            (of_pictures if len(groups) == 1 else several).append(pathlib.Path(parent))
    paths = [path for path in paths if path.is_file()]
    above: set[pathlib.Path] = set()
    for path in paths + of_pictures:
        above.update(itertools.takewhile(lambda parent: parent not in above, path.parents))
    several = [name_within(folder, path) for path in several if path not in above]
    _warn(sorted(several), f"{folder}: left out, because their pictures have names of several kinds")
    return sorted(paths + [path for path in of_pictures if path not in above])


def open_all(
    paths: Sequence[pathlib.Path], clip: ClipSpec | None = None
) -> tuple[list[Video], list[tuple[str, str]]]:
    """Opens videos: ([Video of each readable path], [(path, reason) of each other]), in the order of the paths."""
    from tqdm import tqdm

    def attempt(path):
        try:
            return pictures.open_video(path, clip)
        except InputError as error:
            return str(path), str(error)

    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        found = pool.map(attempt, paths)
        bar = tqdm(found, total=len(paths), desc="checking videos", unit="video", disable=len(paths) < MANY_FILES)
        results = list(bar)
    return ([r for r in results if isinstance(r, Video)], [r for r in results if isinstance(r, tuple)])


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
