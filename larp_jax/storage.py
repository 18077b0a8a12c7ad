"""Objects in Google Cloud Storage, `gs://BUCKET/NAME`: paths, uploads, checksums and locks.

A bucket has neither folders nor renames nor file locks. What holds there instead:

- An object is replaced in one step when its upload is complete, and is seen by every later read and listing of any
  machine. Files are therefore written on the local disk first and uploaded whole: readers never see a part of one.
- Several files do not appear at once. The one that makes the others valid is uploaded last: the manifest of codes, the
  marker of a checkpoint. Other folders contain a list of unfinished files until all are there; see `files.outputs`.
- A lock is an object that only one process can create, because the upload has the condition that there is none. Its
  owner renews it every `HEARTBEAT` seconds, on the condition that it is still the object it wrote last. A lock that was
  not renewed for `EXPIRES` seconds belongs to a process that no longer runs or no longer reaches the bucket, and may be
  replaced; its owner, should it return, notices at the next renewal and stops writing. Both ages are those of the
  server's clock.

gcsfs repeats requests that fail (5xx, 408, 429, no connection) six times, with pauses that double from one second: an
outage of half a minute goes unnoticed. TensorStore, which moves the arrays of checkpoints, repeats them for minutes.
"""

import datetime
import email.utils
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import secrets
import socket
import threading
from collections.abc import Collection
from typing import Any

from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

SCHEME = "gs://"
LOCK = ".lock"
HEARTBEAT = 15.0  # seconds between renewals of a lock
EXPIRES = 60.0  # age in seconds at which a lock that is not renewed may be replaced
PATIENCE = 60.0  # seconds that a request may wait for the server before it counts as failed and is repeated


# A URL at the beginning of a text, with one slash if it was a pathlib path, and a URL within a text.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/|([A-Za-z][A-Za-z0-9+.-]*)://")
# Kinds of data sets, which can be followed by an absolute path.
_NO_SCHEMES = ("folder", "tokens", "rewards", "features", "tfds")


class LockLost(RuntimeError):
    """Another process has replaced the lock of this one, which must not write any more."""


def refuse_url(text: str, what: str, *, allowed: Collection[str] = ()) -> None:
    """`InputError` if a path is a URL, or a text such as `folder:s3://bucket/videos` contains one.

    Args:
      text: a path, or a text that contains one.
      what: the option it came from, for the message.
      allowed: schemes that are allowed, such as `gs://`.
    """
    for found in _URL.finditer(text):
        scheme = (found[1] or found[2]).lower()
        if any(text.startswith(prefix, found.start()) for prefix in allowed) or scheme in _NO_SCHEMES:
            continue
        if scheme == "file":
            raise InputError(f"{what} {text}: file:// is not supported; give the path alone")
        if scheme == "gs":
            raise InputError(
                f"{what} {text}: this is read from a disk, not from gs://; mount the bucket (gcsfuse BUCKET DIR, or"
                " launch/tpu_pod.sh --bucket) or copy it, and give the folder"
            )
        if scheme == "hf":
            raise InputError(
                f"{what} {text}: hf:// is not supported here; only a model is read from hf://OWNER/NAME (--checkpoint,"
                " --tokenizer, import --source, init_from), and export --push OWNER/NAME writes one"
            )
        raise InputError(
            f"{what} {text}: {scheme}:// is not supported; give a path on this machine, such as a mount of the"
            " bucket, or gs:// for what this program writes"
        )


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path, as text or as returned by `open_path`, is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def open_path(text: str, what: str):
    """An `etils.epath.Path`, with the methods of `pathlib.Path`.

    Args:
      text: `gs://BUCKET/NAME`.
      what: the option it came from, for the message.

    Raises:
      InputError: gcsfs is not installed, or the text names no bucket.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{what} {text}: gs:// needs gcsfs: pip install 'larp_jax[gcs]', or pip install gcsfs")
    bucket = text.removeprefix(SCHEME).partition("/")[0]
    if not bucket or "\0" in text:
        raise InputError(f"{what} {text!r} names no bucket; write gs://BUCKET/NAME")
    _configure()
    from etils import epath

    return epath.Path(text)


def _configure() -> None:
    """Settings of gcsfs, which it reads when it is imported or first used."""
    # The client for zonal buckets asks services that may not be reachable, and stalls for a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # one client, whether TensorFlow is installed or not
    import aiohttp
    import fsspec.config

    chosen = {
        "use_listings_cache": False,  # other processes write to the same bucket
        "requests_timeout": aiohttp.ClientTimeout(sock_connect=PATIENCE, sock_read=PATIENCE),
    }
    fsspec.config.conf["gcs"] = chosen | fsspec.config.conf.get("gcs", {})


@functools.cache
def _client():
    import fsspec

    return fsspec.filesystem("gcs")


def _split(path) -> tuple[str, str]:
    bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
    return bucket, name


def check_writable(path, what: str) -> None:
    """`InputError` if the bucket of a path does not exist, or objects cannot be created in it. Creates nothing."""
    bucket, _ = _split(path)
    client, needed = _client(), "storage.objects.create"
    try:
        client.ls(bucket, max_results=1)
        try:
            _, answer = client.call("GET", "b/{}/iam/testPermissions", bucket, permissions=needed)
        except FileNotFoundError:  # servers other than Google's do not have it
            return
    except FileNotFoundError:
        raise InputError(f"{what} {path}: there is no bucket {bucket}; create it, or name another") from None
    except Exception as error:  # of gcsfs, aiohttp and google.auth
        raise InputError(f"{what} {path}: the bucket cannot be reached ({reason(error)})") from error
    if needed not in json.loads(answer).get("permissions", ()):
        raise InputError(f"{what} {path} cannot be written (no permission {needed}); name another")


def upload(source: str | os.PathLike, target) -> None:
    """Copies a local file to an object, which appears or is replaced when it is complete."""
    check_locks()
    _client().put_file(os.fspath(source), os.fspath(target))


def write_bytes(target, data: bytes) -> None:
    """Writes an object, which appears or is replaced when it is complete."""
    check_locks()
    _client().pipe_file(os.fspath(target), data)


def download(source, target: str | os.PathLike) -> None:
    """Copies an object to a local file."""
    _client().get_file(os.fspath(source), os.fspath(target))


def listing(folder) -> dict[str, dict[str, Any]]:
    """All objects below a folder: their metadata by path within it, with forward slashes; `md5Hash` is in Base64."""
    prefix = os.fspath(folder).removeprefix(SCHEME).rstrip("/") + "/"
    found = _client().find(prefix, detail=True)
    return {name.removeprefix(prefix): entry for name, entry in sorted(found.items())}


# --------------------------------------------------------------------------------------------------------------- locks

_held: list["Lock"] = []


def check_locks() -> None:
    """`LockLost` if another process has replaced a lock that this process holds."""
    for lock in _held:
        if lock.lost:
            raise LockLost(
                f"another process took over {lock.folder}, because this one did not reach the bucket for"
                f" {EXPIRES:.0f} seconds; end one of them"
            )


class Lock:
    """The lock of a folder in a bucket; a context manager. See the top of this module.

    Args:
      folder: from `open_path`.
      what: the option it came from, for the message.

    Attributes:
      lost: whether another process has replaced the lock.
    """

    def __init__(self, folder, what: str):
        self.folder, self.lost = folder, False
        self._what = what
        self._client = _client()
        self._bucket, self._name = _split(folder / LOCK)
        self._owner = _this_process() | {"token": secrets.token_hex(8)}
        self._generation: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lock":
        try:
            while not self._taken():
                self._ended.wait(1.0)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self._what} {self.folder} cannot be written ({reason(error)})") from error
        _held.append(self)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()
        _held.remove(self)
        if not self.lost:
            try:
                self._client.call("DELETE", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=self._generation)
            except Exception as error:  # it expires
                logger.debug("the lock of %s is not removed: %s", self.folder, reason(error))

    def _taken(self) -> bool:
        """Takes the lock if it is free or its owner is gone; `InputError` if its owner is alive."""
        if self._write("0"):
            return True
        found = self._read()
        if found is None:
            return False
        generation, owner, age = found
        if _has_ended(owner) or age >= EXPIRES:
            return self._write(generation)
        seen, self._generation = self._generation, generation
        if seen not in (None, generation):
            raise InputError(f"another process is writing {self._what} {self.folder} ({_name(owner)}); name another")
        if seen is None:
            logger.info("%s is locked by %s: checking whether it runs", self.folder, _name(owner))
        return False

    def _read(self) -> tuple[str, dict, float] | None:
        """Generation, owner and age in seconds of the lock; None if there is none."""
        try:
            headers, text = self._client.call("GET", "b/{}/o/{}", self._bucket, self._name)
            entry = json.loads(text)
            _, content = self._client.call("GET", "b/{}/o/{}", self._bucket, self._name, alt="media")
        except FileNotFoundError:
            return None
        now = email.utils.parsedate_to_datetime(headers["Date"])
        age = (now - datetime.datetime.fromisoformat(entry["updated"])).total_seconds()
        try:
            owner = json.loads(content)
        except ValueError:
            owner = {}
        return entry["generation"], owner if isinstance(owner, dict) else {}, age

    def _write(self, generation: str) -> bool:
        """Writes the lock if it still has this generation ("0": if there is none); returns whether it is ours."""
        parts = [("application/json", {"name": self._name}), ("application/json", self._owner)]
        data = "".join(f"--larp\r\nContent-Type: {kind}\r\n\r\n{json.dumps(x)}\r\n" for kind, x in parts) + "--larp--"
        try:
            written = self._client.call(
                "POST",
                f"{self._client._location}/upload/storage/v1/b/{self._bucket}/o",
                uploadType="multipart",
                ifGenerationMatch=generation,
                headers={"Content-Type": "multipart/related; boundary=larp"},
                data=data.encode(),
                json_out=True,
            )
            self._generation = written["generation"]
            return True
        except FileExistsError:  # the condition does not hold, maybe because the answer to an earlier attempt was lost
            found = self._read()
            if found is None or found[1].get("token") != self._owner["token"]:
                return False
            self._generation = found[0]
            return True

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                if not self._write(self._generation):
                    self.lost = True
                    return
            except Exception as error:  # tried again at the next beat
                logger.debug("the lock of %s is not renewed: %s", self.folder, reason(error))


def _name(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def _this_process() -> dict[str, Any]:
    """What identifies this process; `system` is the same for processes that see each other's numbers."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "system": _system()}


def _system() -> str:
    """The boot of this machine and the namespace of its process numbers; empty if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; empty if it has ended or the system does not say."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _has_ended(owner: dict) -> bool:
    """Whether the owner of a lock is known to have ended, because it ran on this machine."""
    if not owner.get("system") or owner["system"] != _system() or not isinstance(owner.get("pid"), int):
        return False
    return _started(owner["pid"]) != owner.get("started")
