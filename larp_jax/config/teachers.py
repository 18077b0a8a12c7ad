"""Sizes of the frozen teacher networks, by name.

Their features are targets of alignment and inputs of discriminators (EVATok, arXiv 2603.12267). A name is a kind of
network and a size, such as `vjepa2_l`. The weights of a size that is not listed are read by their path.
"""

import dataclasses
import math
from typing import Any

from larp_jax.config.checks import MOST_POSITIONS, one_of, require


@dataclasses.dataclass(frozen=True)
class TeacherFamily:
    """What all sizes of a kind of teacher have in common.

    Attributes:
      tubelet: frames of a patch; with 1, the network sees each frame by itself.
      positions: how patches know their place: `rotary_3d` and `rotary_2d` turn queries and keys, `sincos` is a fixed
        table, `learned` a trained one; `none` for convolutions.
      dino: whether there are a class token, a trained scale of each residual branch, and possibly registers.
      epsilon: of the layer norms.
    """

    tubelet: int
    positions: str
    dino: bool = False
    epsilon: float = 0.0


FAMILIES = {
    "vgg16": TeacherFamily(1, "none"),
    "vjepa2": TeacherFamily(2, "rotary_3d", epsilon=1e-6),
    "videomae": TeacherFamily(2, "sincos", epsilon=1e-12),
    "dinov2": TeacherFamily(1, "learned", dino=True, epsilon=1e-6),
    "dinov3": TeacherFamily(1, "rotary_2d", dino=True, epsilon=1e-5),
}


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A teacher network.

    Attributes:
      family: `vgg16`, `vjepa2`, `videomae`, `dinov2` or `dinov3`.
      width: channels of the features.
      depth: number of blocks; of `vgg16`, of the stages between its poolings.
      patch: height and width of a patch in pixels; of `vgg16`, the stride of its features.
      heads: attention heads.
      hidden: width of the MLPs.
      resolution: height and width in pixels that frames are resized to; 0 leaves them as they are.
      table: grid (time, height, width) of the position table of `videomae` and `dinov2`, which is interpolated for
        clips with another grid; zeros for others.
      registers: number of register tokens.
      final_norm: whether a layer norm follows the last block.
    """

    family: str
    width: int
    depth: int
    patch: int
    heads: int = 0
    hidden: int = 0
    resolution: int = 0
    table: tuple[int, int, int] = (0, 0, 0)
    registers: int = 0
    final_norm: bool = True

    def __post_init__(self):
        one_of("teacher.family", self.family, FAMILIES)
        for field in ("width", "depth", "patch"):
            require(getattr(self, field) > 0, f"teacher.{field} must be positive, got {getattr(self, field)}")
        if self.family != "vgg16":
            require(self.hidden > 0, f"teacher.hidden must be positive, got {self.hidden}")
            require(
                self.heads > 0 and self.width % (2 * self.heads) == 0,
                f"teacher.width={self.width} must be an even multiple of teacher.heads={self.heads}",
            )
        require(
            self.resolution >= 0 and self.resolution % self.patch == 0,
            f"teacher.resolution={self.resolution} must be a multiple of its patch of {self.patch} pixels, or 0",
        )
        if self.traits.positions in ("sincos", "learned"):
            require(min(self.table) > 0, f"teacher.table must be positive, got {list(self.table)}")
            places = math.prod(self.table)
            require(
                places <= MOST_POSITIONS,
                f"teacher.table={list(self.table)} has {places} places, above the limit of {MOST_POSITIONS}",
            )

    @property
    def traits(self) -> TeacherFamily:
        """What its family has in common."""
        return FAMILIES[self.family]

    def same_network(self, other: "TeacherConfig") -> bool:
        """Whether the weights of one fit the other: all but the resolution is equal."""
        return dataclasses.replace(self, resolution=other.resolution) == other


def teacher_from_dict(values: dict[str, Any]) -> TeacherConfig:
    """The inverse of `dataclasses.asdict`, for values from JSON; an error of any kind if they are not such values."""
    config = TeacherConfig(**(values | {"table": tuple(values["table"])}))
    types = {"family": str, "table": tuple, "final_norm": bool}
    for name, value in vars(config).items():
        if not isinstance(value, types.get(name, int)):
            raise TypeError(f"{name} is {value!r}")
    return config


def _vit(family: str, width: int, depth: int, heads: int, patch: int = 16, **options: Any) -> TeacherConfig:
    return TeacherConfig(family, width, depth, patch, heads, **({"hidden": 4 * width} | options))


# Resolutions: those of training, or for DINO the one that gives a grid of 16 x 16, which is that of the tokenizer.
TEACHERS = {
    "vgg16": TeacherConfig("vgg16", 512, 4, 8),
    "vjepa2_l": _vit("vjepa2", 1024, 24, 16, resolution=256),
    "vjepa2_h": _vit("vjepa2", 1280, 32, 16, resolution=256),
    "vjepa2_g": _vit("vjepa2", 1408, 40, 22, hidden=6144, resolution=256),
    "videomae_b": _vit("videomae", 768, 12, 12, resolution=224, table=(8, 14, 14)),
    "videomae_l": _vit("videomae", 1024, 24, 16, resolution=224, table=(8, 14, 14)),
}
_DINO = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
_DINOV2: dict[str, Any] = {"patch": 14, "resolution": 224, "table": (1, 37, 37)}
TEACHERS |= {f"dinov2_{size}": _vit("dinov2", *shape, **_DINOV2) for size, shape in _DINO.items()}
TEACHERS |= {f"dinov2_{size}_reg": _vit("dinov2", *shape, **_DINOV2, registers=4) for size, shape in _DINO.items()}
TEACHERS |= {f"dinov3_{size}": _vit("dinov3", *shape, resolution=256, registers=4) for size, shape in _DINO.items()}

# Repositories of the Hugging Face hub with weights of these sizes, by name.
REPOSITORIES = {
    "vjepa2_l": "facebook/vjepa2-vitl-fpc64-256",
    "vjepa2_h": "facebook/vjepa2-vith-fpc64-256",
    "vjepa2_g": "facebook/vjepa2-vitg-fpc64-256",
    "videomae_b": "MCG-NJU/videomae-base",
    "videomae_l": "MCG-NJU/videomae-large",
    "dinov2_s": "facebook/dinov2-small",
    "dinov2_b": "facebook/dinov2-base",
    "dinov2_l": "facebook/dinov2-large",
    "dinov2_s_reg": "facebook/dinov2-with-registers-small",
    "dinov2_b_reg": "facebook/dinov2-with-registers-base",
    "dinov2_l_reg": "facebook/dinov2-with-registers-large",
    "dinov3_s": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3_b": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3_l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
