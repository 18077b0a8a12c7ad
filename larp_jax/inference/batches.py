"""A folder that is written batch by batch by several hosts, and that an interrupted call can continue."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from larp_jax import files
from larp_jax.data.codes import SETTINGS
from larp_jax.errors import InputError

NOT_NAMED = {"decoder"}  # settings that folders of earlier versions do not name


class BatchFolder:
    """The folder and the share of each host; as a context manager, it locks the folder against other calls.

    `settings.json` in it describes what it contains, so that only the same call continues it.

    Args:
      output: the folder, created if missing.
      settings: what the contents depend on, ready for JSON.
      count: number of batches.
      content: what the folder contains, for messages.
      option: the option that the folder came from, for messages.

    Attributes:
      path: the folder.
      mine: numbers of the batches of this host.

    Raises:
      InputError: the folder contains something else, was started with other settings, or is being written.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        settings: Mapping[str, Any],
        count: int,
        *,
        content: str,
        option: str = "--output",
    ):
        self.path = files.check_folder(output, option)
        self._settings, self._count, self._content, self._option = dict(settings), count, content, option
        self.mine = range(count)[jax.process_index() :: jax.process_count()]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:  # on behalf of all processes
                stack.enter_context(files.claim(self.path, self._option))
                self._check_settings()
            files.make_folder(self.path, self._option)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._resources.close()

    def _check_settings(self) -> None:
        """Writes the settings to a new folder; `InputError` if the folder contains anything else."""
        folder, settings, option = self.path, self._settings, self._option
        path: pathlib.Path = folder / SETTINGS
        if not path.exists():
            if not files.is_empty(folder):
                raise InputError(
                    f"{folder} is not empty and contains no {self._content} of an earlier call; name another {option}"
                )
            files.write_json(path, settings)
            return
        known = files.json_object(path)
        if not known:
            raise InputError(f"{path} cannot be read; name another {option}")
        for name in sorted((settings.keys() | known.keys()) - (NOT_NAMED - known.keys())):
            if settings.get(name) != known.get(name):
                raise InputError(
                    f"{folder} was started with {name} {known.get(name)}, not {settings.get(name)}; name another"
                    f" {option}"
                )

    def is_last(self) -> bool:
        """Waits until all hosts are done; then whether this one writes what is left, for all of them."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all batches are written")
        return jax.process_index() == 0
