"""The condition of a generator: a class, the first frames of a clip, both, or neither."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import Conditional


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What a generator is given of each clip; a part that its configuration lacks is None.

    Attributes:
      classes: [B] int32, negative for the null class. A generator without any condition is given the null class.
      frames: [B, N] int32 in [0, K), codes of clips of which the first frames are known and the last known one is
        repeated, see `larp_jax.models.pixels.hold_last_frame`; negative where no frames are given. For a generator of
        latents these are latents, [B, N, d] float32, standardized as all others; NaN where no frames are given.
    """

    classes: jax.Array | np.ndarray | None = None
    frames: jax.Array | np.ndarray | None = None

    @classmethod
    def of_batch(cls, config: Conditional, batch: Mapping[str, jax.Array]) -> "Condition":
        """That of a batch with `label` [B] and, for given frames, `condition` [B, N] or [B, N, d]."""
        classes = None if config.given == "frames" else batch["label"]
        if config.given == "none":
            classes = jnp.full_like(classes, -1)
        return cls(classes, batch["condition"] if config.has_frames else None)

    @classmethod
    def zeros(cls, config: Conditional, rows: int) -> "Condition":
        """Class 0 and frames of zeros for this many rows; to compile and measure programs."""
        frames = np.zeros((rows, *config.token_shape), np.int32 if config.has_codes else np.float32)
        return cls.of_batch(config, {"label": np.zeros(rows, np.int32), "condition": frames})

    @property
    def rows(self) -> int:
        """B."""
        return len(self.frames if self.classes is None else self.classes)

    def without_class(self) -> "Condition":
        """The same frames with the null class, for guidance."""
        return dataclasses.replace(self, classes=jnp.full_like(self.classes, -1))

    @property
    def frames_given(self) -> jax.Array:
        """[B] bool, where frames are given."""
        first = self.frames.reshape(len(self.frames), -1)[:, 0]
        return first >= 0 if jnp.issubdtype(first.dtype, jnp.integer) else ~jnp.isnan(first)

    def without_frames(self) -> "Condition":
        """The same classes without frames, for guidance."""
        none = -1 if jnp.issubdtype(self.frames.dtype, jnp.integer) else jnp.nan
        return dataclasses.replace(self, frames=jnp.full_like(self.frames, none))
