"""Reads an exported LARP tokenizer in PyTorch (arXiv 2410.21264, section 3.2): videos to codes, and codes to videos.

It takes what `larp-jax export --format huggingface` writes, a directory with `config.json` and `model.safetensors` in
the authors' layout. This file needs PyTorch and safetensors, and nothing else: neither JAX nor the rest of this
package, so it may also be copied next to a model.
"""

import json
import math
import os
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NONE = (None, "none", "no", "null", "")
_ARGS = "bottleneck.args.regularizer.args"

# Fields of config.json that the tokenizer is made of, with the released code's default where it has one.
SIZES = {
    "frame_num": 16,
    "input_size": 128,
    "in_channels": 3,
    "temporal_patch_size": 4,
    "patch_size": 8,
    "bottleneck_token_num": 1024,
    "encoder_hidden_size": 768,
    "encoder_depth": 6,
    "encoder_num_heads": 12,
    "decoder_hidden_size": 768,
    "decoder_depth": 6,
    "decoder_num_heads": 12,
    "bottleneck.args.bottleneck_dim": None,
    f"{_ARGS}.codebook_size": None,
}
SWITCHES = {
    "learned_encoder_patch_pe": False,
    "learned_encoder_latent_query_embed": True,
    "learned_decoder_latent_pe": False,
    "learned_decoder_patch_query_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_decoder_latent_token_type_embed": False,
    "use_decoder_patch_query_token_type_embed": False,
    f"{_ARGS}.l2_normalized": False,
}
# Fields that must have one of these values; the first is the default.
FIXED = {
    "bottleneck.name": ("bottleneck",),
    "bottleneck.args.norm": (*NONE, "ln_d_na", "ln_d", "ln_nd", "bn_bn"),
    "bottleneck.args.regularizer.name": ("vq",),
    "transformer_name": ("transformer_encoder_parallel",),
    "encoder_name": (*NONE, "transformer_encoder_parallel"),
    "decoder_name": (*NONE, "transformer_encoder_parallel"),
}
# Fields that matter in training only, or whose result is in the weights.
UNUSED = {
    "latent_pe_scale_factor",
    "query_init_std",
    "encoder_query_gaussian_init",
    f"{_ARGS}.commitment_loss_weight",
    f"{_ARGS}.codebook_loss_weight",
    f"{_ARGS}.entropy_loss_weight",
    f"{_ARGS}.entropy_loss_temperature",
    f"{_ARGS}.stochastic",
    f"{_ARGS}.stochastic_temperature",
}
# Names of learned tables of patch positions, without "_embed"; sic: "encode_w".
ENCODER_AXES, DECODER_AXES = ("encoder_t", "encoder_h", "encode_w"), ("decoder_t", "decoder_h", "decoder_w")
UNREAD = ("bottleneck.regularizer.stochastic_temperature_inv", "bottleneck.norm_layer.num_batches_tracked")


def load_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """Loads an exported tokenizer, on the CPU in float32; `.to("cuda")` moves it.

    Args:
      path: the directory.

    Raises:
      ValueError: the directory holds no tokenizer, or one with options that this reader does not know.
    """
    folder = pathlib.Path(path)
    config = read_config(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({str(error).splitlines()[0]})") from error
    tensors = {
        name: x.float() for name, x in tensors.items() if name not in UNREAD and not name.startswith("prior_model.")
    }
    if max(config["encoder_depth"], config["decoder_depth"]) > len(tensors):
        raise ValueError(f"{folder}: {CONFIG} does not describe {WEIGHTS}, which has too few layers")
    with torch.device("meta"):  # without memory, whatever the sizes are
        tokenizer = Tokenizer(config)
    wanted = {name: tuple(x.shape) for name, x in tokenizer.state_dict().items() if name not in UNREAD}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            said = f"{name} is {found.get(name, 'missing')}, and {CONFIG} asks for {wanted.get(name, 'no such tensor')}"
            raise ValueError(f"{folder}: {CONFIG} does not describe {WEIGHTS}: {said}")
    tokenizer.load_state_dict(tensors, strict=False, assign=True)  # all but UNREAD, as just checked
    return tokenizer.requires_grad_(False).eval()


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of `SIZES`, `SWITCHES` and `FIXED` of a `config.json`, by dotted name.

    Raises:
      ValueError: it cannot be read, a field is missing or not known, or has a value that this reader does not know.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text("utf-8"))
        values.pop("prior_model", None)
        given = _flat(values)
    except (OSError, ValueError, AttributeError) as error:
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} is no configuration of a tokenizer ({said})") from error
    if "bottleneck.args.regularizer.name" not in given:
        raise ValueError(f"{path} is no configuration of a tokenizer: it has no bottleneck")
    known = SIZES | SWITCHES | {name: allowed[0] for name, allowed in FIXED.items()}
    found = {name: given.pop(name, default) for name, default in known.items()}
    for kind in ("temporal_patch_size", "patch_size"):
        if (theirs := given.pop(f"decoder_{kind}", found[kind])) != found[kind]:
            raise ValueError(f"{path}: decoder_{kind}={theirs!r} must equal {kind}={found[kind]!r}")
    for name in given:
        if name not in UNUSED:
            raise ValueError(f"{path}: {name}={given[name]!r} is not known to this reader")
    for name, value in found.items():
        lower = value.lower() if isinstance(value, str) else value
        if name in SIZES and not (type(value) is int and value > 0):
            raise ValueError(f"{path}: {name} must be a positive integer, got {value!r}")
        if name in SWITCHES and type(value) is not bool:
            raise ValueError(f"{path}: {name} must be true or false, got {value!r}")
        if name in FIXED and lower not in FIXED[name]:
            what = "has no codes" if lower == "skl" else "is not known to this reader"
            raise ValueError(f"{path}: {name}={value!r} {what}; it must be {' or '.join(map(repr, FIXED[name]))}")
    for size, unit in (("frame_num", "temporal_patch_size"), ("input_size", "patch_size"),
                       ("encoder_hidden_size", "encoder_num_heads"), ("decoder_hidden_size", "decoder_num_heads")):
        if found[size] % found[unit]:
            raise ValueError(f"{path}: {size}={found[size]} must be a multiple of {unit}={found[unit]}")
    return found


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), over [B, N, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> the same shape."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def _transformer(width: int, depth: int, heads: int) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.Sequential(*(Block(width, heads) for _ in range(depth)))})


class Tokenizer(nn.Module):
    """A tokenizer whose parameters have the names of the authors' layout.

    Args:
      config: from `read_config`.

    Attributes:
      clip_shape: (T, H, W, C) of the videos.
      num_tokens: N, the number of codes of a clip.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        c = self._config = config
        frames, size, channels = c["frame_num"], c["input_size"], c["in_channels"]
        pt, p = c["temporal_patch_size"], c["patch_size"]
        width, out, dim = c["encoder_hidden_size"], c["decoder_hidden_size"], c["bottleneck.args.bottleneck_dim"]
        self.clip_shape, self.num_tokens = (frames, size, size, channels), c["bottleneck_token_num"]
        self._patch, self._grid = (pt, p, p), (frames // pt, size // p, size // p)
        # a convolution whose kernel is its stride, over frames alone if a patch is in one frame
        self.x_embedder = nn.ModuleDict({
            "proj": (nn.Conv3d if pt > 1 else nn.Conv2d)(channels, width, (pt, p, p) if pt > 1 else (p, p))
        })  # fmt: skip
        self._table("encoder_patch_pe", "learned_encoder_patch_pe", width, ENCODER_AXES)
        self._table("decoder_patch_query_embed", "learned_decoder_patch_query_embed", out, DECODER_AXES)
        self.encoder_latent_query_embed = nn.Parameter(torch.empty(self.num_tokens, width))
        self.decoder_latent_pe = nn.Parameter(torch.empty(1, self.num_tokens, out))
        for place, size in {"encoder_patch": width, "encoder_latent_query": width, "decoder_latent": out,
                            "decoder_patch_query": out}.items():  # fmt: skip
            name = f"{place}_token_type_embed"
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, size)) if c[f"use_{name}"] else None)
        self.encoder = _transformer(width, c["encoder_depth"], c["encoder_num_heads"])
        self.decoder = _transformer(out, c["decoder_depth"], c["decoder_num_heads"])
        norms = {"ln_d": lambda: nn.LayerNorm(dim), "ln_nd": lambda: nn.LayerNorm((self.num_tokens, dim)),
                 "bn_bn": lambda: nn.BatchNorm1d(dim)}  # fmt: skip
        self.bottleneck = nn.ModuleDict({
            "in_linear": nn.Linear(width, dim),
            "out_linear": nn.Linear(dim, out),
            "regularizer": nn.ModuleDict({"embedding": nn.Embedding(c[f"{_ARGS}.codebook_size"], dim)}),
        })  # fmt: skip
        norm = c["bottleneck.args.norm"]
        self._norm = norm.lower() if isinstance(norm, str) else norm
        if self._norm in norms:
            self.bottleneck["norm_layer"] = norms[self._norm]()
        self.final_layer = nn.ModuleDict({
            "norm_final": nn.LayerNorm(out, eps=1e-6), "linear": nn.Linear(out, pt * p * p * channels)
        })  # fmt: skip

    def _table(self, name: str, switch: str, width: int, axes: tuple[str, str, str]) -> None:
        """Registers a table of patch positions: one fixed, or one learned for each of time, height and columns."""
        if not self._config[switch]:
            self.register_parameter(name, nn.Parameter(torch.empty(1, math.prod(self._grid), width)))
            return
        for place, (axis, length) in enumerate(zip(axes, self._grid, strict=True)):
            shape = [length if i == place else 1 for i in range(3)]
            self.register_parameter(f"{axis}_embed", nn.Parameter(torch.empty(1, *shape, width)))

    def _positions(self, name: str, axes: tuple[str, str, str]) -> torch.Tensor:
        if hasattr(self, name):
            return getattr(self, name)
        t, h, w = (getattr(self, f"{axis}_embed") for axis in axes)
        return (t + h + w).flatten(1, 3)

    def _typed(self, x: torch.Tensor, place: str) -> torch.Tensor:
        kind = getattr(self, f"{place}_token_type_embed")
        return x if kind is None else x + kind

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors, [K, d] float32, of unit length if the tokenizer normalizes them."""
        codes = self.bottleneck["regularizer"]["embedding"].weight
        return F.normalize(codes, dim=-1, eps=1e-12) if self._config[f"{_ARGS}.l2_normalized"] else codes

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Videos [B, T, H, W, C], uint8 or float in [0, 1] -> codes [B, N] int64.

        Raises:
          ValueError: the shape or the dtype is another.
        """
        if tuple(video.shape[1:]) != self.clip_shape or not (video.dtype == torch.uint8 or video.is_floating_point()):
            shape = ", ".join(map(str, self.clip_shape))
            raise ValueError(f"video must be uint8 or float [B, {shape}], got {video.dtype} {list(video.shape)}")
        codebook, embed = self.codebook, self.x_embedder["proj"]
        video = (video / 255 if video.dtype == torch.uint8 else video).to(codebook)
        (t, h, w), (pt, p, _) = self._grid, self._patch
        patches = video.reshape(-1, t, pt, h, p, w, p, video.shape[-1]).permute(0, 1, 3, 5, 7, 2, 4, 6)
        # as a matrix product, because convolutions are rounded to TF32 on some GPUs
        x = F.linear(patches.reshape(len(video), t * h * w, -1), embed.weight.flatten(1), embed.bias)
        x = self._typed(x + self._positions("encoder_patch_pe", ENCODER_AXES), "encoder_patch")
        queries = self._typed(self.encoder_latent_query_embed[None], "encoder_latent_query")
        x = torch.cat([x, queries.expand(len(x), -1, -1)], dim=1)
        z = self.bottleneck["in_linear"](self.encoder["blocks"](x)[:, -self.num_tokens :])
        if self._norm == "bn_bn":
            z = self.bottleneck["norm_layer"](z.flatten(0, 1)).view_as(z)
        elif "norm_layer" in self.bottleneck:
            z = self.bottleneck["norm_layer"](z)
        if self._config[f"{_ARGS}.l2_normalized"]:
            return (F.normalize(z, dim=-1, eps=1e-12) @ codebook.T).argmax(dim=-1)
        return (2 * z @ codebook.T - codebook.square().sum(dim=-1)).argmax(dim=-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, N], integers in [0, K) -> videos [B, T, H, W, C] float32 in [0, 1].

        Raises:
          ValueError: the shape, the dtype or a code is another.
        """
        codebook = self.codebook
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens or codes.is_floating_point():
            raise ValueError(f"codes must be integers [B, {self.num_tokens}], got {codes.dtype} {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(codebook):
            raise ValueError(f"codes must be in [0, {len(codebook)})")
        x = self.bottleneck["out_linear"](codebook[codes.to(codebook.device, torch.int64)])
        x = self._typed(x + self.decoder_latent_pe, "decoder_latent")
        queries = self._typed(self._positions("decoder_patch_query_embed", DECODER_AXES), "decoder_patch_query")
        x = self.decoder["blocks"](torch.cat([x, queries.expand(len(x), -1, -1)], dim=1))[:, self.num_tokens :]
        x = self.final_layer["linear"](self.final_layer["norm_final"](x))
        x = x.unflatten(-1, (*self._patch, -1)).unflatten(1, self._grid).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(-1, *self.clip_shape).clamp(0, 1)
