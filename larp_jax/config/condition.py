"""What configurations of generators have in common: what a generator is given, and what the parts of it are."""


class Conditional:
    """The properties of a generator's configuration that tell its condition.

    A generator of codes (`GeneratorConfig`) and one of continuous latents (`FlowConfig`) are given the same things.
    """

    num_classes: int
    class_dropout: float
    frames_dropout: float

    @property
    def given(self) -> str:
        """The condition by its name: `class`, `frames`, `class+frames` or `none`."""
        raise NotImplementedError

    @property
    def has_codes(self) -> bool:
        """Whether it samples codes, and not continuous latents; the same as that of the tokenizer's quantizer."""
        raise NotImplementedError

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of what it samples for a clip, without the clips."""
        raise NotImplementedError

    @property
    def has_classes(self) -> bool:
        """Whether the generator is given a class."""
        return "class" in self.given

    @property
    def has_frames(self) -> bool:
        """Whether the generator is given the first frames."""
        return "frames" in self.given

    @property
    def has_null_class(self) -> bool:
        """Whether the class may be left out, which guidance needs."""
        return self.has_classes and self.class_dropout > 0

    @property
    def has_null_frames(self) -> bool:
        """Whether the given frames may be left out, which their guidance needs."""
        return self.has_frames and self.frames_dropout > 0

    @property
    def class_rows(self) -> int:
        """Rows of the class table: the classes, and last the null class; it alone without any condition."""
        if self.given == "none":
            return 1
        return self.num_classes + self.has_null_class if self.has_classes else 0
