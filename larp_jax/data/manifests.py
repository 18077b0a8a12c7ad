"""Manifests of folders that commands write: JSON that is written last, so that a folder without it is incomplete."""

import os
from collections.abc import Callable
from typing import Any

from larp_jax import files
from larp_jax.data.spec import contents
from larp_jax.errors import InputError, reason

MANIFEST = "manifest.json"


def read(
    directory: str | os.PathLike, *, content: str, version: int, command: str, check: Callable[[dict], None]
) -> dict[str, Any]:
    """Reads and checks the manifest of a folder whose format is "larp_jax.CONTENT".

    Args:
      directory: the folder.
      content: what it contains, such as `rewards`.
      version: the version that is supported.
      command: the command that writes such folders, for messages.
      check: raises any error if something in a manifest is wrong.

    Raises:
      InputError: the manifest is missing, damaged or another's.
    """
    path, again = files.any_path(directory, f"folder of {content}") / MANIFEST, f"run {command} again"
    try:
        manifest = files.read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a folder that {command} completed") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != f"larp_jax.{content}":
        found = f" but of {kind}" if (kind := contents(path.parent)) else ""
        raise InputError(f"{path} is not a manifest of {content}{found}; give a folder written by {command}")
    if manifest.get("version") != version:
        raise InputError(f"{path} has version {manifest.get('version')}, but only {version} is supported; {again}")
    try:
        check(manifest)
    except InputError as error:
        raise InputError(f"{path} is damaged ({str(error).partition(';')[0]}); {again}") from None
    except (KeyError, TypeError, ValueError) as error:  # anything may stand in a damaged file
        raise InputError(f"{path} is damaged ({type(error).__name__}: {reason(error)}); {again}") from None
    return manifest


def check_rows(manifest: dict, shard_name: Callable[[int, int], str]) -> None:
    """Any of several errors unless `shards` have their names, and as many `rows` with `video`, `start` and `source`.

    `shard_name(number, count)` is the name of a shard.
    """
    shards, rows = manifest["shards"], manifest["rows"]
    if not rows or [shard["file"] for shard in shards] != [shard_name(i, len(shards)) for i in range(len(shards))]:
        raise ValueError("no rows, or other names of shards")
    if sum(shard["rows"] for shard in shards) != len(rows):
        raise ValueError(f"{sum(shard['rows'] for shard in shards)} rows in shards, {len(rows)} listed")
    for row in rows:
        if not all(type(row[name]) is int and row[name] >= 0 for name in ("video", "start")):
            raise ValueError("a row without its video or start")
        if not isinstance(row["source"], str):
            raise ValueError("a row without its source")
