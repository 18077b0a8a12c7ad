"""Video of any length from a generator, block after block.

With a ladder, a clip of T blocks is sampled block by block, and each block is decoded at once. When the clip is full,
its last blocks become the first of the next clip: their frames are encoded again, so that the generator goes on from
what it knows from its training, the codes of a clip's first blocks (as in Loong, arXiv 2410.02757).

Without a ladder, a clip is sampled at once, and its last frames are given to the generator for the next clip, encoded
again and held still as in training. The block is then the clip without the frames that were given.

`write_stream` writes MP4 files of `PART_BLOCKS` blocks, named by their first frame. Beside each is an npz file with
what is needed to go on behind it:

  number: int32, blocks so far.
  codes, lengths: [1, N] and [1, n] int32, the blocks of the current clip, packed; or its latents [1, N, d] float32.
  recent: uint8 [1, frames, H, W, C], the last frames.
  frames: int32, in the MP4 file.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from larp_jax import files, npz
from larp_jax.api import LoadedGenerator, LoadedTokenizer
from larp_jax.api.generator import NO_FRAMES, Budget
from larp_jax.config import AUTO
from larp_jax.data import ClipSpec
from larp_jax.data.codes import MANIFEST
from larp_jax.data.inputs import Inputs, playable_fps
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.inference.batches import BatchFolder
from larp_jax.inference.generate import Sampler, class_pairs, windows_in
from larp_jax.models.packing import by_place
from larp_jax.models.pixels import to_uint8
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import rng
from larp_jax.runtime.progress import Progress

logger = logging.getLogger(__name__)

PART_BLOCKS = 16  # what an interrupted call may lose


class State(NamedTuple):
    """Where a stream is: all that the blocks to come depend on, besides its arguments.

    Attributes:
      number: of blocks so far.
      codes: [B, N] int32, packed codes of the current clip, or its latents [B, N, d] float32.
      lengths: [B, n] int32, numbers of codes of its blocks.
      recent: uint8 [B, frames, H, W, C], the last frames, as many as are encoded again.
    """

    number: int
    codes: np.ndarray
    lengths: np.ndarray
    recent: np.ndarray


class Pace(NamedTuple):
    """How a stream goes on from one clip to the next, which depends on the kind of the generator.

    Attributes:
      context: as for `Stream`, a number.
      kept: number of the last frames, which are encoded again.
      size: number of new frames in a block.
    """

    context: int
    kept: int
    size: int


def pace(generator: LoadedGenerator, tokenizer: LoadedTokenizer, context: int | None = None) -> Pace:
    """The pace of a stream; arguments and errors as for `Stream`."""
    config, ladder = tokenizer.config, generator.config.adaptive
    if ladder is None and not generator.config.has_frames:
        raise InputError(NO_FRAMES)
    generator.check_tokenizer(tokenizer)
    if context is None:
        context = generator.given_frames if ladder is None else 1
    whole, unit = (config.frames, "frames") if ladder is None else (config.blocks, "blocks")
    if not 0 < context < whole:
        raise InputError(
            f"context {context}: of the {whole} {unit} of a clip, the next can take over 1 to {whole - 1}"
        )
    if ladder is None:
        return Pace(context, context, config.frames - context)
    size = config.frames // config.blocks
    return Pace(context, context * size, size)


class Stream:
    """An iterator over the blocks of B videos, [B, F, H, W, C] float32 in [0, 1], F frames each.

    Memory does not grow. There is one program that samples, one that decodes for each place in a clip, and one that
    encodes for each block of the context, so nothing is compiled after the first block of the second clip. The random
    numbers of block i depend on the key and i, so block i depends on these, its class and the blocks before.

    Args:
      generator: a generator with a ladder, or one that is given frames.
      tokenizer: the tokenizer that it was trained with.
      frames: the number of frames of each video; None for no end.
      key: random key, `jax.random.key(seed)`.
      classes: [B] integers as for `LoadedGenerator.sample`, or the classes of each block, [M, B], which begin again
        after M blocks; if the generator is given classes.
      indices: [B] as for `LoadedGenerator.sample`; required if B is not 1 and there are neither classes nor `first`.
      context: with a ladder, how many blocks of a full clip the next one begins with, from 1 to T - 1; 1 by default.
        Fewer are encoded again less often, and are sampled faster; more show the generator more of what was before.
        Without a ladder, with how many frames; by default as many as in training.
      first: the frames that the stream goes on from, uint8 [B, n, H, W, C], n those of the context; None if it begins
        with nothing. Then the first clip of a generator without a ladder is sampled without given frames, which
        training must have left out sometimes, and the frames that later clips are given are missing in the stream.
      budget: as for `LoadedGenerator.sample`. The blocks that are encoded again have its numbers too, or with `auto`
        the most codes in equal blocks.
      **options: as for `LoadedGenerator.sample_block`.

    Attributes:
      state: where the stream is; with equal arguments, `resume` goes on from there with equal frames.

    Raises:
      InputError: the models do not fit each other, or the generator cannot go on from frames, or not begin.
      ValueError: an argument is not as described.
    """

    def __init__(
        self,
        generator: LoadedGenerator,
        tokenizer: LoadedTokenizer,
        *,
        key: jax.Array,
        frames: int | None = None,
        classes: Sequence | np.ndarray | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        context: int | None = None,
        first: np.ndarray | None = None,
        budget: Budget = AUTO,
        **options: Any,
    ):
        self._pace = pace(generator, tokenizer, context)
        config, ladder = generator.config, generator.config.adaptive
        if first is None and config.has_frames and not config.has_null_frames:
            raise InputError(
                "this generator cannot sample a first clip: it was always given frames (model.frames_dropout=0); give"
                " the stream frames to go on from, or a generator that was trained with model.frames_dropout"
            )
        self._generator, self._tokenizer, self._frames, self._key = generator, tokenizer, frames, rng.as_key(key)
        self._classes = None if classes is None else np.atleast_2d(classes)
        self._rows = [0] if indices is None else indices
        if indices is None and (classes is not None or first is not None):
            self._rows = range(self._classes.shape[1] if first is None else len(first))
        self._budget, self._options = budget, options
        chosen = generator.assignment(budget, SamplingOptions(**options))
        if ladder is not None:
            own = zip(chosen, ladder.largest, strict=True)
            self._again = [given or most for given, most in own][: self._pace.context]
        rows, shape = len(self._rows), tokenizer.config.clip_shape[1:]
        if first is None:
            first = np.zeros((rows, 0, *shape), np.uint8)
        elif np.shape(first) != (rows, self._pace.kept, *shape) or first.dtype != np.uint8:
            expected = f"uint8 [{rows}, {', '.join(map(str, (self._pace.kept, *shape)))}]"
            raise ValueError(f"first must be {expected}, got {first.dtype} {list(np.shape(first))}")
        codes = np.zeros((rows, *config.token_shape), np.int32 if config.has_codes else np.float32)
        self.resume(State(0, codes, np.zeros((rows, 0), np.int32), first))

    def resume(self, state: State) -> None:
        """Goes on from the state of a stream with the same arguments."""
        self.state, self._past = state, ()
        blocks = state.lengths.shape[1]
        for place in range(blocks) if blocks < self._generator.config.blocks else ():
            self._decode(place)  # for what later blocks see of these

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        number, size = self.state.number, self._pace.size
        left = size if self._frames is None else min(size, self._frames - number * size)
        if left <= 0:
            raise StopIteration
        before = self._before()
        with rng.pinned():
            key = jax.random.fold_in(self._key, number)
        codes, lengths = self._generator.sample_block(
            None if self._classes is None else self._classes[number % len(self._classes)],
            key=key,
            frames=before,
            indices=np.asarray(self._rows),
            budget=self._budget,
            **self._options,
        )
        self.state = State(number + 1, np.asarray(codes), np.asarray(lengths), self.state.recent)
        frames = self._decode(lengths.shape[1] - 1)
        recent = np.concatenate([self.state.recent, to_uint8(frames)], axis=1)[:, -self._pace.kept :]
        self.state = self.state._replace(recent=recent)
        return frames[:, -size:][:, :left]

    def _before(self) -> Any:
        """What the generator is given to sample the next block, encoded again where a clip begins; None for nothing."""
        recent, blocks = self.state.recent, self.state.lengths.shape[1]
        if self._generator.config.has_frames:
            return self._tokenizer.encode_frames(recent) if recent.shape[1] else None
        if blocks in (0, self._generator.config.blocks) and recent.shape[1]:
            self._roll_over()
        return (self.state.codes, self.state.lengths) if self.state.lengths.shape[1] else None

    def _roll_over(self) -> None:
        """Makes the last blocks the first of the next clip."""
        codes, past, size = [], (), self._pace.size
        for place, length in enumerate(self._again):
            frames = self.state.recent[:, place * size :][:, :size]
            found, past = self._tokenizer.encode_block(frames, np.full(len(frames), length), past)
            codes.append(np.asarray(found)[:, :length])
        packed = np.concatenate(codes, axis=1)
        more = self._generator.config.num_tokens - packed.shape[1]
        lengths = np.tile(np.asarray(self._again, np.int32), (len(packed), 1))
        self.resume(self.state._replace(codes=np.pad(packed, ((0, 0), (0, more))), lengths=lengths))

    def _decode(self, place: int) -> np.ndarray:
        """The frames of the block at a place of the current clip, after those before it; without a ladder all of it."""
        if not self._generator.config.ladder:
            return np.asarray(self._tokenizer.decode(self.state.codes))
        most = self._tokenizer.config.query_rows
        codes = by_place(self.state.codes, self.state.lengths, most)[:, place * most :][:, :most]
        lengths = self.state.lengths[:, place]
        frames, self._past = self._tokenizer.decode_block(np.maximum(codes, 0), lengths, self._past)
        return np.asarray(frames)


def read_schedule(text: str, generator: LoadedGenerator, size: int) -> list[tuple[int, int]]:
    """Parses classes by name or number: `walk` to [(3, 0)], `0:200,walk:200` to [(0, 200), (3, 200)], with frames.

    Args:
      text: a class, or classes with their numbers of frames, in order; the same class may come again.
      generator: the generator.
      size: number of frames of a block.

    Raises:
      InputError: the generator has no such class, or the text is not of this form.
    """
    pairs = class_pairs(text, generator, "frame")
    if len(pairs) > 1 and not all(count for _, count in pairs):
        raise InputError(f"--classes: {text!r} must be one class, or classes with frames, like 0:{size},3:{2 * size}")
    for _, count in pairs:
        if count % size:
            below, above = count - count % size, count - count % size + size
            near = f"{below} or {above}" if below else str(above)
            raise InputError(f"--classes: {count} frames are no whole blocks of {size} frames; give {near}")
    return pairs


def read_first(
    source: str, generator: LoadedGenerator, tokenizer: LoadedTokenizer, context: int | None = None
) -> np.ndarray:
    """The first frames of a video or picture, which stands still, for the `first` of a `Stream` of one video.

    Args:
      source: input, as for `larp_jax.data.inputs.Inputs`; the first video in it is read that is long enough.
      generator: as for `Stream`.
      tokenizer: as for `Stream`.
      context: as for `Stream`.

    Raises:
      InputError: as for `Stream`, or the input cannot be read or is too short.
    """
    kept = pace(generator, tokenizer, context).kept
    clip = ClipSpec.of(tokenizer.config.clip_shape, fps=tokenizer.fps, stride=tokenizer.stride)
    for (window,) in windows_in(Inputs(source, clip, max_clips=1), least=kept, total=1, batch_size=1):
        return window.frames[None, :kept]
    raise InputError(f"{source}: no video in it has the {kept} frames that the stream goes on from")


def write_stream(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    output: str | os.PathLike,
    *,
    frames: int,
    schedule: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    options: SamplingOptions,
    context: int | None = None,
    source: str | None = None,
    budget: str = AUTO,
) -> dict[str, Any]:
    """Writes one long video in parts; a call that is interrupted continues, and so does one with more frames.

    Args:
      generator: as for `Stream`.
      tokenizer: as for `Stream`.
      output: folder to write to, created if missing.
      frames: the number of frames.
      schedule: of `read_schedule`; begins again at its end. None for any class.
      seed: seed of the random numbers.
      options: sampling options.
      context: as for `Stream`.
      source: what the stream goes on from, as for `read_first`; None for nothing.
      budget: as for `Stream`.

    Returns:
      The manifest: the settings, `frames`, `fps` and the `parts`, each with its `file`, `start`, `frames` and, with a
      schedule, the `classes` of its blocks.

    Raises:
      InputError: as for `Stream`, or the folder contains something else.
    """
    if schedule is None and generator.config.has_classes:
        if not generator.config.has_null_class:
            raise InputError("this generator was trained without a null class: give a class, --classes C")
        schedule = [(-1, 0)]
    (context, kept, size), classes = pace(generator, tokenizer, context), None
    cond_frames = kept if generator.config.has_frames else 0
    sampler = Sampler(generator, tokenizer, seed=seed, options=options, cond_frames=cond_frames, budget=budget)
    if schedule is not None:
        classes = np.repeat([label for label, _ in schedule], [max(1, count // size) for _, count in schedule])[:, None]
    first = None if source is None else read_first(source, generator, tokenizer, context)
    given = {"classes": classes, "context": context, "first": first, "budget": budget, **vars(options)}
    settings = {"command": "stream", **sampler.describe(), "context": context}
    settings |= {} if source is None else {"input": source}
    settings |= {} if schedule is None else {"schedule": [list(pair) for pair in schedule]}
    length = PART_BLOCKS * size
    parts = [(f"{start:06d}", start, min(length, frames - start)) for start in range(0, frames, length)]
    stream = Stream(generator, tokenizer, key=rng.key(seed), frames=frames, **given)
    fps = playable_fps(tokenizer.fps)
    with BatchFolder(output, settings, len(parts), content="stream") as run:
        done, state = _finished(run.path, parts, stream.state)
        stream.resume(state)
        with Progress(frames, description="stream", unit="frame", initial=sum(x[2] for x in parts[:done])) as progress:
            for name, _, count in parts[done:]:
                write_video(run.path / f"{name}.mp4", _images(stream, progress), fps)
                with files.writing(run.path / f"{name}.npz") as file:
                    np.savez(file, **_numbers(stream.state, count))
        rows = [{"file": f"{name}.mp4", "start": start, "frames": count} for name, start, count in parts]
        for row in rows if classes is not None else ():
            blocks = range(row["start"] // size, -(-(row["start"] + row["frames"]) // size))
            row["classes"] = [int(classes[i % len(classes), 0]) for i in blocks]
        manifest = settings | {"frames": frames, "fps": fps, "parts": rows}
        files.write_json(run.path / MANIFEST, manifest)
    return manifest


def _images(stream: Stream, progress: Progress) -> Iterator[np.ndarray]:
    """The frames of the next part, uint8 [H, W, C] each."""
    for block in itertools.islice(stream, PART_BLOCKS):
        yield from to_uint8(block[0])
        progress.update(block.shape[1])


def _numbers(state: State, frames: int) -> dict[str, np.ndarray]:
    """What the file of a part contains."""
    return state._asdict() | {"number": np.int32(state.number), "frames": np.int32(frames)}


def _finished(folder, parts: list[tuple[str, int, int]], empty: State) -> tuple[int, State]:
    """The number of parts that earlier calls wrote, and the state behind them; `empty` is that of a new stream."""
    found = {path.name for path in folder.iterdir()}
    done = sum(1 for _ in itertools.takewhile(lambda part: {f"{part[0]}.mp4", f"{part[0]}.npz"} <= found, parts))
    expected = {name: npz.Array(x.dtype, x.shape) for name, x in _numbers(empty, 0).items()}
    for name, axis in (("lengths", 1), ("recent", 1)):  # they grow with the number of blocks
        shape = list(expected[name].shape)
        expected[name] = expected[name]._replace(shape=(*shape[:axis], None, *shape[axis + 1 :]))
    while done:
        name, _, frames = parts[done - 1]
        try:
            stored = npz.read(folder / f"{name}.npz", expected, "it is sampled again")
            if stored.pop("frames") == frames:
                return done, State(**stored | {"number": int(stored["number"])})
        except InputError as error:
            logger.warning("%s", error)
        done -= 1
    return 0, empty
