"""Conversion of teacher networks from the files of the Hugging Face hub: config.json and safetensors, no pickle."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from larp_jax import files
from larp_jax.config.teachers import TEACHERS, TeacherConfig
from larp_jax.errors import InputError
from larp_jax.hub import CONFIG, WEIGHTS
from larp_jax.models.vision_positions import halves
from larp_jax.weights.importing import located, read_settings
from larp_jax.weights.tensors import compare_shapes, finished, read_safetensors

GRID = 16  # of DINO's features by default, which is that of the tokenizer's patches
LAYER_PARTS = ("norm1", "query", "key", "value", "out", "norm2", "up", "down")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and settings of a family in the files of transformers.

    Attributes:
      models: `model_type` in config.json.
      root: prefix of the names if the file also contains a head or a decoder.
      patches: name of the patch embedding.
      layer: prefix of the names of a block, with `{}` for its number.
      parts: names in a block, as in `LAYER_PARTS`.
      norm: name of the norm after the last block.
      unread: regular expression of the names that are not part of the features.
      fixed: settings that all our networks of the family have, which are also the defaults of transformers.
      biases: names of biases in a block that are not NAME.bias; None if there is none.
    """

    models: tuple[str, ...]
    root: str
    patches: str
    layer: str
    parts: tuple[str, ...]
    norm: str
    unread: str
    fixed: dict[str, Any]
    biases: dict[str, str | None] = dataclasses.field(default_factory=dict)


LAYOUTS = {
    "vjepa2": Layout(
        models=("vjepa2",),
        root="vjepa2.",
        patches="encoder.embeddings.patch_embeddings.proj",
        layer="encoder.layer.{}.",
        parts=("norm1", *(f"attention.{x}" for x in ("query", "key", "value", "proj")), "norm2", "mlp.fc1", "mlp.fc2"),
        norm="encoder.layernorm",
        unread=r"(predictor|pooler|classifier)\..+",
        fixed={"hidden_act": "gelu", "layer_norm_eps": 1e-6, "tubelet_size": 2, "in_chans": 3, "qkv_bias": True},
    ),
    "videomae": Layout(
        models=("videomae",),
        root="videomae.",
        patches="embeddings.patch_embeddings.projection",
        layer="encoder.layer.{}.",
        parts=(
            "layernorm_before",
            *(f"attention.attention.{x}" for x in ("query", "key", "value")),
            *("attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"),
        ),
        norm="layernorm",
        unread=r"(decoder|encoder_to_decoder|fc_norm|classifier)\..+|mask_token|position_embeddings",
        fixed={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tubelet_size": 2, "num_channels": 3}
        | {"qkv_bias": True, "qv_bias": True},  # the older and the newer name of one setting
        biases={"query": "attention.attention.q_bias", "key": None, "value": "attention.attention.v_bias"},
    ),
    "dinov2": Layout(
        models=("dinov2", "dinov2_with_registers"),
        root=r"dinov2.",
        patches="embeddings.patch_embeddings.projection",
        layer="encoder.layer.{}.",
        parts=(
            "norm1",
            *(f"attention.attention.{x}" for x in ("query", "key", "value")),
            *("attention.output.dense", "norm2", "mlp.fc1", "mlp.fc2"),
        ),
        norm="layernorm",
        unread=r"embeddings\.mask_token|classifier\..+",
        fixed={"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "qkv_bias": True}
        | {"use_swiglu_ffn": False},
    ),
    "dinov3": Layout(
        models=("dinov3_vit",),
        root="dinov3_vit.",
        patches="embeddings.patch_embeddings",
        layer="layer.{}.",
        parts=(
            "norm1",
            *(f"attention.{x}_proj" for x in ("q", "k", "v", "o")),
            *("norm2", "mlp.up_proj", "mlp.down_proj"),
        ),
        norm="norm",
        unread=r"embeddings\.mask_token|classifier\..+",
        fixed={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3, "rope_theta": 100.0}
        | {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
        | {"use_gated_mlp": False},
        biases={"key": None},
    ),
}


def import_teacher(
    family: str, source: str | os.PathLike
) -> tuple[TeacherConfig, dict[str, np.ndarray], list[pathlib.Path]]:
    """Reads a teacher network.

    Args:
      family: `vjepa2`, `videomae`, `dinov2` or `dinov3`.
      source: a folder with `config.json` and `model.safetensors` as transformers writes them; a safetensors file next
        to its `config.json`; or a repository of the Hugging Face hub, `owner/name[@revision]`.

    Returns:
      Its sizes; float32 parameters by path (`blocks/qkv/kernel`); and the files they were read from.

    Raises:
      InputError: a file is missing or damaged, a tensor is missing, not expected or of the wrong shape, or the network
        has a setting that is not supported.
    """
    layout, path = LAYOUTS[family], located(source)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file() or weights.suffix != ".safetensors":
        raise InputError(f"{weights} is not a safetensors file; give a folder with {CONFIG} and {WEIGHTS}")
    place = weights.parent / CONFIG
    with files.fetched(weights) as file:
        tensors = read_safetensors(file, f"({layout.root})?({layout.unread})")
    tensors = {name.removeprefix(layout.root): x for name, x in tensors.items()}
    config = read_config(family, read_settings(place), str(place))
    if config.depth > len(tensors):  # before creating the names of so many layers
        raise InputError(f"the weights do not fit {place}: {len(tensors)} tensors for {config.depth} layers")
    compare_shapes(_shapes(config, layout), {name: x.shape for name, x in tensors.items()}, str(place))
    return config, finished(_params(config, layout, tensors), str(weights)), [weights, place]


def known_name(config: TeacherConfig) -> str | None:
    """The name in `TEACHERS` of a network of these sizes, and None if it has none."""
    return next((name for name, known in TEACHERS.items() if known == config), None)


def read_config(family: str, values: Mapping[str, Any], where: str) -> TeacherConfig:
    """Sizes from the settings in config.json; `where` is that file, for messages. Errors as for `import_teacher`."""
    layout = LAYOUTS[family]
    if (model := values.get("model_type")) not in layout.models:
        raise InputError(f"{where}: model_type={model!r} is not {' or '.join(layout.models)}; check --kind")
    for name, value in layout.fixed.items():
        if (found := values.get(name, value)) != value:
            raise InputError(f"{where}: {name}={found!r} is not supported, only {value!r}")

    def integer(name: str, default: int | None = None) -> int:
        value = values.get(name, default)
        value = value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value
        if type(value) is not int or not 0 < value < 2**20:
            raise InputError(f"{where}: {name}={value!r} must be a positive whole number")
        return value

    width, patch = integer("hidden_size"), integer("patch_size")
    table, resolution, registers = (0, 0, 0), GRID * patch, 0
    if family == "vjepa2":
        resolution = integer("crop_size")
    if family == "videomae":
        resolution = integer("image_size")
        table = (integer("num_frames", 16) // 2, resolution // patch, resolution // patch)
    if family == "dinov2":
        table = (1, integer("image_size") // patch, integer("image_size") // patch)
    if family == "dinov3" or values["model_type"] == "dinov2_with_registers":
        registers = integer("num_register_tokens") if values.get("num_register_tokens") != 0 else 0
    if family in ("vjepa2", "dinov2"):
        ratio = values.get("mlp_ratio", 4)
        if type(ratio) not in (int, float) or not 0 < ratio < 2**10:
            raise InputError(f"{where}: mlp_ratio={ratio!r} must be a positive number")
        hidden = int(width * ratio)
    else:
        hidden = integer("intermediate_size")
    try:
        return TeacherConfig(
            family, width, integer("num_hidden_layers"), patch, integer("num_attention_heads"), hidden, resolution,
            table, registers, final_norm=family != "videomae" or values.get("use_mean_pooling") is False,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _shapes(config: TeacherConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a file by name, without its root."""
    width, patch, tubelet = config.width, config.patch, config.traits.tubelet
    window = (patch, patch) if tubelet == 1 else (tubelet, patch, patch)
    shapes: dict[str, tuple[int, ...]] = {f"{layout.patches}.weight": (width, 3, *window)}
    shapes[f"{layout.patches}.bias"] = (width,)
    for layer in map(layout.layer.format, range(config.depth)):
        for part, name in zip(LAYER_PARTS, layout.parts, strict=True):
            outputs, inputs = {"up": (config.hidden, width), "down": (width, config.hidden)}.get(part, (width, width))
            shapes[f"{layer}{name}.weight"] = (width,) if part.startswith("norm") else (outputs, inputs)
            bias = layout.biases.get(part, f"{name}.bias")
            shapes |= {f"{layer}{bias}": (outputs,)} if bias else {}
        if config.traits.dino:
            shapes |= {f"{layer}layer_scale{i}.lambda1": (width,) for i in (1, 2)}
    if config.final_norm:
        shapes |= {f"{layout.norm}.{part}": (width,) for part in ("weight", "bias")}
    if config.traits.dino:
        shapes["embeddings.cls_token"] = (1, 1, width)
    if config.registers:
        shapes["embeddings.register_tokens"] = (1, config.registers, width)
    if config.traits.positions == "learned":
        shapes["embeddings.position_embeddings"] = (1, 1 + config.table[1] * config.table[2], width)
    return shapes


def _params(config: TeacherConfig, layout: Layout, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by path, from tensors that have been checked."""
    patches = tensors[f"{layout.patches}.weight"].reshape(config.width, 3, -1, config.patch, config.patch)
    params = {
        "patches/proj/kernel": rearrange(patches, "o i t h w -> (t h w i) o"),
        "patches/proj/bias": tensors[f"{layout.patches}.bias"],
    }
    layers = [_layer(config, layout, layout.layer.format(i), tensors) for i in range(config.depth)]
    params |= {f"blocks/{path}": np.stack([layer[path] for layer in layers]) for path in layers[0]}
    if config.final_norm:
        params |= {"norm/scale": tensors[f"{layout.norm}.weight"], "norm/bias": tensors[f"{layout.norm}.bias"]}
    if config.traits.dino:
        prefix = [tensors["embeddings.cls_token"][0]]
        if config.traits.positions == "learned":
            positions = tensors["embeddings.position_embeddings"][0].astype(np.float32)
            prefix[0], params["table"] = prefix[0] + positions[:1], positions[1:]
        if config.registers:
            prefix.append(tensors["embeddings.register_tokens"][0])
        params["prefix"] = np.concatenate(prefix)
    return params


def _layer(
    config: TeacherConfig, layout: Layout, prefix: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Parameters of one block by path."""
    weights, biases = {}, {}
    for part, name in zip(LAYER_PARTS, layout.parts, strict=True):
        bias = layout.biases.get(part, f"{name}.bias")
        weights[part] = tensors[f"{prefix}{name}.weight"].T
        biases[part] = tensors[f"{prefix}{bias}"] if bias else np.zeros(config.width, np.float32)
    if config.traits.positions == "rotary_3d":  # pairs of neighboring channels, see `rotate`
        order = np.arange(config.width).reshape(config.heads, -1)[:, halves(config.width // config.heads)].reshape(-1)
        for part in ("query", "key"):
            weights[part], biases[part] = weights[part][:, order], biases[part][order]
    params = {
        "qkv/kernel": np.concatenate([weights[part] for part in ("query", "key", "value")], axis=1),
        "qkv/bias": np.concatenate([biases[part] for part in ("query", "key", "value")]),
    }
    for part, path in {"out": "out", "up": "mlp/up", "down": "mlp/down"}.items():
        params |= {f"{path}/kernel": weights[part], f"{path}/bias": biases[part]}
    for part in ("norm1", "norm2"):
        params |= {f"{part}/scale": weights[part], f"{part}/bias": biases[part]}
    if config.traits.dino:
        params |= {f"scale{i}": tensors[f"{prefix}layer_scale{i}.lambda1"] for i in (1, 2)}
    return params
