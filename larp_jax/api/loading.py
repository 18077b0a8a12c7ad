"""Trained models from checkpoints of every kind."""

import os

from flax import nnx
from jax.sharding import Mesh

from larp_jax import files
from larp_jax.api.generator import LoadedGenerator, checked_params
from larp_jax.api.tokenizer import LoadedTokenizer
from larp_jax.errors import InputError
from larp_jax.models.router import Router
from larp_jax.runtime import distributed
from larp_jax.weights import checkpoint, importing


def load_tokenizer(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    mesh: Mesh | None = None,
    router: str | os.PathLike | None = None,
) -> LoadedTokenizer:
    """Loads a trained tokenizer.

    Args:
      path: a workdir (its newest checkpoint), one of its checkpoints, an imported directory, or a directory in the
        released Hugging Face layout (`config.json` and `model.safetensors`); or a repository of that layout on the
        hub, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, which is downloaded and cached.
      weights: `ema` for the EMA weights if the checkpoint has them, `raw` for the raw weights.
      mesh: devices for the parameters and for splitting batches; the default device without.
      router: checkpoint of the router that chooses with the budget `auto`.

    Raises:
      InputError: a checkpoint does not exist, cannot be read, or is of another kind.
      HubError: the hub does not answer.
    """
    found = load_checkpoint(path, weights=weights)
    sampled = found.recipe.data
    return LoadedTokenizer(
        found.recipe.model,
        found.params["tokenizer"],
        step=found.step,
        mesh=mesh,
        fps=sampled.fps,
        stride=sampled.stride,
        router=None if router is None else load_router(router, weights=weights),
    )


def load_router(path: str | os.PathLike, *, weights: str = "ema") -> tuple[Router, dict]:
    """The module of a trained router, without its weights, and these; arguments and errors as for `load_tokenizer`."""
    found = load_checkpoint(path, weights=weights, kind="router")
    module = nnx.eval_shape(lambda: Router(found.recipe.model, rngs=nnx.Rngs(0)))
    return module, checked_params(module, found.params["router"], "router")


def load_generator(
    path: str | os.PathLike, *, weights: str = "ema", precision: str = "float32", mesh: Mesh | None = None
) -> LoadedGenerator:
    """Loads a trained generator.

    Args:
      path: as for `load_tokenizer`.
      weights: as for `load_tokenizer`.
      precision: as for `LoadedGenerator`.
      mesh: devices for the parameters and for splitting batches; the default device without.

    Raises:
      InputError: the checkpoint does not exist, cannot be read, or is not one of a generator.
    """
    found = load_checkpoint(path, weights=weights, kind="generator")
    return LoadedGenerator.of(found, precision=precision, mesh=mesh)


def load_checkpoint(
    path: str | os.PathLike, *, weights: str = "ema", kind: str | None = "tokenizer"
) -> checkpoint.Checkpoint:
    """Loads a checkpoint with its recipe and all its parameters. Arguments and errors are those of `load_tokenizer`.

    `kind` is the model that it must contain: `tokenizer`, `generator` or `router`, or None for any.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights!r} is not known; choose ema or raw")
    distributed.check_devices()
    path = files.readable(path, "checkpoint")
    if checkpoint.newest(path) is not None or not (path / importing.WEIGHTS).exists():
        found = checkpoint.load(path, weights=weights)
    else:
        recipe, params, known = importing.read_model(path)
        found = checkpoint.Checkpoint.of(files.absolute(path), recipe, params, known)
    if kind not in (None, found.recipe.stage, found.recipe.holds):
        raise InputError(f"{path} holds a {found.recipe.stage}; give a {kind}")
    return found
