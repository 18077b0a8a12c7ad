"""The one-line text that names a data set."""

import dataclasses
import difflib
import os
import re

from larp_jax.errors import InputError

FORMS = "tfds:NAME[/CONFIG][:SPLIT], folder:PATH or moving_shapes[/CONFIG][:SPLIT]"
# A split as TFDS writes it: train, train[:10%], train+test. A name may be the path of a data set's own folder.
_NAME_AND_SPLIT = re.compile(
    r"(?P<name>.+?)(?::(?P<split>[A-Za-z]\w*(?:\[[^\]]*\])?(?:\+[A-Za-z]\w*(?:\[[^\]]*\])?)*))?"
)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """A parsed data set.

    Attributes:
      kind: "folder", "tfds", "moving_shapes", or "tokens" for codes in place of videos.
      name: path of the folder (of videos or of codes); NAME[/CONFIG] of the TFDS data set; CONFIG of moving_shapes,
        which may be empty.
      split: the TFDS split; empty if the text names none.
    """

    kind: str
    name: str
    split: str = ""

    def __str__(self):
        """The text again; parsing it gives an equal value."""
        name = f"/{self.name}" if self.kind == "moving_shapes" and self.name else self.name
        separator = "" if self.kind == "moving_shapes" else ":"
        return f"{self.kind}{separator}{name}" + (f":{self.split}" if self.split else "")


def parse_spec(text: str) -> DataSpec:
    """Reads `tfds:NAME[/CONFIG][:SPLIT]`, `folder:PATH`, `moving_shapes[/CONFIG][:SPLIT]` or `tokens:PATH`.

    PATH is taken as it is, colons included; a leading ~ is the home folder.

    Raises:
      InputError: the text is none of these; the message names the nearest.
    """
    kind, colon, rest = text.partition(":")
    if kind in ("folder", "tokens") and rest:
        return DataSpec(kind, os.path.expanduser(rest))
    if kind == "tfds" and (match := _NAME_AND_SPLIT.fullmatch(rest)) and match["name"].strip("/"):
        return DataSpec("tfds", match["name"].rstrip("/"), match["split"] or "")
    if kind.partition("/")[0] == "moving_shapes" and (not colon or rest):
        match = _NAME_AND_SPLIT.fullmatch(text)
        head, slash, config = match["name"].partition("/")
        if head == "moving_shapes" and bool(slash) == bool(config):
            return DataSpec("moving_shapes", config, match["split"] or "")
    raise InputError(f"data {text!r} is not {FORMS}; {_suggestion(text, kind, rest)}")


def _suggestion(text: str, kind: str, rest: str) -> str:
    if kind in ("folder", "tfds", "tokens"):
        return f"write a name after {kind}:"
    if os.path.isdir(os.path.expanduser(text)):
        return f"did you mean {f'folder:{text}'!r}?"
    known = {"folder": f"folder:{rest or 'PATH'}", "tfds": f"tfds:{rest or 'NAME'}", "moving_shapes": "moving_shapes"}
    near = difflib.get_close_matches(kind.partition("/")[0].lower(), known, n=1, cutoff=0.0)
    return f"did you mean {known[near[0]]!r}?"
