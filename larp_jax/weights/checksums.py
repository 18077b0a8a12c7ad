"""Checksums of checkpoints, which show damage when a checkpoint is read.

`checksums.json` contains a digest of every file in the items of a checkpoint. On a disk it is the SHA-256. In a bucket
it is the MD5 (`md5:...`) that the bucket itself has of each object, so that nothing needs to be downloaded to write or
to check it. Copies of checkpoints from one to the other are checked by the digests that they have.
"""

import base64
import logging
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from larp_jax import files, storage
from larp_jax.errors import reason
from larp_jax.files import read_json

CHECKSUMS = "checksums.json"
MD5 = "md5:"

logger = logging.getLogger(__name__)


def digests(
    directory: pathlib.Path, items: Collection[str] = (), like: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Digests by path of the files of these items of a checkpoint; of all items if none are given.

    Args:
      directory: the checkpoint.
      items: names of items.
      like: digests to compare with, which decide the kind; the natural one of the place without.
    """
    found = {}
    for name, entry in files.listing(directory).items():
        item, slash, _ = name.partition("/")
        if slash and (not items or item in items):
            md5 = storage.is_remote(directory) if like is None else str(like.get(name, "")).startswith(MD5)
            found[name] = _digest(directory / name, entry.get("md5Hash"), md5)
    return found


def _digest(path: pathlib.Path, known: str | None, md5: bool) -> str:
    if md5 and known:
        return MD5 + base64.b64decode(known).hex()
    with files.fetched(path) as file:
        return MD5 + files.digest(file, "md5") if md5 else files.digest(file)


def write_digests(directory: pathlib.Path) -> None:
    """Writes the checksums of a complete checkpoint."""
    files.write_json(directory / CHECKSUMS, digests(directory))


def find_damage(directory: pathlib.Path, items: Collection[str] = ()) -> str:
    """Compares items of a checkpoint (by default all) with their checksums.

    All items that the metadata lists must have checksums. Checkpoints of earlier versions list no items; the earliest
    have no checksums and are not checked, with a warning.

    Returns:
      A description of the first damage found; empty if there is none.
    """
    try:
        expected = checksums(directory)
        found = {} if expected is None else digests(directory, items, expected)
    except (OSError, ValueError) as error:
        return f"its files cannot be read: {reason(error)}"
    for name, digest in (expected or {}).items():
        if items and name.partition("/")[0] not in items:
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} differs from its checksum"
    try:
        named = set(map(str, read_json_item(directory).get("items", ())))
    except Exception as error:  # damage causes many kinds of errors
        return f"its metadata cannot be read: {reason(error)}"
    if expected is None:
        if named:
            return f"{CHECKSUMS} is missing"
        logger.warning("checkpoint %s was written without checksums: damage would not be noticed", directory)
        return ""
    unlisted = named - items_of(expected)
    return f"{CHECKSUMS} lists no files of {min(unlisted)}" if unlisted else ""


def checksums(directory: pathlib.Path) -> dict[str, Any] | None:
    """The checksums stored with a checkpoint: digests by path; None if there are none."""
    try:
        expected = read_json(directory / CHECKSUMS)
    except FileNotFoundError:
        return None
    if not isinstance(expected, dict):
        raise ValueError(f"{CHECKSUMS} is not a JSON object")
    return expected


def items_of(names: Iterable[str]) -> set[str]:
    """The items of a checkpoint that these paths are in."""
    return {name.partition("/")[0] for name in names}


def read_json_item(directory: pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises various errors if it is damaged.

    Uses the handler directly: a `Checkpointer` would wait for all processes, but the first process reads this alone.
    """
    metadata = ocp.JsonCheckpointHandler().restore(directory / "metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is a {type(metadata).__name__}")
    return metadata
