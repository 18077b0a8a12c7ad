"""The clips of a model: frames of height x width pixels, and the patches that they divide into."""

from larp_jax.config.checks import require


class Clips:
    """What follows from the settings `frames`, `resolution` and `shape` of a model."""

    frames: int
    resolution: int
    shape: tuple[int, ...]

    def _settle_shape(self) -> None:
        """With a `shape`, makes `resolution` its shorter side; the shape of a square is left empty.

        Raises:
          InputError: the shape is not a height and a width.
        """
        if not self.shape:
            return
        sides = ",".join(map(str, self.shape))
        is_size = len(self.shape) == 2 and min(self.shape) > 0
        require(is_size, f"model.shape must be a height and a width such as 72,128, got {sides}")
        object.__setattr__(self, "resolution", min(self.shape))
        if self.shape[0] == self.shape[1]:
            object.__setattr__(self, "shape", ())

    def _check_patch(self, frames: str, size: str) -> None:
        """`InputError` unless clips divide into patches, of the settings with these names."""
        for whole, part in (("frames", frames), ("shape" if self.shape else "resolution", size)):
            value, patch = getattr(self, whole), getattr(self, part)
            sides = value if isinstance(value, tuple) else (value,)
            given = f"model.{whole}={','.join(map(str, sides))}"
            divides = all(side % patch == 0 for side in sides)
            require(divides, f"{given} is not divisible by model.{part}={patch}; change one of them")

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape [T, H, W, C] of a clip."""
        height, width = self.shape or (self.resolution, self.resolution)
        return self.frames, height, width, 3

    def _grid(self, patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """Number of patches (time, height, width) of a clip."""
        (frames, height, width, _), (pt, ph, pw) = self.clip_shape, patch
        return frames // pt, height // ph, width // pw
