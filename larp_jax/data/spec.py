"""Specs: one-line texts that name data sets."""

import contextlib
import dataclasses
import difflib
import math
import os
import pathlib
import re

import numpy as np

from larp_jax import files, storage
from larp_jax.data.video import EXTENSIONS, IMAGES
from larp_jax.errors import InputError

FORMS = "tfds:NAME[/CONFIG][:SPLIT], folder:PATH or moving_shapes[/CONFIG][:SPLIT], or several as A+B or 0.7*A+0.3*B"
# A split in the syntax of TFDS: train, train[:10%], train+test. A name may be the path of a data set's folder.
_NAME_AND_SPLIT = re.compile(
    r"(?P<name>.+?)(?::(?P<split>[A-Za-z]\w*(?:\[[^\]]*\])?(?:\+[A-Za-z]\w*(?:\[[^\]]*\])?)*))?"
)
# A + joins data sets only if another one follows: names of folders and splits may contain it too.
_KIND = r"(?:tfds:|folder:|moving_shapes(?:[:/+]|$))"
_JOINT = re.compile(rf"\+(?=(?:[\d.]+\*)?{_KIND})")
_WEIGHT = re.compile(rf"(?P<weight>[\d.]+)\*(?={_KIND})")
_BEGINNING = re.compile(rf"(?:[\d.]+\*)?(?:(?:tfds|folder|tokens|rewards|features)(?::|$)|{_KIND})")
# Kinds of folders that this program writes.
WRITTEN = ("tokens", "rewards", "features")
# Suffixes of lists of videos, the inputs of `larp-jax prepare`.
LISTS = (".csv", ".txt")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """A parsed data set.

    Attributes:
      kind: "folder", "tfds", "moving_shapes", "mixture", "tokens" for codes instead of videos, or "rewards" or
        "features".
      name: path of the folder (of videos, codes, ...); NAME[/CONFIG] or path of the TFDS data set; CONFIG of
        moving_shapes, which may be empty.
      split: the TFDS split; empty if the text names none.
      parts: the data sets of a mixture, at least two.
      weights: how often training samples from each part, in any unit; empty: proportional to their lengths.
    """

    kind: str
    name: str
    split: str = ""
    parts: tuple["DataSpec", ...] = ()
    weights: tuple[float, ...] = ()

    def __str__(self):
        """The text of the spec; parsing it returns an equal value."""
        if self.kind == "mixture":
            factors = [f"{np.format_float_positional(weight)}*" for weight in self.weights] or [""] * len(self.parts)
            return "+".join(f"{factor}{part}" for factor, part in zip(factors, self.parts, strict=True))
        name = f"/{self.name}" if self.kind == "moving_shapes" and self.name else self.name
        separator = "" if self.kind == "moving_shapes" else ":"
        return f"{self.kind}{separator}{name}" + (f":{self.split}" if self.split else "")


def parse_spec(text: str) -> DataSpec:
    """Parses `tfds:NAME[/CONFIG][:SPLIT]`, `folder:PATH`, `moving_shapes[/CONFIG][:SPLIT]`, or several joined by +.

    `tokens:PATH` names codes written by `larp-jax tokenize`, `rewards:PATH` those of `larp-jax allocate`, and
    `features:PATH` clips with features, of `larp-jax features`. PATH is used unchanged, including colons; a leading ~
    is the home folder. NAME may be the folder of a data set, such as one written by `larp-jax prepare`. In the mixture
    `A+B`, the two data sets are one list; in `0.7*A+0.3*B`, seven of ten clips are from A.

    Raises:
      InputError: the text has none of these forms; the message suggests the nearest one.
    """
    texts = _JOINT.split(text)
    matches = [_WEIGHT.match(part) for part in texts]
    if len(texts) == 1 and not any(matches):
        return _parse_one(text)
    if len(texts) == 1:
        raise InputError(f"data {text!r} gives a weight to a single data set; leave it out, or add a data set with +")
    parts = tuple(_parse_one(part[match.end() if match else 0 :]) for part, match in zip(texts, matches, strict=True))
    if not any(matches):
        return DataSpec("mixture", "", parts=parts)
    try:
        weights = tuple(float(match["weight"]) if match else 0.0 for match in matches)
    except ValueError:
        weights = (0.0,)
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"data {text!r}: give every part a positive weight, as in 0.7*A+0.3*B, or none of them")
    return DataSpec("mixture", "", parts=parts, weights=weights)


def _parse_one(text: str) -> DataSpec:
    kind, colon, rest = text.partition(":")
    if kind in ("folder", *WRITTEN, "tfds"):
        storage.refuse_url(rest, "data", allowed=(storage.SCHEME,) if kind in WRITTEN else ())
    elif "://" in text:
        storage.refuse_url(text, "data")
    if kind in ("folder", *WRITTEN) and rest:
        return DataSpec(kind, os.path.expanduser(rest))
    if kind == "tfds" and (match := _NAME_AND_SPLIT.fullmatch(rest)) and match["name"].strip("/"):
        return DataSpec("tfds", match["name"].rstrip("/"), match["split"] or "")
    shapes = kind.partition("/")[0] == "moving_shapes" and (not colon or rest)
    if shapes and (match := _NAME_AND_SPLIT.fullmatch(text)):
        head, slash, config = match["name"].partition("/")
        if head == "moving_shapes" and bool(slash) == bool(config):
            return DataSpec("moving_shapes", config, match["split"] or "")
    raise InputError(f"data {text!r} is not {FORMS}; {_suggestion(text, kind, rest)}")


def spec_of(text: str) -> DataSpec | None:
    """`parse_spec` of a text that may also be a path; None if it is not a spec.

    Raises:
      InputError: the text begins like a spec, but is not a valid one.
    """
    try:
        return parse_spec(text)
    except InputError:
        if _BEGINNING.match(text) and not os.path.exists(text):
            raise
        return None


def _suggestion(text: str, kind: str, rest: str) -> str:
    if kind in ("folder", "tfds", *WRITTEN):
        return f"write a name after {kind}:"
    if not text:
        return "give the name of one"
    known = {"folder": f"folder:{rest or 'PATH'}", "tfds": f"tfds:{rest or 'NAME'}", "moving_shapes": "moving_shapes"}
    near = difflib.get_close_matches(kind.partition("/")[0].lower(), known, n=1)
    path, _, split = text.rpartition(":")
    for candidate, form in ((text, text), (path, f"{path}:{split}")):
        if candidate and (found := advice(candidate, form)):
            return found
    if near:
        return f"did you mean {known[near[0]]!r}?"
    if rest.startswith("//"):
        return f"{kind!r} is not supported, give a path on this machine"
    if text[0] in "/.~" or "/" in text or os.path.splitext(text)[1].lower() in {*LISTS, *EXTENSIONS}:
        return f"there is no file or folder {text!r}"
    return f"did you mean {f'tfds:{text}'!r}?"


def advice(path: str | os.PathLike, form: str = "") -> str:
    """The end of a message: how to give a file or folder as data. Empty if the path does not exist.

    Args:
      path: a file or a folder.
      form: the path as given by the user, possibly followed by a split.
    """
    place = pathlib.Path(path)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        place = place.expanduser()
        form = form or str(path)
        if place.is_dir():
            return _advice_on_folder(place, form, str(path))
        if place.suffix.lower() in LISTS and place.is_file():
            return f"{path} is a list: run larp-jax prepare --input {path} --output DIR, then give tfds:DIR"
        if place.suffix.lower() in EXTENSIONS and place.is_file():
            return f"{path} is a single video: give its folder, {f'folder:{place.parent}'!r}"
        if place.suffix.lower() in IMAGES and place.is_file():
            return f"{path} is a single picture: give the folder of its video, {f'folder:{place.parent}'!r}"
        if place.exists():
            return f"{path} is neither a video ({' '.join(sorted(EXTENSIONS))}) nor a list (.csv, .txt)"
    return ""


def contents(folder: pathlib.Path) -> str:
    """What a folder contains in place of videos: "codes", "latents", "rewards", "features", "a TFDS data set" (as
    `larp-jax prepare` writes), "checkpoints" or "lists" (of UCF101); empty if none of these.
    """
    manifest = files.json_object(folder / "manifest.json")
    kind = str(manifest.get("format")).removeprefix("larp_jax.")
    if kind in ("codes", *WRITTEN):
        return "latents" if kind == "codes" and "d" in manifest else kind
    if any(next(iter(folder.glob(f"{above}features.json")), None) for above in ("", "*/", "*/*/")):
        return "a TFDS data set"
    if (folder / "checkpoints").is_dir() or (folder / "metadata").is_dir():
        return "checkpoints"
    return "lists" if (folder / "classInd.txt").exists() else ""


def _advice_on_folder(folder: pathlib.Path, form: str, path: str) -> str:
    if found := contents(folder):
        spec = f"{found if found in WRITTEN else 'tokens'}:{path}"
        cures = {
            "a TFDS data set": f"did you mean {f'tfds:{form}'!r}?",
            "checkpoints": "give videos",
            "lists": f"run larp-jax prepare --input {path} --output DIR, then give tfds:DIR",
        }
        return f"{path} contains {found}: {cures.get(found) or f'did you mean {spec!r}?'}"
    if form == path:
        return f"did you mean {f'folder:{path}'!r}?"
    split = form.removeprefix(f"{path}:")
    return f"did you mean {f'folder:{path}'!r}, or {f'folder:{path}/{split}'!r} for a split?"
