"""Repositories of the Hugging Face hub, `hf://OWNER/NAME[@REVISION]`: models are read from and pushed to them.

huggingface_hub downloads and caches; its environment variables apply (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
Only the files in `FILES` are downloaded: settings in JSON and weights in safetensors, never a pickle.
"""

import hashlib
import logging
import os
import pathlib
import re
from typing import Any

from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

SCHEME = "hf://"
CONFIG, WEIGHTS, PRIOR_SIZES, OURS = "config.json", "model.safetensors", "prior.json", "larp_jax.json"
FILES = (CONFIG, WEIGHTS, PRIOR_SIZES, OURS)
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_HASHES = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class HubError(RuntimeError):
    """The hub does not answer, or fails; the same command may work later."""


def is_hub(path: str | os.PathLike) -> bool:
    """Whether a path names a repository."""
    return os.fspath(path).startswith(SCHEME)


def parse(text: str, what: str) -> tuple[str, str | None]:
    """Repository and revision of `hf://OWNER/NAME[@REVISION]`, or of the same without `hf://`.

    Args:
      text: as the user gave it.
      what: the option it came from, for the message.

    Raises:
      InputError: it has another form.
    """
    found = _NAME.fullmatch(text.removeprefix(SCHEME))
    if not found or any(".." in part or "--" in part for part in found[1].split("/")):
        raise InputError(f"{what} {text} is no repository; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    return found[1], found[2]


def download(text: str, what: str) -> pathlib.Path:
    """The folder of a repository's model in the local cache, downloaded if it is not there.

    Args:
      text: `hf://OWNER/NAME[@REVISION]`; the revision is a branch, a tag or a commit, by default the newest commit.
      what: the option it came from, for messages.

    Raises:
      InputError: there is no such repository or revision, no access to it, or no model in it; or a file is damaged.
      HubError: the hub does not answer, and the cache does not contain the revision.
    """
    repository, revision = parse(text, what)
    hub = _library(f"{what} {text}")
    try:
        found = hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # of huggingface_hub and of its HTTP client
        raise _explained(error, f"{what} {text}", "read it") from error
    folder = pathlib.Path(found)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{what} {text} contains no model that can be read: it has no {' and no '.join(missing)}")
    for name in FILES:
        _check_download(folder / name)
    logger.info("hf://%s: commit %s", repository, folder.name)
    return folder


def _check_download(path: pathlib.Path) -> None:
    """Compares a file in the cache with the server's hash, which is its name there.

    The hash of a large file is its SHA-256, that of other files their Git blob hash. Without symbolic links, the cache
    does not keep hashes.
    """
    stored = path.resolve()
    if not path.exists() or not _HASHES.fullmatch(stored.name):
        return
    if len(stored.name) == 64:
        with stored.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        found = hashlib.sha1(b"blob %d\0" % stored.stat().st_size + stored.read_bytes()).hexdigest()
    if found != stored.name:
        raise InputError(
            f"{path} is corrupted (its hash differs from the server's); delete {stored} and download it again"
        )


def create(repository: str) -> None:
    """Creates a private repository unless it exists: checks before any work that a push is allowed.

    Raises:
      InputError: there is no login, or it may not create the repository.
      HubError: the hub does not answer.
    """
    hub = _library(f"--push {repository}")
    try:
        hub.HfApi().create_repo(repository, private=True, exist_ok=True)
    except Exception as error:  # of huggingface_hub and of its HTTP client
        raise _explained(error, f"--push {repository}", "write to it") from error


def push(folder: str | os.PathLike, repository: str, message: str) -> str:
    """Uploads the files of a folder as one commit; returns its address. Errors are those of `create`."""
    hub = _library(f"--push {repository}")
    try:
        return str(hub.HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # of huggingface_hub and of its HTTP client
        raise _explained(error, f"--push {repository}", "write to it") from error


def _library(place: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"{place} needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _explained(error: Exception, place: str, access: str) -> Exception:
    """One line for an error of huggingface_hub.

    Args:
      error: the error.
      place: the option and the repository.
      access: what was refused.
    """
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError):  # neither on the hub, for this reason, nor in the cache
        if constants.HF_HUB_OFFLINE:
            return InputError(
                f"{place} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it;"
                " unset HF_HUB_OFFLINE, or set HF_HOME to another cache"
            )
        error = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "run hf auth login, or set HF_TOKEN to a token that may"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"{place}: HF_HUB_OFFLINE forbids to reach the hub; unset it")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{place}: the repository has no such revision; give a branch, a tag or a commit of it")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{place}: its owner grants access on request; ask on its page, and {login} {access}")
    if isinstance(error, errors.RepositoryNotFoundError):
        said = "there is no such repository, or a private one; check the name, or"
        return InputError(f"{place}: {said} {login} {access}")
    if status in (401, 403):
        return InputError(f"{place}: the hub refuses to {access} ({status}); {login} {access}")
    if isinstance(error, ValueError) or (status is not None and 400 <= status < 500):  # a name, or the card's license
        return InputError(f"{place}: the hub does not accept this ({reason(error)})")
    said = f"status {status}" if status else f"{type(error).__name__}: {reason(error)}"
    return HubError(f"{place}: the hub does not answer ({said}); check the network, the same command continues later")
