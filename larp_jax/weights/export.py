"""Export of models: the released Hugging Face layout, StableHLO functions, or only the codebook.

Outputs are written completely or not at all, so a full disk leaves no incomplete files.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from larp_jax import files
from larp_jax.config import GeneratorConfig, GeneratorRecipe, SecondStageRecipe, TokenizerConfig, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.models.quantizer import code_vectors
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng
from larp_jax.weights import released, released_config
from larp_jax.weights.checkpoint import Checkpoint
from larp_jax.weights.fingerprint import fingerprint
from larp_jax.weights.importing import CONFIG, OURS, PRIOR_SIZES, WEIGHTS, settings_beside

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIXES = {"codebook-npz": ".npz", "codebook-safetensors": ".safetensors"}  # the other kinds are directories

# What JAX guarantees: docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
READERS = "JAX from 3 weeks before to 6 months after"


def check_output(path: str | os.PathLike, kind: str) -> pathlib.Path:
    """Checks before any work that an export can be written. Only an earlier export of the same kind is replaced.

    Args:
      path: the file or directory.
      kind: `codebook-npz`, `codebook-safetensors`, `huggingface` or `stablehlo`.

    Returns:
      The path, with `~` expanded.

    Raises:
      InputError: it cannot be written, or the suffix of a codebook file does not match its kind.
    """
    if kind not in SUFFIXES:
        return files.check_new_folder(path)
    path = files.any_path(path, "--output")
    if path.suffix != SUFFIXES[kind]:
        raise InputError(f"--output {path} must end in {SUFFIXES[kind]} for {kind}; its manifest will end in .json")
    files.check_output(path, ours=_is_codebook)
    files.check_output(path.with_suffix(".json"), f"the manifest of --output {path},", ours=_is_manifest)
    return path


def _is_codebook(path: pathlib.Path) -> bool:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {"codebook", "manifest"} == set(file.files)
    with safe_open(path, framework="np") as file:
        return list(file.keys()) == ["codebook"] and "manifest" in (file.metadata() or {})


def _is_manifest(path: pathlib.Path) -> bool:
    values = files.json_object(path)
    return {"K", "d", "normalisation", "fingerprint"} <= values.keys() and "jax" not in values


def export_huggingface(
    directory: str | os.PathLike,
    recipe: TokenizerRecipe | SecondStageRecipe | GeneratorConfig,
    params: Mapping,
    *,
    known: Mapping[str, Any] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a directory that `from_pretrained` of the released code loads: `config.json` and `model.safetensors`.

    What their `config.json` has no field for is written next to it as `larp_jax.json`, which they ignore. The `kind` in
    the `config.json` of a flow generator is `flow`; their code has none, and only this package reads it.

    Args:
      directory: created; must not exist or must be empty.
      recipe: of the model; for a generator of codes, its configuration is enough.
      params: as in `TrainState.params` (`tokenizer`, with or without `prior`; or `generator`), raw or EMA.
      known: what else is known, from `known_of`.
      more: contents of further files by name.

    Raises:
      InputError: the directory is not empty, or the released layout does not support the configuration.
      OSError: writing failed.
    """
    if isinstance(recipe, GeneratorConfig):
        recipe = GeneratorRecipe(model=recipe)
    if isinstance(recipe, TokenizerRecipe) and "prior" not in params:
        recipe = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, prior_weight=0.0))
    config: Any = recipe if isinstance(recipe, TokenizerRecipe) else recipe.model
    values, prior_sizes = released_config.config_to_released(config)
    items = released.model_tensors(config)
    tensors = released.params_to_released(items, params)
    tensors |= {item.name: item.compute() for item in items if isinstance(item, released.Table)}
    beside = settings_beside(recipe)
    ours = dict(known or {}) | ({"settings": beside} if beside else {})
    with files.new_folder(directory) as folder:
        (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))
        if prior_sizes:
            (folder / PRIOR_SIZES).write_text(json.dumps({"prior": prior_sizes}))
        if ours:
            (folder / OURS).write_text(json.dumps(ours, indent=1))
        for name, content in (more or {}).items():
            (folder / name).write_bytes(content)
        try:
            save_file(tensors, folder / WEIGHTS)
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS}: {error}") from error


def known_of(found: Checkpoint) -> dict[str, Any]:
    """What `export_huggingface` writes beside the settings of a checkpoint, ready for JSON."""
    counts = {"code_counts": found.code_counts, "class_counts": found.class_counts}
    known = {name: [int(n) for n in numbers] for name, numbers in counts.items() if numbers is not None}
    others: dict[str, Any] = {
        "step": found.step,
        "tokenizer_fingerprint": found.tokenizer_fingerprint,
        "class_names": list(found.class_names),
    }
    if found.statistics is not None:
        mean, std = found.statistics
        others["latent_statistics"] = {"mean": mean.tolist(), "std": std.tolist()}
    return known | {name: value for name, value in others.items() if value}


def codebook_manifest(
    config: TokenizerConfig, params: Mapping, *, step: int | None = None, usage_counts: Sequence[int] | None = None
) -> dict:
    """Description of an exported tokenizer and of its codebook, if it has one, ready for JSON.

    Args:
      config: configuration of the tokenizer.
      params: its parameters (`TrainState.params["tokenizer"]`).
      step: their training step, if known.
      usage_counts: how often each of the K codes was used, if known.
    """
    q = config.quantizer
    codebook = {
        "K": q.codebook_size,
        "normalisation": "l2" if q.l2_normalized else "none",
        "temperature": q.temperature,
    }
    manifest: dict[str, Any] = {
        **(codebook if q.has_codes else {}),
        "d": q.code_dim,
        "N": config.num_tokens,
        "clip": list(config.clip_shape),
        "patch": list(config.encoder_patch),
        "step": step,
        "fingerprint": fingerprint(config, params),
    }
    if config.adaptive:
        manifest |= {"blocks": config.blocks, "ladder": list(config.ladder)}
    if usage_counts is not None:
        manifest["usage_counts"] = [int(n) for n in usage_counts]
        if len(manifest["usage_counts"]) != q.codebook_size:
            raise ValueError(f"{len(manifest['usage_counts'])} usage counts for {q.codebook_size} codes")
    return manifest


def export_codebook_npz(
    path: str | os.PathLike,
    config: TokenizerConfig,
    params: Mapping,
    *,
    step: int | None = None,
    usage_counts: Sequence[int] | None = None,
) -> None:
    """Writes the codebook as .npz: `codebook` [K, d] float32, normalized if so used, and `manifest` (JSON as uint8).

    The manifest is also written next to it as .json. Arguments as for `codebook_manifest`.

    Raises:
      InputError: the tokenizer has no codebook, or the file cannot be written; see `check_output`.
      OSError: writing failed.
    """
    codebook = _codebook(config, params)
    path = check_output(path, "codebook-npz")
    manifest = codebook_manifest(config, params, step=step, usage_counts=usage_counts)
    buffer = io.BytesIO()
    np.savez(buffer, codebook=codebook, manifest=np.frombuffer(json.dumps(manifest).encode(), np.uint8))
    _write_with_manifest(path, buffer.getvalue(), manifest)


def export_codebook_safetensors(
    path: str | os.PathLike,
    config: TokenizerConfig,
    params: Mapping,
    *,
    step: int | None = None,
    usage_counts: Sequence[int] | None = None,
) -> None:
    """Writes the codebook as .safetensors: `codebook` as in `export_codebook_npz`, `manifest` (JSON) in its metadata.

    The manifest is also written next to it as .json. Arguments and errors as for `export_codebook_npz`.
    """
    codebook = _codebook(config, params)
    path = check_output(path, "codebook-safetensors")
    manifest = codebook_manifest(config, params, step=step, usage_counts=usage_counts)
    _write_with_manifest(path, save({"codebook": codebook}, {"manifest": json.dumps(manifest)}), manifest)


def _codebook(config: TokenizerConfig, params: Mapping) -> np.ndarray:
    if not config.quantizer.has_codes:
        raise InputError("model.quantizer.kind='kl' has continuous latents and no codebook to export")
    embedding = jnp.asarray(params["quantizer"]["embedding"], jnp.float32)
    return np.asarray(code_vectors(config.quantizer, embedding))


@rng.pinned()
def export_stablehlo(
    directory: str | os.PathLike, config: TokenizerConfig, params: Mapping, *, step: int | None = None
) -> None:
    """Writes `encode.bin` and `decode.bin`, functions that need only `jax.export` to run (see docs/export.md).

    `encode`: video [B, T, H, W, C] float32 in [0, 1] -> codes [B, N] int32, or latents [B, N, d] float32. `decode`:
    these -> video, clamped to [0, 1]. If the tokenizer has a ladder, both have the numbers of codes by block,
    [B, blocks] int32, as a second argument. The files contain the weights, compute in float32 for any B, and run on
    CPUs, NVIDIA GPUs and TPUs. `manifest.json` is that of a codebook, with the version of JAX that wrote the files
    (`jax`, `calling_convention`).

    Args:
      directory: created; must not exist or must be empty.
      config: configuration of the tokenizer.
      params: its parameters (`TrainState.params["tokenizer"]`).
      step: their training step, if known.

    Raises:
      InputError: the directory is not empty.
      OSError: writing failed.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0))))
    tokenizer = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))

    def encode(video, *lengths):
        return tokenizer.quantize(video, *lengths).tokens

    def decode(tokens, *lengths):
        return jnp.clip(tokenizer.decode(tokens, *lengths), 0.0, 1.0)

    try:
        import flatbuffers  # noqa: F401  (how jax.export serializes)
    except ImportError:
        raise InputError("the stablehlo format needs flatbuffers: pip install flatbuffers") from None

    (batch,) = jax.export.symbolic_shape("b")
    inputs = {
        encode: jax.ShapeDtypeStruct((batch, *config.clip_shape), jnp.float32),
        decode: jax.ShapeDtypeStruct(
            (batch, *config.token_shape), jnp.int32 if config.quantizer.has_codes else jnp.float32
        ),
    }
    lengths = [jax.ShapeDtypeStruct((batch, config.blocks), jnp.int32)] if config.adaptive else []
    with files.new_folder(directory) as folder:
        with _without_locations():
            for function, shape in inputs.items():
                exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shape, *lengths)
                (folder / f"{function.__name__}.bin").write_bytes(exported.serialize())
        versions = {
            "jax": jax.__version__,
            "calling_convention": exported.calling_convention_version,
            "readable_by": f"{READERS} {jax.__version__}",
        }
        (folder / "manifest.json").write_text(_pretty(codebook_manifest(config, params, step=step) | versions))


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Context manager: functions lowered in it do not contain file names of this machine."""
    before = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _pretty(manifest: dict) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _write_with_manifest(path: pathlib.Path, data: bytes, manifest: dict) -> None:
    files.make_folder(path.parent)
    with files.replacing(path) as codebook, files.replacing(path.with_suffix(".json")) as described:
        codebook.write_bytes(data)
        described.write_text(_pretty(manifest))
