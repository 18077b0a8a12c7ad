"""Kills training at random moments and checks that nothing is lost.

    python tests/chaos.py --kills 50 --seed 0

The same command, which trains a tiny tokenizer on 12 synthetic videos, runs twice: without interruption, and killed
(SIGKILL) while it starts, reads, saves or evaluates, and restarted each time. If a run ends before the required number
of kills, another is started. At the end, each run must have left the same files as the uninterrupted one: the same
lines in metrics.jsonl, the same checkpoints with bit-equal weights and optimizer state, and nothing else. The exit code
is 0 if they are equal and 1 otherwise. With --bucket, the killed runs have their workdirs in a bucket of a server on
the loopback, and the uninterrupted one its own on the disk.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

HERE = pathlib.Path(__file__).parent
STEPS, SAVE_EVERY, EVAL_EVERY = 24, 3, 4
# Activities during which a process is killed: {name: maximum delay of the kill after its start, in seconds}.
MOMENTS = {"start": 6.0, "data": 0.3, "save": 0.05, "evaluation": 0.3}
POLL = 0.002
# tensorboardX imports PyTorch if it is installed, which takes a second, and uses nothing of it here.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; import tensorboardX; del sys.modules['torch']"
PROGRAM = f"{WITHOUT_TORCH}; from larp_jax.cli import main; sys.exit(main())"
PATIENCE = 3600  # maximum wait for a moment, in seconds


def make_videos(folder: pathlib.Path) -> None:
    """Writes 12 videos of two classes."""
    from data_helpers import moving_frames

    from larp_jax.data.video import write_video

    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_frames(12 + i, 32, 32, seed=i), 8)


class Training:
    """The training command with its workdir, whose files are in a bucket if `root` is the folder of one."""

    def __init__(self, workdir: pathlib.Path, videos: pathlib.Path, steps: int, workers: int, variant="", root=None):
        self.log = workdir.with_suffix(".log")
        self.workdir, self._remote = workdir, root is not None
        if root:
            name = f"{workdir.parents[1].name}/{workdir.parent.name}/{workdir.name}"
            self.workdir, workdir = root / name, f"gs://{root.name}/{name}"
        settings = {
            "steps": steps,
            "save_every": SAVE_EVERY,
            "eval_every": EVAL_EVERY,
            "data.train": f"folder:{videos}",
            "data.eval": f"folder:{videos}",
            "data.eval_clips": 12,
            "data.workers": workers,
        }
        config = f"{HERE / 'configs' / 'tiny.py'}:{variant}".rstrip(":")
        self._command = [sys.executable, "-c", PROGRAM, "train", "--config", config]
        self._command += ["--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in settings.items())]
        # every process compiles the same programs, so all share a compilation cache
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(videos.parent / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }

    def start(self) -> subprocess.Popen:
        """Starts the command, with its messages in a log next to the workdir."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def kill_at(self, moment: str, times: int, delay: float) -> bool:
        """Starts the command, and kills it `delay` seconds after the moment was seen `times` times.

        Moments that pass between two polls do not count.

        Returns:
          Whether the command was killed before its end.
        """
        before = self._now(moment)
        process, deadline, seen = self.start(), time.monotonic() + PATIENCE, set()
        while process.poll() is None and len(seen) < times:
            seen |= {self._now(moment)} - {before, None}
            if time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"no {moment} in {PATIENCE} seconds; see {self.log}")
            time.sleep(POLL)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() not in (0, -signal.SIGKILL):
            raise SystemExit(f"exit code {process.returncode}; see {self.log}")
        return process.returncode != 0

    def _now(self, moment: str):
        """A value that identifies the current occurrence of the moment; None if it is not the moment."""
        if moment == "save":  # a checkpoint is being written
            return max(self._unfinished(), default=None)
        rows = self._rows()
        if moment == "data":  # a step is finished, and the next one waits for its batch
            return len(rows)
        # evaluation: the last line is that of a step with an evaluation, and has no scores yet
        evaluates = rows and rows[-1]["step"] % EVAL_EVERY == 0 and "eval/psnr" not in rows[-1]
        return rows[-1]["step"] if evaluates else None

    def _unfinished(self):
        # name and inode: the next attempt has the name of the one that a killed process left
        found = []
        for path in (self.workdir / "checkpoints").glob("[0-9]*" if self._remote else "*-tmp*"):
            try:
                if not self._remote:
                    found.append((path.name, path.stat().st_ino))
                elif (path / "params").exists() and not (path / "commit_success.txt").exists():
                    found.append((path.name, path.stat().st_mtime_ns))  # the server keeps empty folders
            except FileNotFoundError:
                pass
        return found

    def _rows(self):
        path, rows = self.workdir / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass  # being written
        return rows


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Differences between two workdirs, except for times."""
    from larp_jax.weights.checkpoint import find_damage

    found = []
    names = [sorted(_files(workdir)) for workdir in (one, other)]
    if names[0] != names[1]:
        found.append(f"files: {set(names[0]) ^ set(names[1])}")
    logged = [rows(workdir) for workdir in (one, other)]
    if len(logged[0]) != len(logged[1]):
        found.append(f"metrics.jsonl: {len(logged[0])} and {len(logged[1])} lines")
    for row, again in zip(*logged, strict=False):
        found += [f"step {row['step']}: {k}" for k in sorted(row.keys() | again.keys()) if row.get(k) != again.get(k)]
    for step in sorted(path.name for path in (one / "checkpoints").iterdir()):
        paths = [workdir / "checkpoints" / step for workdir in (one, other)]
        found += [f"{path}: {reason}" for path in paths if (reason := find_damage(path))]
        if all(path.is_dir() for path in paths):
            for item in ("params", "ema", "optimizer"):
                found += _unequal(*(read(path / item) for path in paths), f"{step}/{item}")
            metadata = [json.loads((path / "metadata" / "metadata").read_text()) for path in paths]
            found += [f"{step}: metadata {k}" for k in metadata[0] if metadata[0][k] != metadata[1].get(k)]
    return found


def read(item: pathlib.Path) -> dict:
    """The arrays of an item of a checkpoint, by path in the tree."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(item).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(item, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(arrays)}


def _unequal(one: dict, other: dict, where: str) -> list[str]:
    if one.keys() != other.keys():
        return [f"{where}: {sorted(one.keys() ^ other.keys())[:3]}"]
    return [f"{where}: {k}" for k in one if np.asarray(one[k]).tobytes() != np.asarray(other[k]).tobytes()]


def _files(workdir: pathlib.Path) -> list[str]:
    """Files of a run, each checkpoint as one name; without TensorBoard's, of which every process writes one."""
    kept = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return sorted({"/".join(path.parts[:2]) for path in kept if path.parts[0] != "tensorboard"})


def without_times(row: dict) -> dict:
    """A row of metrics.jsonl without what differs from run to run."""
    return {k: v for k, v in row.items() if k != "wall_time" and not k.startswith("time/")}


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without what differs from run to run."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def uninterrupted(folder: pathlib.Path, make: Callable[..., Training], progress=print) -> pathlib.Path:
    """The workdir, in this folder, of a run that is not killed. `make` makes a run of a workdir."""
    # A compiled step may round differently from the same step loaded from the cache: all runs that count load it.
    for name in ("warm_up", "uninterrupted"):
        began, training = time.monotonic(), make(folder / name / "run")
        if training.start().wait() != 0:
            raise SystemExit(f"the {name} run fails; see {training.log}")
        progress(f"{name}: {time.monotonic() - began:.0f} s")
    return training.workdir


def chaos(
    folder: pathlib.Path,
    make: Callable[..., Training],
    whole: pathlib.Path,
    *,
    kills: int,
    seed: int,
    progress=print,
    bucket: pathlib.Path | None = None,
) -> list[str]:
    """Kills and restarts runs in a folder; returns how they differ from an uninterrupted one, none if nothing was lost.

    `make` makes a run of a workdir, and `whole` is the workdir of the run that was not killed. `progress` is called
    with each line of progress. `bucket` is the folder of a bucket for the killed runs.
    """
    began = time.monotonic()
    rng, done, found, number = random.Random(seed), dict.fromkeys(MOMENTS, 0), [], 0
    while sum(done.values()) < kills:
        number += 1
        training = make(folder / f"killed_{number}" / "run", root=bucket)
        ended = False
        while not ended and sum(done.values()) < kills:
            moment = rng.choice(list(MOMENTS))
            times, delay = 0 if moment == "start" else rng.randint(1, 3), rng.random() * MOMENTS[moment]
            if training.kill_at(moment, times, delay):
                done[moment] += 1
            else:
                ended = True
            rows = training._rows()
            end = "ended" if ended else "killed"
            progress(f"{sum(done.values())}: {moment}, {end} at step {rows and rows[-1]['step']}")
        if not ended and training.start().wait() != 0:
            raise SystemExit(f"the run fails; see {training.log}")
        found += [f"run {number}: {text}" for text in differences(whole, training.workdir)]
        progress(f"run {number}: {'equal' if not found else found[-1]}")
    progress(f"{sum(done.values())} kills ({', '.join(f'{n} {moment}' for moment, n in done.items())}), {number} runs,")
    progress(f"{len(found)} differences, {time.monotonic() - began:.0f} s")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of a run (default: {STEPS})")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data (default: 0, threads)")
    parser.add_argument("--variant", default="", help="recipe variant; plain is fast: no prior, no discriminator")
    parser.add_argument("--bucket", action="store_true", help="keep the workdirs of the killed runs in a bucket")
    parser.add_argument("--keep", metavar="DIR", help="folder for runs and logs, which are kept (default: temporary)")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.keep or tempfile.mkdtemp(prefix="chaos"))
    settings = {name: getattr(arguments, name) for name in ("steps", "workers", "variant")}
    make = functools.partial(Training, videos=folder / "videos", **settings)
    say = functools.partial(print, flush=True)
    try:
        with contextlib.ExitStack() as stack:
            bucket = None
            if arguments.bucket:
                import gcs

                server = stack.enter_context(gcs.Server(folder / "gcs"))
                os.environ.update(server.environment)
                bucket = server.root
            make_videos(folder / "videos")
            whole = uninterrupted(folder, make, say)
            options = {"kills": arguments.kills, "seed": arguments.seed, "bucket": bucket, "progress": say}
            found = chaos(folder, make, whole, **options)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
