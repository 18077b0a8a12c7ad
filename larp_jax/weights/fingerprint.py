"""A fingerprint of the meaning of codes, stored with them so that no other tokenizer decodes them."""

import hashlib
import json
from collections.abc import Mapping

import jax
import numpy as np

from larp_jax.config import TRAINING_FIELDS, TokenizerConfig, to_dict
from larp_jax.models.paths import path_name

# Settings that do not change codes: names of sizes, and how codes are sampled in training. Those of the decoder are
# left out too.
NOT_OF_CODES = TRAINING_FIELDS | {"size", "quantizer.kind"}


def fingerprint(config: TokenizerConfig, params: Mapping) -> str:
    """A hash of everything that determines the codes of a tokenizer: encoder, quantizer and their settings.

    It does not depend on how the tokenizer was stored: imported, exported, sharded or resumed.

    Args:
      config: configuration of the tokenizer.
      params: its parameters (`TrainState.params["tokenizer"]`), NumPy or JAX arrays.

    Returns:
      16 hexadecimal digits.
    """
    return digest(json.dumps(_settings(config), sort_keys=True), parts(params)[0])


def decoder_fingerprint(params: Mapping) -> str:
    """A hash of what decodes codes. Tokenizers with one `fingerprint` may have decoders that were trained further."""
    return digest("", parts(params)[1])


def parts(params: Mapping) -> tuple[dict, dict]:
    """The parameters of a tokenizer that its codes depend on, and those that only decode them."""
    quantizer = {name: leaf for name, leaf in params["quantizer"].items() if name != "out_linear"}
    decoding = {"decoder": params["decoder"], "quantizer": {"out_linear": params["quantizer"]["out_linear"]}}
    return {"encoder": params["encoder"], "quantizer": quantizer}, decoding


def digest(settings: str, params: Mapping) -> str:
    """A hash of settings and of parameters, their names and shapes: 16 hexadecimal digits."""
    found = hashlib.sha256(settings.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        found.update(f"{path_name(path)} {tuple(leaf.shape)}".encode())
        found.update(np.ascontiguousarray(leaf, dtype="<f4").data)
    return found.hexdigest()[:16]


def _settings(config: TokenizerConfig) -> dict:
    """The settings that differ from the defaults, so that new settings do not change old fingerprints."""

    def different(values, defaults, prefix=""):
        found = {}
        for name, value in values.items():
            path = prefix + name
            if path in NOT_OF_CODES or "decoder" in path:
                continue
            if isinstance(value, dict):
                found |= different(value, defaults[name], f"{path}.")
            elif value != defaults[name]:
                found[path] = value
        return found

    return different(to_dict(config), to_dict(TokenizerConfig()))
