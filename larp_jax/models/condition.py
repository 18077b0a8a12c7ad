"""The condition of a generator: a class, the first frames of a clip, both, or neither."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import GeneratorConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What a generator is given before the first code of each clip; a part that its configuration lacks is None.

    Attributes:
      classes: [B] int32, negative for the null class. A generator without any condition is given the null class.
      frames: [B, N] int32 in [0, K), codes of clips of which the first frames are known and the last known one is
        repeated, see `larp_jax.models.pixels.hold_last_frame`; negative where no frames are given.
    """

    classes: jax.Array | np.ndarray | None = None
    frames: jax.Array | np.ndarray | None = None

    @classmethod
    def of_batch(cls, config: GeneratorConfig, batch: Mapping[str, jax.Array]) -> "Condition":
        """That of a batch with `label` [B] and, for given frames, `condition` [B, N]."""
        classes = None if config.given == "frames" else batch["label"]
        if config.given == "none":
            classes = jnp.full_like(classes, -1)
        return cls(classes, batch["condition"] if config.has_frames else None)

    @classmethod
    def zeros(cls, config: GeneratorConfig, rows: int) -> "Condition":
        """Class 0 and code 0 for this many rows; to compile and measure programs."""
        codes = np.zeros((rows, config.num_tokens), np.int32)
        return cls.of_batch(config, {"label": codes[:, 0], "condition": codes})

    @property
    def rows(self) -> int:
        """B."""
        return len(self.frames if self.classes is None else self.classes)

    def without_class(self) -> "Condition":
        """The same frames with the null class, for guidance."""
        return dataclasses.replace(self, classes=jnp.full_like(self.classes, -1))

    def without_frames(self) -> "Condition":
        """The same classes without frames, for guidance."""
        return dataclasses.replace(self, frames=jnp.full_like(self.frames, -1))
