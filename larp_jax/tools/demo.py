"""What the page of `larp-jax demo` computes: clips and their codes, maps of codes, swaps and samples.

Nothing here knows of the page, which is `larp_jax.tools.demo_page`.
"""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from larp_jax.api import LoadedGenerator, LoadedTokenizer
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs, playable_fps
from larp_jax.errors import InputError
from larp_jax.inference.stream import Stream
from larp_jax.metrics import SMALLEST_MSE
from larp_jax.models.pixels import to_uint8
from larp_jax.runtime import rng
from larp_jax.tools.analysis import ROWS, colored, effective_share, measure, scaled

SAMPLES = 4
MOST_FRAMES = 512  # of a stream on the page, which keeps them

FILL = "those of the clip mirrored, upside down, played backward, and in inverted colors"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip with its codes, or latents, and its reconstruction.

    Attributes:
      name: file name of its video.
      fps: frames per second, for playing it.
      number: which clip of its video it is, from 0.
      count: how many clips the video has, by its header.
      video: uint8 [T, H, W, 3].
      codes: [n] int32, or latents [n, d] float32.
      lengths: how many of them each block of frames has, if the tokenizer has a ladder.
      reconstruction: uint8 [T, H, W, 3].
      psnr: of the reconstruction before it was rounded, in dB.
    """

    name: str
    fps: float
    number: int
    count: int
    video: np.ndarray
    codes: np.ndarray
    lengths: tuple[int, ...] | None
    reconstruction: np.ndarray
    psnr: float


@dataclasses.dataclass(frozen=True)
class Maps:
    """Where the clip changes when the code or latent of a position is replaced, see `Demo.maps`.

    Attributes:
      patches: mean squared changes [n, t, h, w], by decoder patch.
      frames: mean squared changes [n, T].
    """

    patches: np.ndarray
    frames: np.ndarray

    def facts(self, position: int) -> dict[str, float]:
        """`change`, `space` and `time` of a position, defined as in `larp_jax.tools.analysis.DEFINITIONS`."""
        place = self.patches[position].sum(axis=0).reshape(1, -1)
        return {
            "change": float(self.patches[position].mean()),
            "space": float(effective_share(place)[0]),
            "time": float(effective_share(self.frames[position][None])[0]),
        }

    def tiles(self) -> np.ndarray:
        """One small map of each position, over space: uint8 [n, h, w, 3], each scaled to its own maximum."""
        return np.stack([colored(scaled(place)) for place in self.patches.mean(axis=1)])

    def over(self, video: np.ndarray, position: int) -> np.ndarray:
        """The map of a position drawn over frames: uint8 [T, H, W, 3], bright where the clip changes."""
        heat = scaled(self.patches[position])
        for axis, length in enumerate(video.shape[:3]):
            heat = np.repeat(heat, length // heat.shape[axis], axis=axis)
        gray = np.repeat(video.mean(axis=-1, keepdims=True) * 0.6, 3, axis=-1)
        colors = np.stack([colored(frame) for frame in heat])
        share = 0.85 * heat[..., None]
        return to_uint8(((1.0 - share) * gray + share * colors) / 255.0)


class Demo:
    """A tokenizer, and maybe a generator, with what the page does with them.

    Where the tokenizer has continuous latents, these take the place of codes.

    Args:
      tokenizer: the tokenizer, on the default device.
      generator: a generator for it, which can sample without given frames.

    Attributes:
      tokenizer: as given.
      generator: as given.

    Raises:
      InputError: the generator does not fit the tokenizer or needs given frames.
    """

    def __init__(self, tokenizer: LoadedTokenizer, generator: LoadedGenerator | None = None):
        if generator is not None:
            generator.check_tokenizer(tokenizer)
            config = generator.config
            if config.has_frames and not config.has_null_frames:
                raise InputError("this generator needs given frames, and the page samples without: give another")
        self.tokenizer, self.generator = tokenizer, generator

        def measured(params, batch, keep, lengths):
            return measure(tokenizer.module(params), batch, keep, lengths)

        self._measure = jax.jit(measured)

    @property
    def budgets(self) -> list[str]:
        """Uniform budgets to choose from, the fewest codes first; empty without a ladder."""
        ladder = self.tokenizer.config.adaptive
        return [str(sum(assignment)) for assignment in ladder.uniform] if ladder else []

    @property
    def streams(self) -> bool:
        """Whether the generator can sample streams."""
        config = self.generator.config if self.generator else None
        return config is not None and bool(config.ladder or config.has_frames)

    @property
    def smallest(self) -> tuple[int, ...]:
        """The fewest codes of each block; empty without a ladder."""
        ladder = self.tokenizer.config.adaptive
        return ladder.uniform[0] if ladder else ()

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Names and numbers of the generator's classes, with -1 for any; empty without classes."""
        config = self.generator.config if self.generator else None
        if config is None or not config.has_classes:
            return []
        names = dict(enumerate(self.generator.class_names))
        found = [(f"{i} {names[i]}" if names.get(i) else str(i), i) for i in range(config.num_classes)]
        return [("any class", -1), *found] if config.has_null_class else found

    def read(self, path: str | os.PathLike, number: int = 0, budget: str | None = None) -> Clip:
        """Reads a clip of a video or a picture, and encodes and decodes it.

        Args:
          path: the file.
          number: which clip, from 0; clips do not overlap.
          budget: how many codes, as for `LoadedTokenizer.assign`; only for tokenizers with a ladder.

        Raises:
          InputError: the video cannot be read or has no such clip, or the budget does not fit. The message has the name
            of the file without its folder.
        """
        tokenizer, path = self.tokenizer, pathlib.Path(path)
        config = tokenizer.config
        spec = ClipSpec.of(config.clip_shape, fps=tokenizer.fps, stride=tokenizer.stride)
        try:
            (video,) = Inputs(str(path), spec).videos
            found = next(itertools.islice(video.read(), number, None), None)
        except InputError as error:
            raise InputError(str(error).replace(str(path), path.name)) from error
        if found is None:
            raise InputError(f"{path.name} ends before its clip {number + 1}; choose an earlier one")
        frames = found[1]
        codes, lengths = self.encode(frames, budget or None)
        decoded = self._decoded(codes[None], lengths)[0]
        error = np.mean(np.square(decoded - frames / np.float32(255)), dtype=np.float64)
        psnr = -10.0 * float(np.log10(max(error, SMALLEST_MSE)))
        fps = playable_fps(video.fps)
        return Clip(path.name, fps, number, video.windows, frames, codes, lengths, to_uint8(decoded), psnr)

    def encode(
        self, video: np.ndarray, budget: str | Sequence[int] | None = None
    ) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """A clip [T, H, W, 3] as its `Clip.codes`, and their numbers by block of frames with a ladder."""
        given = self.tokenizer.assign(video[None], budget)
        if given is None:
            return np.asarray(self.tokenizer.encode(video[None]))[0], None
        codes, _ = self.tokenizer.encode(video[None], budget=given)
        lengths = tuple(given[0].tolist())
        return np.asarray(codes)[0, : sum(lengths)], lengths

    def decode(self, codes: np.ndarray, lengths: tuple[int, ...] | None = None) -> np.ndarray:
        """Codes as `encode` returns them -> uint8 [T, H, W, 3]."""
        return to_uint8(self._decoded(codes[None], lengths)[0])

    def swap(self, clip: Clip, other: Clip, positions: Sequence[int]) -> np.ndarray:
        """The clip decoded with the codes of another at some positions: uint8 [T, H, W, 3].

        If the two have different numbers of codes, the other is encoded again with those of the clip.
        """
        codes, theirs = clip.codes.copy(), other.codes
        if other.lengths != clip.lengths:
            theirs, _ = self.encode(other.video, clip.lengths)
        codes[list(positions)] = theirs[list(positions)]
        return self.decode(codes, clip.lengths)

    def maps(self, clip: Clip) -> Maps:
        """Where the decoded clip changes when one code is replaced, for each position: as `larp-jax analyze` measures.

        A code is replaced by those of four variants of the clip at the same position, see `FILL`.
        """
        video, tokenizer = clip.video, self.tokenizer
        forms = np.stack([video[:, :, ::-1], video[:, ::-1], video[::-1], 255 - video])
        fill = np.stack([self.encode(form, clip.lengths)[0] for form in forms])
        batch = {"codes": np.broadcast_to(clip.codes, fill.shape), "fill": fill}
        batch = {name: self._padded(x) for name, x in batch.items()}
        batch |= {"video": np.broadcast_to(video, forms.shape), "mask": np.ones(len(forms), np.float32)}
        lengths = None if clip.lengths is None else np.asarray(clip.lengths, np.int32)
        keep = self._padded(~np.eye(len(clip.codes), dtype=bool), value=True)
        keep = np.concatenate([keep, np.ones((-len(keep) % ROWS, keep.shape[1]), bool)])
        patches, frames = [], []
        for start in range(0, len(keep), ROWS):
            with rng.pinned(), jax.default_matmul_precision("float32"):
                found = self._measure(tokenizer.params, batch, keep[start : start + ROWS], lengths)
            _, by_patch, by_frame = jax.device_get(found)
            patches.append(by_patch / len(forms))
            frames.append(by_frame / len(forms))
        count = len(clip.codes)
        return Maps(np.concatenate(patches)[:count], np.concatenate(frames)[:count])

    def sample(self, label: int = -1, *, guidance: float = 1.0, seed: int = 0) -> np.ndarray:
        """Samples `SAMPLES` clips of a class, if the generator is given classes: uint8 [B, T, H, W, 3]."""
        classes = [label] * SAMPLES if self.classes else None
        found = self.generator.sample(
            classes, key=rng.key(seed), indices=range(SAMPLES), cfg_scale=self._guidance(guidance)
        )
        codes = found if isinstance(found, tuple) else (found,)
        return to_uint8(self.tokenizer.decode(*map(np.asarray, codes)))

    def stream(
        self, label: int = -1, *, frames: int, guidance: float = 1.0, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Samples a video of a class block by block, and yields the frames of each block, uint8 [F, H, W, 3].

        Raises:
          InputError: the generator cannot, see `streams`.
        """
        classes = [label] if self.classes else None
        key, guidance = rng.key(seed), self._guidance(guidance)
        options = {"classes": classes, "frames": min(frames, MOST_FRAMES), "cfg_scale": guidance}
        for block in Stream(self.generator, self.tokenizer, key=key, **options):
            yield to_uint8(block[0])

    def _guidance(self, guidance: float) -> float:
        return float(guidance) if self.generator.config.has_null_class else 1.0

    def _decoded(self, codes: np.ndarray, lengths: tuple[int, ...] | None) -> np.ndarray:
        given = None if lengths is None else np.tile(np.asarray(lengths, np.int32), (len(codes), 1))
        return np.asarray(self.tokenizer.decode(self._padded(codes), given))

    def _padded(self, codes: np.ndarray, value: int = 0) -> np.ndarray:
        missing = self.tokenizer.config.num_tokens - codes.shape[1]
        return np.pad(codes, ((0, 0), (0, missing), *((0, 0),) * (codes.ndim - 2)), constant_values=value)


def read_positions(text: str, count: int) -> list[int]:
    """Parses positions and ranges, both ends included: `0-3, 6` -> [0, 1, 2, 3, 6].

    Args:
      text: positions from 0, and ranges of them, with commas.
      count: number of positions there are.

    Raises:
      InputError: the text has another form, or names a position that is not there.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,9})(?:\s*[-–]\s*(\d{1,9}))?", part, re.ASCII)
        if match is None:
            raise InputError(f"{part[:40]!r} is no position or range; write 0-15, 20")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise InputError(f"{part} must be within 0-{count - 1}, the smaller number first")
        found |= set(range(first, last + 1))
    if not found:
        raise InputError("choose at least one position, such as 0-15, 20")
    return sorted(found)
