"""Writing of files: complete or not at all, and never in place of a file of someone else.

A file is written under a temporary name next to its target and renamed when it is complete. Temporary files are locked
while their process runs, so that those of killed processes can be recognized and removed.

Paths are on this machine or in a bucket (`gs://BUCKET/NAME`), where the temporary file is on this machine and is
uploaded when it is complete; `larp_jax.storage` says what holds there.
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
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

from larp_jax import storage
from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

LOCK = storage.LOCK
UNFINISHED = "unfinished.json"
DEEPEST = 64  # nested levels of JSON
# Names of temporary files: a hash of the target's name, which can be long, then a random part. The other patterns match
# those of earlier versions, which end with the process id.
_TEMPORARY = re.compile(
    r"\.larp-[0-9a-f]{12}-[0-9a-f]{16}\.tmp"
    r"|\.(?:(?:settings|manifest|psnr)\.json|codes-\d{5}(?:-of-\d{5}\.npz)?)\.\d+|\..+\.(?:mp4|png)\.\d+\.tmp"
)
# A URL at the beginning of a text, with one slash if it was a pathlib path, and a URL within a text.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/|([A-Za-z][A-Za-z0-9+.-]*)://")


def any_path(text: str | os.PathLike, what: str = "path") -> pathlib.Path:
    """A path on this machine or in a bucket, with `~` expanded.

    Args:
      text: as the user gave it, or a path that this function returned.
      what: the option it came from, for the message.

    Returns:
      A `pathlib.Path`, or for `gs://` an `etils.epath.Path`, which has the same methods.

    Raises:
      InputError: it is another URL, is empty or contains a null character; or gcsfs is missing.
    """
    if storage.is_remote(text):
        return storage.open_path(os.fspath(text), what)
    return local_path(text, what)


def local_path(text: str | os.PathLike, what: str = "path") -> pathlib.Path:
    """Like `any_path`, for files that are read from this machine only."""
    text = os.fspath(text)
    refuse_url(text, what)
    if not text or "\0" in text:
        raise InputError(f"{what} {text!r} is not a path; give one on this machine")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{what} {text}: {error}; give the path in full") from None


def refuse_url(text: str, what: str, *, buckets: bool = False) -> None:
    """`InputError` if a path is a URL, or a text such as `folder:s3://bucket/videos` contains one.

    Args:
      text: a path, or a text that contains one.
      what: the option it came from, for the message.
      buckets: whether gs:// is allowed.
    """
    for found in _URL.finditer(text):
        scheme = found[1] or found[2]
        if scheme.lower() == "file":
            raise InputError(f"{what} {text}: file:// is not supported; give the path alone")
        if buckets and text.startswith(storage.SCHEME, found.start()):
            continue
        if scheme.lower() == "gs":
            raise InputError(
                f"{what} {text}: this is read from a disk, not from gs://; mount the bucket (gcsfuse BUCKET DIR, or"
                " launch/tpu_pod.sh --bucket) or copy it, and give the folder"
            )
        if scheme.lower() not in _NO_SCHEMES:
            raise InputError(
                f"{what} {text}: {scheme}:// is not supported; give a path on this machine, such as a mount of the"
                " bucket, or gs:// for what this program writes"
            )


_NO_SCHEMES = ("folder", "tokens", "rewards", "tfds")  # kinds of data sets, which can be followed by an absolute path


def check_output(
    path: str | os.PathLike, what: str = "--output", *, ours: Callable[[pathlib.Path], bool] = lambda path: False
) -> pathlib.Path:
    """Checks that an output file can be written, before the work of a command starts.

    Args:
      path: the file.
      what: the option it came from, for the message.
      ours: whether an existing regular file may be replaced, because an earlier call of the same kind wrote it.

    Returns:
      The path, with `~` expanded.

    Raises:
      InputError: it exists and may not be replaced, or its folder cannot be created or written.
    """
    path = any_path(path, what)
    if storage.is_remote(path):
        storage.check_writable(path, what)
    if path.is_dir():
        raise InputError(f"{what} {path} cannot be written (it is a folder); name a file in it")
    _check_replaceable(path, what)
    if path.exists() and size(path) and not _recognized(path, ours):
        raise InputError(f"{what} {path} exists and was not written by this command; name another file, or remove it")
    if not storage.is_remote(path):
        _check_parents(path.absolute().parent, f"{what} {path} cannot be written")
    return path


def check_folder(path: str | os.PathLike, what: str = "--output") -> pathlib.Path:
    """Checks that an output folder can be written or created, before the work of a command starts. Creates nothing.

    Raises:
      InputError: the folder can be neither written nor created.
    """
    path = any_path(path, what)
    if storage.is_remote(path):
        storage.check_writable(path, what)
        if path.is_file():
            raise InputError(f"{what} {path} cannot be created (it is a file); name another")
    else:
        _check_parents(path.absolute(), f"{what} {path} cannot be created")
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
    """True for a folder, False if the path does not exist; `OSError` if it is something else or invalid."""
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
    """Checks that a new folder can be created, before the work of a command starts. Creates nothing.

    Raises:
      InputError: the folder exists and is not empty, or cannot be created.
    """
    path = check_folder(path, what)
    if path.is_dir() and any(path.iterdir()) and not _only_unfinished(path):
        raise InputError(f"{what} {path} already exists and is not empty; name another, or remove it")
    return path


def _only_unfinished(folder) -> bool:
    """Whether a folder in a bucket contains nothing but files of a killed upload; see `outputs`."""
    begun = json_object(folder / UNFINISHED).get("files", ()) if storage.is_remote(folder) else ()
    return bool(begun) and storage.listing(folder).keys() <= {*begun, UNFINISHED, LOCK}


def _recognized(path: pathlib.Path, ours: Callable[[pathlib.Path], bool]) -> bool:
    try:
        with fetched(path) as file:
            return ours(file)
    except Exception:  # a reader may raise any error for a file of another kind
        return False


def _check_replaceable(path: pathlib.Path, what: str) -> None:
    """`InputError` if a path exists and is not a regular file: renaming onto a device or a pipe would remove it."""
    if storage.is_remote(path):
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{what} {path} cannot be written ({reason(error)}); name another") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {path} is not a regular file; name another")


def make_folder(path: str | os.PathLike, what: str = "output folder") -> pathlib.Path:
    """Creates a folder for output and its parents, if missing.

    Raises:
      InputError: it cannot be created.
    """
    path = any_path(path, what)
    if storage.is_remote(path):
        return path  # it exists as soon as there is a file in it
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be created ({reason(error)}); name another") from error
    return path


_swept: set[pathlib.Path] = set()  # folders already searched for leftovers: once only, because they can be large


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Context manager for writing a file at a temporary path: it is renamed to `path`, or removed after an error.

    The first call for a folder removes the temporary files of killed processes. Symbolic links are followed.

    Raises:
      InputError: the target exists and is not a regular file.
      OSError: the folder cannot be written.
    """
    target = any_path(path, "output")
    if storage.is_remote(target):
        with tempfile.TemporaryDirectory(prefix="larp-") as folder:
            temporary = pathlib.Path(folder, target.name)
            yield temporary
            storage.upload(temporary, target)
        return
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
    """Like `replacing`, but returns the temporary file, open for writing bytes."""
    with replacing(path) as temporary, temporary.open("w+b") as file:
        yield file


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file; see `replacing`."""
    if storage.is_remote(path):
        storage.write_bytes(any_path(path), data)
        return
    with writing(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, values: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Writes strict JSON and creates the folder if missing; see `replacing`.

    Raises:
      ValueError: a value is NaN or infinite.
      InputError: the folder cannot be created, or the path exists and is not a regular file.
      OSError: the file cannot be written.
    """
    path = any_path(path)
    data = (json.dumps(values, indent=indent, allow_nan=False) + "\n").encode()
    make_folder(path.parent)
    write_bytes(path, data)


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; see `parse_json`.

    Raises:
      OSError: the file cannot be read, or is not a regular file.
      ValueError: it is not valid JSON.
    """
    path = any_path(path)
    if not storage.is_remote(path) and path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")  # reading a pipe would wait for its writer
    return parse_json(path.read_bytes())


def json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or contains something else."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON, without NaN and infinities.

    Raises:
      ValueError: it is not valid JSON, or is nested more than `DEEPEST` levels, which could exceed the recursion limit
        of functions that process it.
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
    """Context manager for a temporary folder: it is renamed to `path`, or removed after an error.

    Raises:
      InputError: the path exists and is not an empty folder, or cannot be created.
    """
    target = check_new_folder(path, what)
    if storage.is_remote(target):
        with tempfile.TemporaryDirectory(prefix="larp-") as temporary:
            yield pathlib.Path(temporary)
            _upload_folder(pathlib.Path(temporary), target, what)
        return
    target = target.absolute()
    if target.is_symlink():
        target = target.resolve()
    make_folder(target.parent, what)
    with temporary_folder(target.parent, target.name) as temporary:
        yield temporary
        try:
            os.replace(temporary, target)
        except OSError:
            check_new_folder(target, what)  # another process may have created it in the meantime
            raise


def _upload_folder(folder: pathlib.Path, target, what: str) -> None:
    names = listing(folder)
    with outputs(target, names, what):
        for name in names:
            storage.upload(folder / name, target / name)


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike, name: str) -> Iterator[pathlib.Path]:
    """Context manager for a temporary folder in an existing one, which is removed afterward.

    Also removes the temporary folders that killed processes left for the same name. If the parent is in a bucket, the
    folder is among the temporary files of this machine.
    """
    if storage.is_remote(parent):
        with tempfile.TemporaryDirectory(prefix="larp-") as temporary:
            yield pathlib.Path(temporary)
        return
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
            if folder and parent.is_dir():  # another process removed it before it was opened
                continue
            raise
        _lock(descriptor)
        if path.exists():  # otherwise another process removed it before it was locked
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike, prefix: str = ".") -> None:
    """Removes the temporary files and folders of killed processes from a folder, but not from its subfolders."""
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
    """Locks an open file until it is closed. False if another process has locked it, None if locks are unsupported."""
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
    """Context manager that locks a folder, so that no other process writes to it. The folder is created if missing.

    The operating system releases the lock when the process ends for any reason; in a bucket it expires, see
    `larp_jax.storage`. Temporary files of killed processes in the folder are removed.

    Raises:
      InputError: another process has locked the folder, or it cannot be written.
    """
    folder = make_folder(folder, what)
    if storage.is_remote(folder):
        with storage.Lock(folder, what):
            yield folder
        return
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
            logger.warning("%s cannot be locked; make sure that no other process writes there", folder)
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # its owner removed it before it was locked here
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
    """Context manager for writing files to a folder that no other process writes to; see `claim`.

    Until they are complete, `unfinished.json` lists them, so that the same call can replace them after it was killed.

    Args:
      folder: created if missing.
      names: paths of the files within the folder, with forward slashes.
      what: the option that the folder came from, for messages.
      ours: names that may be replaced, because an earlier call of the same kind wrote them.
      inputs: files that are never replaced.
      but: why an existing file is not replaced, for the message.

    Raises:
      InputError: one of the files exists and may not be replaced, or as for `claim`.
    """
    with claim(folder, what) as folder:
        journal = folder / UNFINISHED
        begun = set(json_object(journal).get("files", ()))
        mine, read = begun.union(ours), {path.resolve() for path in inputs}
        if storage.is_remote(folder):
            taken = storage.listing(folder).keys() - mine
        else:
            there = [name for name in names if os.path.lexists(folder / name)]
            taken = {x for x in there if x not in mine or not (path := folder / x).is_file() or path.resolve() in read}
        if existing := [name for name in names if name in taken]:
            raise InputError(f"{folder / existing[0]} exists{but}; name another {what}")
        write_json(journal, {"files": sorted(begun.union(names))})
        whole = False
        try:
            yield folder
            whole = True
        finally:
            if whole or not any((folder / name).exists() for name in names):
                journal.unlink(missing_ok=True)


def is_empty(folder: pathlib.Path) -> bool:
    """Whether a folder contains nothing except the lock file."""
    return all(path.name == LOCK for path in folder.iterdir())


def absolute(path: pathlib.Path) -> pathlib.Path:
    """A path that does not depend on the working directory."""
    return path if storage.is_remote(path) else path.absolute()


def relative(path: str | os.PathLike) -> str:
    """A path as seen from the working directory; those in a bucket are unchanged."""
    return os.fspath(path) if storage.is_remote(path) else os.path.relpath(path)


def listing(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """All files below a folder by path within it, with forward slashes, and what a bucket knows of each."""
    if storage.is_remote(folder):
        return {name: entry for name, entry in storage.listing(folder).items() if not name.endswith("/")}
    return {path.relative_to(folder).as_posix(): {} for path in sorted(folder.rglob("*")) if path.is_file()}


def remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder as far as possible."""
    if storage.is_remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def size(path) -> int:
    """Bytes of a file."""
    return path.stat().length if storage.is_remote(path) else path.stat().st_size


def digest(path: str | os.PathLike, method: str = "sha256") -> str:
    """SHA-256 of a file on this machine, in hexadecimal; or another digest that hashlib knows."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, method).hexdigest()


def move(source: pathlib.Path, target) -> None:
    """Moves a file within a disk or a bucket, or from a folder of `temporary_folder` to its parent."""
    if storage.is_remote(source):
        source.replace(target)
    elif storage.is_remote(target):
        storage.upload(source, target)
    else:
        os.replace(source, target)


@contextlib.contextmanager
def fetched(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Context manager for reading a file as one of this machine: the file itself, or a temporary copy of an object."""
    path = any_path(path)
    if not storage.is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="larp-") as folder:
        copy = pathlib.Path(folder, path.name)
        storage.download(path, copy)
        yield copy
