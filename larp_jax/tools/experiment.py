"""Experiments: trains tokenizers, and generators on their codes, over arms and seeds, and compares them.

A cell is one arm with one seed. Its folder holds a tokenizer, its codes, and two generators: one trained on the codes
in their order, and one on the same codes under one fixed permutation of the positions. An arm with continuous latents
has one generator, and none of the measures of codes. What is complete is kept and training resumes, so an interrupted
experiment continues where it was and gives the same numbers.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from larp_jax import api, data, files, metrics
from larp_jax.config import Experiment, FlowRecipe, GeneratorRecipe, Recipe, TokenizerRecipe, completed, to_dict
from larp_jax.data.codes import (
    MANIFEST,
    has_latents,
    new_manifest,
    read_manifest,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.video import frame_grid, write_png
from larp_jax.errors import InputError
from larp_jax.evaluation.probe import ClipProbe, probe_distance, train_probe
from larp_jax.inference.tokenize import tokenize
from larp_jax.models.generator_codes import score_batch
from larp_jax.models.pixels import to_uint8
from larp_jax.runtime import rng
from larp_jax.tools import analysis
from larp_jax.tools.experiment_results import Cell, write_results
from larp_jax.training.frozen import Frozen
from larp_jax.training.train import train
from larp_jax.training.writers import read_metrics
from larp_jax.weights import networks
from larp_jax.weights.checkpoint import Checkpoint, read_config, write_config

logger = logging.getLogger(__name__)

SETTINGS, CELL, PROBE, PROBE_SCORES = "experiment.json", "cell.json", "probe.npz", "probe.json"
FORMAT = "larp_jax.experiment"
BATCH = 16
LPIPS_CLIPS, LPIPS_FRAMES = 64, 2  # clips, and frames of each, that LPIPS compares: it costs more than the rest
PERMUTATION_SEED = 0
PICTURED = 8  # clips
ORDERED, PERMUTED = "codes", "permuted"
GENERATORS = {ORDERED: "generator", PERMUTED: "generator_permuted"}


def run_experiment(experiment: Experiment, workdir: str | os.PathLike, *, name: str = "", jobs: int = 1) -> dict:
    """Runs all cells that are not complete, and writes `results.json`, `results.md` and `results.svg`.

    Several processes may work on one folder: each takes cells that no other process has taken.

    Args:
      experiment: what to run.
      workdir: folder of the experiment, created if missing.
      name: name of the experiment, for `jobs` above 1: what the command line calls it.
      jobs: number of processes that work side by side, each with its own GPU, or its share of the CPU cores.

    Returns:
      The contents of `results.json`, see `larp_jax.tools.experiment_results`.

    Raises:
      InputError: the folder belongs to another experiment, a recipe does not fit the data or the devices, or an arm
        needs weights of another network that are not there.
      RuntimeError: a process of `jobs` failed.
    """
    workdir = files.absolute(files.make_folder(files.local_path(workdir, "--workdir"), "--workdir"))
    _check_networks(experiment, workdir)
    _check_settings(experiment, workdir)
    if jobs > 1:
        _run_jobs(name, experiment, workdir, jobs)
    else:
        _run_cells(experiment, workdir)
    return write_results(experiment, _complete_cells(experiment, workdir), _probe_scores(workdir), workdir)


def _check_networks(experiment: Experiment, workdir: pathlib.Path) -> None:
    """`InputError` if an unfinished arm lacks weights of a frozen network; before the arms ahead of it are trained."""
    for arm, recipe in experiment.arms.items():
        if all((_folder(workdir, arm, seed) / CELL).exists() for seed in range(experiment.seeds)):
            continue
        try:
            Frozen(recipe).load()
        except InputError as error:
            raise InputError(f"arm {arm}: {error}") from error


def _check_settings(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Writes the settings of the experiment, or checks that those in the folder are the same."""
    settings = _plain({"format": FORMAT, **to_dict(experiment)})
    path = workdir / SETTINGS
    if path.exists():
        if not _is_continued(files.json_object(path), settings):
            raise InputError(f"{workdir} holds an experiment with other settings ({SETTINGS}); name another --workdir")
    elif any(entry.name not in (".larp_jax.lock",) for entry in workdir.iterdir()):
        raise InputError(f"--workdir {workdir} is not empty and holds no experiment; name another")
    files.write_json(path, settings)


def _is_continued(before: dict, settings: dict) -> bool:
    """Whether an experiment is an earlier one with more seeds or arms; anything else would mix different ones."""

    def rest(settings):
        return {name: x for name, x in settings.items() if name not in ("arms", "generator", "generators", "seeds")}

    def recipes(settings):
        """The recipes of tokenizer and generator of each arm."""
        own = settings.get("generators", {})
        pairs = {arm: (recipe, own.get(arm, settings["generator"])) for arm, recipe in settings["arms"].items()}
        return {arm: [_plain(completed(recipe)) for recipe in pair] for arm, pair in pairs.items()}

    if not {"arms", "generator"} <= before.keys():
        return False
    now = recipes(settings)
    return all(now.get(arm) == pair for arm, pair in recipes(before).items()) and rest(before) == rest(settings)


def _plain(values: dict) -> dict:
    """As JSON reads them."""
    return json.loads(json.dumps(values))


def _names(experiment: Experiment) -> list[tuple[str, int]]:
    """(arm, seed) of all cells, seed by seed, so that an unfinished experiment already compares all arms."""
    return [(arm, seed) for seed in range(experiment.seeds) for arm in experiment.arms]


def _folder(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    return workdir / arm / f"seed-{seed}"


def _complete_cells(experiment: Experiment, workdir: pathlib.Path) -> dict[tuple[str, int], Cell]:
    found = {}
    for arm, seed in _names(experiment):
        path = _folder(workdir, arm, seed) / CELL
        if path.exists():
            found[arm, seed] = Cell.from_json(files.read_json(path))
    return found


def _run_jobs(name: str, experiment: Experiment, workdir: pathlib.Path, jobs: int) -> None:
    """Runs the command in `jobs` processes, each with one GPU or its share of the CPU cores."""
    _make_probe(experiment, workdir)  # once, before all processes would
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    command = [sys.executable, "-m", "larp_jax", "experiment", name, "--workdir", os.fspath(workdir)]
    command += ["--seeds", str(experiment.seeds)]
    running = []
    with contextlib.ExitStack() as stack:
        for job in range(jobs):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)] if gpus else str(job)}
            log = stack.enter_context(open(workdir / f"job-{job}.log", "ab"))
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            stack.callback(running[-1].kill)
            if len(cores) >= jobs:
                os.sched_setaffinity(running[-1].pid, cores[job::jobs])
        logger.info("%d processes are running; their output is in %s", jobs, workdir / "job-*.log")
        codes = [process.wait() for process in running]
    if failed := [job for job, code in enumerate(codes) if code]:
        raise RuntimeError(f"job {failed[0]} failed; see {workdir / f'job-{failed[0]}.log'}")


def _run_cells(experiment: Experiment, workdir: pathlib.Path) -> None:
    probe = _make_probe(experiment, workdir)
    names = _names(experiment)
    for number, (arm, seed) in enumerate(names, 1):
        folder, source = _folder(workdir, arm, seed), experiment.arms[arm].init_from
        if (folder / CELL).exists():
            continue
        if source and not _is_made(_folder(workdir, source, seed)):
            logger.info("%s is left for later, as it starts from %s, which is not complete", folder, source)
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.claim(folder, "cell"))
            except InputError:
                logger.info("another process works on %s", folder)
                continue
            if not (folder / CELL).exists():
                logger.info("cell %d of %d: %s, seed %d", number, len(names), arm, seed)
                cell = _run_cell(experiment, arm, seed, folder, probe)
                files.write_json(folder / CELL, cell.to_json())


def _is_made(folder: pathlib.Path) -> bool:
    """Waits for another process that works on a cell; then whether the cell is complete."""
    while not (folder / CELL).exists():
        with contextlib.suppress(InputError), files.claim(folder, "cell"):
            return (folder / CELL).exists()
        time.sleep(1)
    return True


def _clip(experiment: Experiment) -> data.ClipSpec:
    model = next(iter(experiment.arms.values())).model
    return data.ClipSpec.of(model.clip_shape)


def _make_probe(experiment: Experiment, workdir: pathlib.Path) -> ClipProbe:
    """The classifier of real clips, trained once, and its accuracy on held-out ones."""
    arm, clip = next(iter(experiment.arms.values())), _clip(experiment)
    classes = len(data.open_source(arm.data.train, clip).label_names)
    if classes < 2:
        raise InputError(f"data.train={arm.data.train} has no classes, which an experiment needs")
    path = workdir / PROBE
    if path.exists() and (workdir / PROBE_SCORES).exists():
        return ClipProbe.load(path, clip.shape, classes)
    logger.info("training the classifier of real clips")
    probe = train_probe(arm.data.train, clip, classes, steps=experiment.probe_steps)
    clips, labels = _held_out(experiment)
    _, predicted = probe.measure(clips)
    scores = {"classes": classes, "accuracy_on_held_out_clips": float(np.mean(predicted == labels))}
    logger.info("the classifier recognizes %.1f%% of the held-out clips", 100 * scores["accuracy_on_held_out_clips"])
    probe.save(path)
    files.write_json(workdir / PROBE_SCORES, scores)
    return probe


def _probe_scores(workdir: pathlib.Path) -> dict[str, Any]:
    return files.json_object(workdir / PROBE_SCORES)


def _held_out(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """One clip of each held-out video, uint8 [M, T, H, W, 3], and their classes [M]."""
    arm, clip = next(iter(experiment.arms.values())), _clip(experiment)
    source = data.open_source(arm.data.eval, clip, default_split="test")
    videos, labels = [], []
    with data.eval_batches(source, clip, batch_size=BATCH, max_clips=len(source)) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            videos.append(batch["video"][real])
            labels.append(batch["label"][real])
    return np.concatenate(videos), np.concatenate(labels)


# ---------------------------------------------------------------------------------------------------------- one cell


@rng.pinned()
def _run_cell(experiment: Experiment, arm: str, seed: int, folder: pathlib.Path, probe: ClipProbe) -> Cell:
    """Trains and measures one arm with one seed; what the folder already holds is not computed again."""
    recipe, made = _recipe(experiment, arm, seed, folder)
    _train(recipe, folder / "tokenizer")
    found = api.load_checkpoint(folder / "tokenizer")
    tokenizer = api.load_tokenizer(folder / "tokenizer")
    clips, labels = _held_out(experiment)
    if made == folder:
        orders = tuple(GENERATORS) if recipe.model.quantizer.has_codes else (ORDERED,)
        _write_codes(experiment, tokenizer, recipe.data.train, recipe.data.eval, folder, orders)
        for order in orders:
            _train_generator(experiment.generator_of(arm), seed, folder / order, folder / GENERATORS[order])
    generator = api.load_generator(_best(made / GENERATORS[ORDERED]))
    generator.check_tokenizer(tokenizer)
    samples, sampled_classes = _sample(generator, tokenizer, experiment.samples, seed)
    reconstructions = _reconstruct(tokenizer, clips)
    real_features, _ = probe.measure(clips)
    _, recognized = probe.measure(reconstructions)
    features, predicted = probe.measure(samples)
    values = {
        "psnr": np.asarray(metrics.psnr(clips / np.float32(255), reconstructions)),
        "recognized": recognized == labels,
        "sample_accuracy": predicted == sampled_classes,
        "sample_distance": np.array([probe_distance(features, real_features)]),
        **_lpips(clips, reconstructions),
        **_reach(found, recipe.data.eval, folder),
    }
    if tokenizer.config.quantizer.has_codes:
        values |= _code_measures(generator, tokenizer, made)
    pairs = np.stack([clips, to_uint8(reconstructions)], axis=1)[:PICTURED]
    write_png(folder / "reconstructions.png", frame_grid(list(pairs.reshape(-1, *clips.shape[1:]))))
    write_png(folder / "samples.png", frame_grid(list(to_uint8(samples[: 2 * PICTURED]))))
    return Cell({name: np.asarray(value, np.float64) for name, value in values.items()})


def _recipe(
    experiment: Experiment, arm: str, seed: int, folder: pathlib.Path
) -> tuple[TokenizerRecipe, pathlib.Path]:
    """The recipe of a cell, and the folder of its codes and generators: that of another arm if the codes are its."""
    recipe, made = dataclasses.replace(experiment.arms[arm], seed=seed), folder
    if recipe.init_from:
        source = folder.parents[1] / recipe.init_from / folder.name
        made = source if recipe.trained == "decoder" else folder
        recipe = dataclasses.replace(recipe, init_from=os.fspath(source / "tokenizer"))
    return recipe, made


def _reconstruct(tokenizer: api.LoadedTokenizer, clips: np.ndarray) -> np.ndarray:
    """Reconstructions from deterministic codes, float32 like the clips [M, T, H, W, C]."""
    parts = (clips[start : start + BATCH] for start in range(0, len(clips), BATCH))
    return np.concatenate(
        [np.asarray(tokenizer.reconstruct(np.resize(x, (BATCH, *x.shape[1:]))))[: len(x)] for x in parts]
    )


def _write_codes(
    experiment: Experiment,
    tokenizer: api.LoadedTokenizer,
    train_spec: str,
    eval_spec: str,
    folder: pathlib.Path,
    orders: Iterable[str],
) -> None:
    """Writes deterministic codes of training clips and, in two halves, of held-out ones, in order or permuted.

    The first half of the held-out videos, `validation`, chooses the step of a generator, the second, `test`, scores it.
    """
    written = {}
    for name, spec, windows in (("train", train_spec, experiment.windows), ("held_out", eval_spec, 1)):
        written[name] = folder / "encoded" / name
        if not (written[name] / MANIFEST).exists():
            tokenize(tokenizer, spec, written[name], windows=windows, batch_size=BATCH)
    count = len(read_manifest(written["held_out"])["rows"])
    parts = {
        "train": (written["train"], slice(None)),
        "validation": (written["held_out"], slice(0, count // 2)),
        "test": (written["held_out"], slice(count // 2, None)),
    }
    permutation = np.random.default_rng(PERMUTATION_SEED).permutation(tokenizer.config.num_tokens)
    positions = {ORDERED: np.arange(len(permutation)), PERMUTED: permutation}
    for order in orders:
        for name, (source, rows) in parts.items():
            _copy_codes(source, folder / order / name, rows, positions[order])


def _copy_codes(source: pathlib.Path, target: pathlib.Path, rows: slice, positions: np.ndarray) -> None:
    """Copies some rows of a folder of codes or latents, with their positions in another order."""
    if (target / MANIFEST).exists():
        return
    manifest = read_manifest(source)
    arrays = {name: x[rows][:, positions] for name, x in _shards(source, manifest).items()}
    statistics = None
    if has_latents(manifest):
        statistics = LatentStatistics(manifest["d"])
        statistics.add(arrays["latents"])
    kept = ("fingerprint", "step", "K", "N", "clip", "label_names", "input", "skipped", "cond_frames")
    details = {name: manifest[name] for name in kept if name in manifest}
    files.make_folder(target)
    described = manifest["rows"][rows]
    write_shard(target / shard_name(0, 1), arrays)
    write_manifest(target, new_manifest(sizes=[len(described)], rows=described, statistics=statistics, **details))


def _shards(folder: pathlib.Path, manifest: dict) -> dict[str, np.ndarray]:
    """The arrays of `read_shard`, of all shards."""
    shards = [read_shard(folder, manifest, i) for i in range(len(manifest["shards"]))]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def _train_generator(
    recipe: GeneratorRecipe | FlowRecipe, seed: int, codes: pathlib.Path, workdir: pathlib.Path
) -> None:
    """Trains a generator on codes, and keeps all its checkpoints."""
    recipe = dataclasses.replace(
        recipe,
        seed=seed,
        tokenizer="",
        data=dataclasses.replace(recipe.data, train=f"tokens:{codes / 'train'}", eval=f"tokens:{codes / 'validation'}"),
        save_every=recipe.eval_every,
        keep=recipe.steps,
    )
    _train(recipe, workdir)


def _train(recipe: Recipe, workdir: pathlib.Path) -> None:
    """Trains a run of a cell, or continues it, also after the folder of the experiment was moved.

    The runs record where their codes and the arm that they start from are. The same places below the folder of the
    experiment are the same codes and arm, wherever this folder is now.
    """
    if (recorded := read_config(workdir)) is not None:
        root, now = f"{workdir.parents[2]}{os.sep}", to_dict(recipe)
        for held, ours, name in ((recorded, now, "init_from"), (recorded.get("data", {}), now["data"], "train")):
            _, inside, place = ours[name].partition(root)
            if inside and held.get(name, "").endswith(f"{os.sep}{place}"):
                held[name] = ours[name]
        write_config(workdir, recorded)
    train(recipe, workdir)


def _best(workdir: pathlib.Path) -> pathlib.Path:
    """The checkpoint of a generator with the lowest error on what it was validated on."""
    errors = {"eval/cross_entropy", "eval/flow_loss"}  # a generator has one of them
    scores = {row["step"]: row[name] for row in read_metrics(workdir) for name in errors & row.keys()}
    return workdir / "checkpoints" / str(min(scores, key=lambda step: (scores[step], step)))


def _code_measures(
    generator: api.LoadedGenerator, tokenizer: api.LoadedTokenizer, made: pathlib.Path
) -> dict[str, np.ndarray]:
    """How well codes are predicted: by their frequencies, by the generator, and by the one of permuted codes."""
    permuted = api.load_generator(_best(made / GENERATORS[PERMUTED]))
    test = _rows(made / ORDERED / "test")
    return {
        "unigram": _unigram(_rows(made / ORDERED / "train")["codes"], test["codes"], tokenizer),
        "cross_entropy": _cross_entropy(generator, test),
        "cross_entropy_permuted": _cross_entropy(permuted, _rows(made / PERMUTED / "test")),
    }


def _rows(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All codes [M, N] int32 and labels [M] int32 of a folder."""
    manifest = read_manifest(folder)
    return _shards(folder, manifest) | {"label": np.array([row["label"] for row in manifest["rows"]], np.int32)}


def _cross_entropy(generator: api.LoadedGenerator, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Nats per code of each clip [M], given its class and the codes before."""
    score = jax.jit(lambda params, batch: score_batch(generator.module(params), batch).cross_entropy.mean(axis=1))
    found = []
    for start in range(0, len(rows["codes"]), BATCH):
        part = {name: x[start : start + BATCH] for name, x in rows.items()}
        padded = {name: np.resize(x, (BATCH, *x.shape[1:])) for name, x in part.items()}
        found.append(np.asarray(score(generator.params, padded))[: len(part["codes"])])
    return np.concatenate(found)


def _unigram(train_codes: np.ndarray, codes: np.ndarray, tokenizer: api.LoadedTokenizer) -> np.ndarray:
    """Nats per code of each clip [M], if every code had its frequency in the training codes, whatever the position."""
    counts = np.bincount(train_codes.ravel(), minlength=tokenizer.config.quantizer.codebook_size) + 1.0
    return -np.log(counts / counts.sum())[codes].mean(axis=1)


def _sample(
    generator: api.LoadedGenerator, tokenizer: api.LoadedTokenizer, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of all classes in turn, without guidance, float32 [M, T, H, W, C], and their classes [M]."""
    classes = np.arange(count) % generator.config.num_classes
    videos = []
    for start in range(0, count, BATCH):
        numbers = np.arange(start, min(start + BATCH, count))
        padded = np.resize(numbers, BATCH)
        codes = generator.sample(classes[padded], indices=padded, key=rng.key(seed))
        videos.append(np.asarray(tokenizer.decode(codes))[: len(numbers)])
    return np.concatenate(videos), classes


def _lpips(clips: np.ndarray, reconstructions: np.ndarray) -> dict[str, np.ndarray]:
    """LPIPS of a few frames of each clip, if its weights are installed and frames are large enough."""
    if clips.shape[2] < 16 or not networks.locate("lpips")[0].exists():
        return {}
    lpips = networks.load_lpips()
    graphdef, state = nnx.split(lpips)
    distance = jax.jit(lambda state, x, y: nnx.merge(graphdef, state).distance(x, y))
    chosen = np.linspace(0, len(clips) - 1, min(LPIPS_CLIPS, len(clips))).round().astype(int)
    frames = np.linspace(0, clips.shape[1] - 1, LPIPS_FRAMES).round().astype(int)
    pairs = [x[chosen][:, frames].reshape(-1, *x.shape[2:]) for x in (clips / np.float32(255), reconstructions)]
    found = [distance(state, *(x[start : start + BATCH] for x in pairs)) for start in range(0, len(pairs[0]), BATCH)]
    return {"lpips": np.concatenate(found).reshape(len(chosen), LPIPS_FRAMES).mean(axis=1)}


def _reach(found: Checkpoint, spec: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """How much of the clip a code or latent changes, and the codes in use."""
    output = folder / "analysis"
    if not analysis.is_analysis(output / analysis.NUMBERS):
        analysis.analyze(found, spec, output, max_clips=0)
    summary = files.json_object(output / analysis.NUMBERS)["summary"]
    names = ("usage",) if found.recipe.model.quantizer.has_codes else ()
    used = {name: np.array([summary[name]]) for name in names}
    return used | {"reach": np.array([summary["space"] * summary["time"]])}
