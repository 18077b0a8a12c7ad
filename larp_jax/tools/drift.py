"""How streams change as they go on: their colors, and what a probe makes of them, window after window."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from larp_jax import data, files
from larp_jax.api import LoadedGenerator, LoadedTokenizer
from larp_jax.api.tokenizer import in_blocks
from larp_jax.config import AUTO
from larp_jax.data import ClipSpec
from larp_jax.data.pipeline import choose_windows
from larp_jax.errors import InputError
from larp_jax.evaluation.probe import ClipProbe, probe_distance
from larp_jax.inference.stream import Stream, pace
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import rng
from larp_jax.runtime.progress import Progress
from larp_jax.tools.charts import Chart, Series, as_file

NUMBERS = "drift.json"
MEASURES = {
    "mean": "mean color",
    "variance": "variance of colors",
    "distance": "Frechet distance to real clips",
    "accuracy": "class accuracy",
}


def drift(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    spec: str,
    output: str | os.PathLike,
    *,
    frames: int,
    videos: int = 64,
    seed: int = 0,
    options: SamplingOptions,
    context: int | None = None,
    budget: str = AUTO,
    probe: str | os.PathLike | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measures streams by windows of T frames, beside a control whose clips go on from real frames.

    There is a stream for each of some real clips, with its class. In the control, every clip begins with the first
    frames of the real clip in place of the last ones of the stream: what then still changes is not drift. If the
    generator needs given frames, the streams begin with those of the clips too.

    Args:
      generator: as for `Stream`.
      tokenizer: as for `Stream`.
      spec: data set of real clips; the split `test` by default.
      output: folder to write `drift.json` and a chart of each measure to, created if missing.
      frames: of each stream; at least T. Frames after the last whole window are left out.
      videos: number of streams; at most the number of clips.
      seed: seed of the random numbers.
      options: sampling options.
      context: as for `Stream`.
      budget: as for `Stream`.
      probe: file of a `ClipProbe` for these clips and classes, for `distance` and `accuracy`.
      batch_size: streams at a time.

    Returns:
      `frames`, the number of frames of a window; `videos`; and `stream` and `anchored`, for each window `start`, and
      `mean` and `variance` over the pixels, in [0, 1], as means of the channels; with a probe `distance` and
      `accuracy`. `real` is the same of the real clips, with a distance of None.

    Raises:
      InputError: as for `Stream`, or the clips or the probe cannot be read.
    """
    config = tokenizer.config
    count = frames // config.frames
    if not count:
        raise InputError(f"--frames {frames}: drift is measured in windows of {config.frames} frames; give more")
    output = files.check_folder(output)
    clip = ClipSpec.of(config.clip_shape, fps=tokenizer.fps, stride=tokenizer.stride)
    source = data.open_source(spec, clip, default_split="test")
    network = None if probe is None else ClipProbe.load(probe, config.clip_shape, len(source.label_names))
    windows = choose_windows(source, clip, videos)
    given = {"frames": count * config.frames, "context": context, "budget": budget, **vars(options)}
    kept, model = pace(generator, tokenizer, context).kept, generator.config
    needs_frames = model.has_frames and not model.has_null_frames
    real, found = _Window(network), {name: [_Window(network) for _ in range(count)] for name in ("stream", "anchored")}
    with (
        data.eval_batches(source, clip, batch_size=batch_size, windows=windows) as batches,
        Progress(2 * count * len(windows), description="drift", unit="clip") as progress,
    ):
        for number, batch in enumerate(batches):
            clips, labels, mask = batch["video"], batch["label"], batch["mask"] > 0
            real.add(clips, labels, mask)
            for name, anchors in (("stream", None), ("anchored", clips)):
                given["indices"] = number * batch_size + np.arange(batch_size)
                given["classes"] = labels if model.has_classes else None
                given["first"] = clips[:, :kept] if needs_frames else None
                stream = Stream(generator, tokenizer, key=rng.key(seed), **given)
                sampled_windows = in_blocks(_anchored(stream, anchors), config.frames)
                for window, sampled in zip(found[name], sampled_windows, strict=True):
                    window.add(sampled, labels, mask)
                    progress.update(int(mask.sum()))
    result: dict[str, Any] = {"frames": config.frames, "videos": len(windows), "data": spec, "real": real.result()}
    for name, measured in found.items():
        result[name] = [{"start": i * config.frames, **x.result(real)} for i, x in enumerate(measured)]
    files.make_folder(output)
    files.write_json(output / NUMBERS, result)
    for chart in figures(result):
        files.write_bytes(output / f"{chart.name}.svg", as_file(chart).encode())
    return result


def figures(result: Mapping[str, Any]) -> list[Chart]:
    """A chart of each measure in what `drift` returns: over the windows of streams, beside the control."""
    return [_chart(result, measure, title) for measure, title in MEASURES.items() if measure in result["real"]]


class _Window:
    """What is measured of clips, added batch by batch."""

    def __init__(self, probe: ClipProbe | None):
        self._probe, self._count, self._sums = probe, 0, np.zeros((2, 3))
        self._features: list[np.ndarray] = []
        self._right = 0

    def add(self, clips: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> None:
        """Adds clips [B, T, H, W, C], uint8 or floats in [0, 1], with their labels [B], if the mask [B] is true."""
        clips, labels = np.asarray(clips)[mask], np.asarray(labels)[mask]
        values = (clips / 255.0 if clips.dtype == np.uint8 else clips).astype(np.float64).reshape(-1, 3)
        self._sums += values.sum(axis=0), np.square(values).sum(axis=0)
        self._count += len(values)
        if self._probe is not None:
            features, classes = self._probe.measure(clips)
            self._features.append(features)
            self._right += int((classes == labels).sum())

    def result(self, real: "_Window | None" = None) -> dict[str, float | None]:
        """The measures; the distance is that to real clips."""
        mean, square = self._sums / self._count
        found: dict[str, float | None] = {"mean": float(mean.mean()), "variance": float((square - mean**2).mean())}
        if self._probe is not None:
            features = np.concatenate(self._features)
            theirs = None if real is None else np.concatenate(real._features)
            found["distance"] = None if theirs is None else probe_distance(features, theirs)
            found["accuracy"] = self._right / len(features)
        return found


def _anchored(stream: Stream, anchors: np.ndarray | None) -> Iterator[np.ndarray]:
    """The blocks of a stream; its clips go on from the first frames of `anchors`, if given."""
    for block in stream:
        if anchors is not None:
            kept = stream.state.recent.shape[1]
            stream.state = stream.state._replace(recent=anchors[:, :kept])
        yield block


def _chart(result: Mapping[str, Any], measure: str, title: str) -> Chart:
    lines = [Series(name, [(x["start"], x[measure]) for x in result[name]]) for name in ("stream", "anchored")]
    if (value := result["real"][measure]) is not None:
        lines.append(Series("real clips", [(x["start"], value) for x in result["stream"]]))
    return Chart(f"drift_{measure}", title, lines, x_label="first frame of the window")
