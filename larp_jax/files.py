"""Every file that larp_jax writes: whole or not at all, and never in place of something that is not ours.

A file is written under a temporary name beside its target and renamed when it is complete. Temporary files are locked
while their writer lives, so that what a killed process left behind can be told from work in progress and removed.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

LOCK = ".lock"
UNFINISHED = "unfinished.json"
DEEPEST = 64  # levels of JSON
# Names of temporary files: a digest of the target's name, then a random part. Any target's name fits, however long.
# The others are of earlier versions, which ended them in the number of their process.
_TEMPORARY = re.compile(
    r"\.larp-[0-9a-f]{12}-[0-9a-f]{16}\.tmp"
    r"|\.(?:(?:settings|manifest|psnr)\.json|codes-\d{5}(?:-of-\d{5}\.npz)?)\.\d+|\..+\.(?:mp4|png)\.\d+\.tmp"
)
# The beginning of a URL, which pathlib makes one slash of, and a URL within another text.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/|([A-Za-z][A-Za-z0-9+.-]*)://")


def local_path(path: str | os.PathLike, what: str = "path") -> pathlib.Path:
    """A path on this machine, with `~` expanded.

    Args:
      path: as the user gave it.
      what: the option it came from, for the message.

    Raises:
      InputError: it is a URL such as `gs://bucket/run`, or names no file at all.
    """
    text = os.fspath(path)
    refuse_url(text, what)
    if not text or "\0" in text:
        raise InputError(f"{what} {text!r} is not a path; give one on this machine")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{what} {text}: {error}; give the path in full") from None


def refuse_url(text: str, what: str) -> None:
    """`InputError` where a path is a URL, or a text such as `folder:gs://bucket/videos` holds one.

    Args:
      text: a path, or a text that names one.
      what: the option it came from, for the message.
    """
    for scheme in (found[1] or found[2] for found in _URL.finditer(text)):
        if scheme.lower() == "file":
            raise InputError(f"{what} {text}: file:// is not supported; give the path alone")
        if scheme.lower() not in _NO_SCHEMES:
            raise InputError(
                f"{what} {text}: {scheme}:// is not supported yet (no object storage, no web); give a path on this"
                " machine, such as a mount of the bucket"
            )


_NO_SCHEMES = ("folder", "tokens", "tfds")  # of data sets, whose path may be absolute


def check_output(
    path: str | os.PathLike, what: str = "--output", *, ours: Callable[[pathlib.Path], bool] = lambda path: False
) -> pathlib.Path:
    """Checks before any work that an output file can be written at the end.

    Args:
      path: the file.
      what: the option it came from, for the message.
      ours: whether an existing regular file may be replaced, because an earlier call of the same kind wrote it.

    Returns:
      The path, with `~` expanded.

    Raises:
      InputError: it exists and is not ours, or its folder cannot be made or written.
    """
    path = local_path(path, what)
    if path.is_dir():
        raise InputError(f"{what} {path} cannot be written (it is a folder); name a file in it")
    _check_replaceable(path, what)
    if path.exists() and path.stat().st_size and not _recognized(path, ours):
        raise InputError(f"{what} {path} exists and was not written by this command; name another file, or remove it")
    _check_parents(path.absolute().parent, f"{what} {path} cannot be written")
    return path


def check_folder(path: str | os.PathLike, what: str = "--output") -> pathlib.Path:
    """Checks before any work that an output folder is there and can be written, or can be made; makes nothing.

    Raises:
      InputError: neither.
    """
    path = local_path(path, what)
    _check_parents(path.absolute(), f"{what} {path} cannot be made")
    return path


def _check_parents(folder: pathlib.Path, complaint: str) -> None:
    try:
        while not _is_folder(folder):
            folder = folder.parent
    except OSError as error:
        raise InputError(f"{complaint} ({reason(error)}); name another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{complaint} (no permission in {folder}); name another")


def _is_folder(path: pathlib.Path) -> bool:
    """Whether there is a folder, False if nothing is; `OSError` where something else is, or nothing can be."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISLNK(mode):
        mode = path.stat().st_mode
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return True


def check_new_folder(path: str | os.PathLike, what: str = "--output") -> pathlib.Path:
    """Checks before any work that a folder can be made that is not there yet, or empty; makes nothing.

    Raises:
      InputError: it holds something, or cannot be made.
    """
    path = check_folder(path, what)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{what} {path} exists already and is not empty; name another, or remove it")
    return path


def _recognized(path: pathlib.Path, ours: Callable[[pathlib.Path], bool]) -> bool:
    try:
        return ours(path)
    except Exception:  # a file of any other kind may provoke anything in its reader
        return False


def _check_replaceable(path: pathlib.Path, what: str) -> None:
    """`InputError` where a path exists and is no regular file: renaming onto a device or a pipe would remove it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{what} {path} cannot be written ({reason(error)}); name another") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {path} is not a regular file; name another")


def make_folder(path: str | os.PathLike, what: str = "output folder") -> pathlib.Path:
    """Makes a folder for output, and those above it, unless it is there.

    Raises:
      InputError: it cannot be made.
    """
    path = local_path(path, what)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be made ({reason(error)}); name another") from error
    return path


_swept: set[pathlib.Path] = set()  # folders that this process has looked for leftovers in: they may be long


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A block that writes a file under a temporary path; it becomes `path` if the block ends well, else it is removed.

    What killed processes left in its folder is removed the first time. A link is followed.

    Raises:
      InputError: the target is a folder, a device, a pipe or the like.
      OSError: the folder cannot be written.
    """
    target = pathlib.Path(path)
    _check_replaceable(target, "output")
    if target.is_symlink():
        target = target.resolve()
    folder = target.parent.absolute()
    if folder not in _swept:
        _swept.add(folder)
        remove_leftovers(folder)
    temporary, descriptor = _create(target.parent, _prefix(target))
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`replacing`, with the temporary file open for writing bytes."""
    with replacing(path) as temporary, temporary.open("w+b") as file:
        yield file


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file; see `replacing`."""
    with writing(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, values: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Writes strict JSON, and makes the folder if missing; see `replacing`.

    Raises:
      ValueError: a value is NaN or infinite.
      InputError: the folder cannot be made, or the path is no regular file.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    data = (json.dumps(values, indent=indent, allow_nan=False) + "\n").encode()
    make_folder(path.parent)
    write_bytes(path, data)


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; see `parse_json`.

    Raises:
      OSError: the file cannot be read, or is no regular one.
      ValueError: it is no JSON.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")  # a pipe would be waited for
    return parse_json(path.read_bytes())


def json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds; empty if it is missing, damaged or holds something else."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; NaN and infinities are none of it.

    Raises:
      ValueError: it is no JSON, or its values lie within each other more than `DEEPEST` times, which functions that
        call themselves could not follow.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is not a number")

    try:
        values = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [values]
    for _ in range(DEEPEST + 1):
        nested = [value for value in level if isinstance(value, (dict, list))]
        if not nested:
            return values
        level = [x for value in nested for x in (value.values() if isinstance(value, dict) else value)]
    raise ValueError("it is nested too deeply")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, what: str = "--output") -> Iterator[pathlib.Path]:
    """A folder to fill that becomes `path` if the block ends well, and is removed otherwise.

    Raises:
      InputError: the path exists and is not an empty folder, or cannot be made.
    """
    target = check_new_folder(path, what).absolute()
    if target.is_symlink():
        target = target.resolve()
    make_folder(target.parent, what)
    with temporary_folder(target.parent, target.name) as temporary:
        yield temporary
        try:
            os.replace(temporary, target)
        except OSError:
            check_new_folder(target, what)  # another process may have made it meanwhile
            raise


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike, name: str) -> Iterator[pathlib.Path]:
    """A folder for work in progress, in an existing one, that is gone after the block.

    Those that killed processes left for the same name are removed too.
    """
    parent = pathlib.Path(parent)
    prefix = _prefix(parent / name)
    remove_leftovers(parent, prefix)
    temporary, descriptor = _create(parent, prefix, folder=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _prefix(target: pathlib.Path) -> str:
    return f".larp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _create(parent: pathlib.Path, prefix: str, folder: bool = False) -> tuple[pathlib.Path, int]:
    """A new temporary file or folder, and a descriptor that locks it."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}.tmp"
        try:
            if folder:
                path.mkdir()
                descriptor = os.open(path, os.O_RDONLY)
            else:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if folder and parent.is_dir():  # another process took it for a leftover before it was opened
                continue
            raise
        _lock(descriptor)
        if path.exists():  # else another process took it for a leftover in the moment before the lock
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike, prefix: str = ".") -> None:
    """Removes the temporary files and folders of killed processes from a folder, not from those below it."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(prefix) and _TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for path in (pathlib.Path(folder, name) for name in names):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open file until it is closed; False if another process has it, None if it cannot be locked here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


@contextlib.contextmanager
def claim(folder: str | os.PathLike, what: str = "--output") -> Iterator[pathlib.Path]:
    """A block in which this process alone writes to a folder, which is made if missing.

    The system lets go of the lock when the process ends, however that happens. What killed processes left half written
    in the folder is removed.

    Raises:
      InputError: another process has it, or it cannot be written.
    """
    folder = make_folder(folder, what)
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise InputError(f"{what} {folder} cannot be written ({reason(error)}); name another") from error
        locked = _lock(descriptor)
        if locked is False:
            os.close(descriptor)
            raise InputError(f"another process is writing {what} {folder}; wait for it, or name another")
        if locked is None:
            logger.warning("%s cannot be locked; see to it that no other process writes there", folder)
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # its owner removed it between our opening and locking it
    try:
        remove_leftovers(folder)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked
        os.close(descriptor)


@contextlib.contextmanager
def outputs(
    folder: str | os.PathLike,
    names: Collection[str],
    what: str = "--output",
    *,
    ours: Collection[str] = (),
    inputs: Collection[pathlib.Path] = (),
    but: str = "",
) -> Iterator[pathlib.Path]:
    """A block in which this process alone writes these files of a folder; see `claim`.

    Until it ends well, `unfinished.json` lists them, so that after being killed the same call may replace them.

    Args:
      folder: made if missing.
      names: paths within it, with forward slashes.
      what: the option that it came from, for messages.
      ours: those that may be replaced, because an earlier call of the same kind wrote them.
      inputs: files that are not replaced in any case.
      but: why a file that exists is not replaced, for the message.

    Raises:
      InputError: one of the files exists and is not ours, or as for `claim`.
    """
    with claim(folder, what) as folder:
        journal = folder / UNFINISHED
        begun = set(json_object(journal).get("files", ()))
        mine, read = begun.union(ours), {path.resolve() for path in inputs}
        for path, name in ((folder / name, name) for name in names):
            if os.path.lexists(path) and (name not in mine or not path.is_file() or path.resolve() in read):
                raise InputError(f"{path} exists{but}; name another {what}")
        write_json(journal, {"files": sorted(begun.union(names))})
        whole = False
        try:
            yield folder
            whole = True
        finally:
            if whole or not any((folder / name).exists() for name in names):
                journal.unlink(missing_ok=True)


def is_empty(folder: pathlib.Path) -> bool:
    """Whether a folder holds nothing but our lock."""
    return all(path.name == LOCK for path in folder.iterdir())


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
