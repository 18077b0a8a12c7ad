"""Generated videos to compare with the clips of a data set: one per clip, and their classes."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from larp_jax.api import LoadedGenerator
from larp_jax.errors import InputError
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.inference.generate import (
    SampleFolder,
    Sampler,
    alternate,
    as_in_training,
    class_counts,
    manifest_rows,
)
from larp_jax.runtime.progress import Progress


def classes_for(generator: LoadedGenerator, clips: ClipSet) -> np.ndarray | None:
    """Classes [clips] int32 of the videos to compare with a set of clips; None for a generator without classes.

    They have the same frequencies as in training, if the checkpoint contains those, and alternate. Otherwise, and if
    the generator is also given frames, they are the classes of the clips.

    Raises:
      InputError: the clips have a class that the generator does not have.
    """
    if not generator.config.has_classes:
        return None
    if generator.class_counts is not None and not generator.config.has_frames:
        return np.array(alternate(as_in_training(generator, len(clips))), np.int32)
    label_of = {video: clips.source.label(video) for video, _ in clips.windows}
    return own_labels(generator, clips, np.array([label_of[video] for video, _ in clips.windows], np.int32))


def own_labels(generator: LoadedGenerator, clips: ClipSet, labels: np.ndarray) -> np.ndarray:
    """Labels [M] int32 of clips, as the generator numbers its classes: matched by name if both have names.

    Raises:
      InputError: the generator does not have the class of a clip, or a clip has none and there is no null class.
    """
    names, ours = clips.source.label_names, generator.class_names
    if names and ours and names != ours:
        number = {name: label for label, name in enumerate(ours)}
        found = [names[label] if label >= 0 else "" for label in labels.tolist()]
        if unknown := [name for name in found if name and name not in number]:
            raise InputError(f"a clip has the class {unknown[0]!r}, which the generator lacks; give other --data")
        labels = np.array([number.get(name, -1) for name in found], np.int32)
    least, last = -1 if generator.config.class_dropout else 0, generator.config.num_classes - 1
    if wrong := [label for label in labels.tolist() if not least <= label <= last]:
        raise InputError(
            f"a clip has the class {wrong[0]}, but the generator has 0 to {last}; give --data of the same"
            " classes"
        )
    return labels


def videos_for(
    sampler: Sampler,
    clips: ClipSet,
    classes: np.ndarray | None = None,
    *,
    folder: str | os.PathLike | None = None,
    described: dict[str, Any] | None = None,
) -> Iterator[np.ndarray]:
    """Generates a video for each clip, for `larp_jax.evaluation.fvd.FvdEvaluator.run`; sample i belongs to clip i.

    Args:
      sampler: samples the videos.
      clips: the clips; a frame predictor continues them. If a clip cannot be read, its prediction is left out too.
      classes: [clips] int, if the generator is given classes.
      folder: where to keep the codes, so that an interrupted evaluation can resume. `detokenize` reads the finished
        folder.
      described: with a ladder, gets what the manifest of codes has of `class_codes`, after the last batch.

    Yields:
      Batches of the videos of this host, float32 [B, T, H, W, C] in [0, 1].

    Raises:
      InputError: the folder contains other files.
    """
    host, hosts = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        settings = {"clips": clips.describe()}
        if classes is not None:
            settings["counts"] = class_counts(classes)
        if sampler.given_frames:
            # with the batch size of all hosts together, so that each host gets complete batches
            batches = clips.batches(sampler.batch_size * hosts, process_index=host, process_count=hosts)
            stack.enter_context(batches)
        path = stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder
        run = stack.enter_context(SampleFolder("evaluate", sampler, path, len(clips), option="--samples", **settings))
        total = sum(len(run.rows(number)) for number in run.mine)
        progress = stack.enter_context(Progress(total, description="sample", unit="video"))
        for number in run.mine:
            rows = run.rows(number)
            real, given = np.ones(len(rows), bool), {}
            if sampler.given_frames:
                batch = next(batches)
                real = batch["mask"][: len(rows)] > 0
                given["clips"] = batch["video"][: len(rows)]
            if classes is not None:
                given["classes"] = classes[rows]
            found = run.kept(number)
            if found is None:
                found = sampler.codes(rows, **given)
                run.keep(number, found)
            videos = sampler.decode(found)[real]
            progress.update(len(rows))
            yield videos
        labels, names = (np.full(len(clips), -1), ()) if classes is None else (classes, sampler.class_names)
        if described is not None:
            described |= run.class_codes(labels)
        if folder is not None:
            run.finish(manifest_rows(labels, clips.clip.frames), names, sheet=True)
