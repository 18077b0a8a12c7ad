"""Kills training at random moments, again and again, and checks that nothing is lost.

    python tests/chaos.py --kills 50 --seed 0

The same command, a tiny tokenizer on a dozen made-up videos, trains twice: undisturbed, and killed (SIGKILL) while it
starts, reads, saves or evaluates, and started again each time. When a run reaches its end before it was killed often
enough, another begins. In the end each must have left what the undisturbed one left: the same lines in metrics.jsonl,
the same checkpoints with bit-equal weights and optimizer, and nothing else. Exit code 0 says that they did.
"""

import argparse
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

import numpy as np

HERE = pathlib.Path(__file__).parent
STEPS, SAVE_EVERY, EVAL_EVERY = 24, 3, 4
# What a process does when it is killed, at the latest so many seconds after it began to.
MOMENTS = {"start": 6.0, "data": 0.3, "save": 0.05, "evaluation": 0.3}
POLL = 0.002
PATIENCE = 3600  # seconds until a moment comes


def make_videos(folder: pathlib.Path) -> None:
    """A dozen videos of two classes."""
    from data_helpers import moving_frames

    from larp_jax.data.video import write_video

    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_frames(12 + i, 32, 32, seed=i), 8)


class Training:
    """The command, in a workdir."""

    def __init__(self, workdir: pathlib.Path, videos: pathlib.Path, steps: int, workers: int, variant: str = ""):
        self.workdir = workdir
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
        self._command = [sys.executable, "-m", "larp_jax", "train", "--config", config]
        self._command += ["--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in settings.items())]
        # every process compiles the same programs, so they come from a cache
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(videos.parent / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }

    def start(self) -> subprocess.Popen:
        """Starts it, its messages into a log beside the workdir."""
        self.workdir.parent.mkdir(parents=True, exist_ok=True)
        with self.workdir.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def kill_at(self, moment: str, times: int, delay: float) -> bool:
        """Starts it and kills it so long after the moment has come so many times; whether it was killed before its end.

        Moments that pass between two looks do not count.
        """
        before = self._now(moment)
        process, deadline, seen = self.start(), time.monotonic() + PATIENCE, set()
        while process.poll() is None and len(seen) < times:
            seen |= {self._now(moment)} - {before, None}
            if time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"no {moment} in {PATIENCE} seconds; see {self.workdir.with_suffix('.log')}")
            time.sleep(POLL)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() not in (0, -signal.SIGKILL):
            raise SystemExit(f"exit code {process.returncode}; see {self.workdir.with_suffix('.log')}")
        return process.returncode != 0

    def _now(self, moment: str):
        """What tells one such moment from the next, None if it is none."""
        if moment == "save":  # a checkpoint is being written
            return max(self._unfinished(), default=None)
        rows = self._rows()
        if moment == "data":  # a step is done, the next one waits for its batch
            return len(rows)
        # evaluation: the last line is of a step to evaluate and has no scores yet
        evaluates = rows and rows[-1]["step"] % EVAL_EVERY == 0 and "eval/psnr" not in rows[-1]
        return rows[-1]["step"] if evaluates else None

    def _unfinished(self):
        # by when it was begun, for one that a killed process left has the name of the next
        found = []
        for path in (self.workdir / "checkpoints").glob("*-tmp*"):
            try:
                found.append((path.name, path.stat().st_ino))
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
    """What differs between two workdirs but for times."""
    from larp_jax.weights.checkpoint import find_damage

    found = []
    names = [sorted(_files(workdir)) for workdir in (one, other)]
    if names[0] != names[1]:
        found.append(f"files: {set(names[0]) ^ set(names[1])}")
    rows = [_without_times(workdir) for workdir in (one, other)]
    if len(rows[0]) != len(rows[1]):
        found.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} lines")
    for row, again in zip(*rows, strict=False):
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
    """The arrays of an item of a checkpoint, by path."""
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
    """The names of what a run leaves, checkpoints as one, TensorBoard's files left out: one a process."""
    kept = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return sorted({"/".join(path.parts[:2]) for path in kept if path.parts[0] != "tensorboard"})


def _without_times(workdir: pathlib.Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_time"} for line in lines]


def chaos(
    folder: pathlib.Path, *, kills: int, seed: int, steps: int, workers: int, variant: str = "", say=print
) -> list[str]:
    """Runs all of it below a folder; what differed in the end, nothing if all is well."""
    videos = folder / "videos"
    make_videos(videos)
    undisturbed = Training(folder / "undisturbed" / "run", videos, steps, workers, variant)
    began = time.monotonic()
    if undisturbed.start().wait() != 0:
        raise SystemExit(f"the undisturbed run fails; see {undisturbed.workdir.with_suffix('.log')}")
    say(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s")
    rng, done, found, number = random.Random(seed), dict.fromkeys(MOMENTS, 0), [], 0
    while sum(done.values()) < kills:
        number += 1
        training = Training(folder / f"killed_{number}" / "run", videos, steps, workers, variant)
        ended = False
        while not ended and sum(done.values()) < kills:
            moment = rng.choice(list(MOMENTS))
            times, delay = 0 if moment == "start" else rng.randint(1, 3), rng.random() * MOMENTS[moment]
            if training.kill_at(moment, times, delay):
                done[moment] += 1
            else:
                ended = True
            rows = training._rows()
            say(f"{sum(done.values())}: {moment}, {'ended' if ended else 'killed'} at step {rows and rows[-1]['step']}")
        if not ended and training.start().wait() != 0:
            raise SystemExit(f"the run fails; see {training.workdir.with_suffix('.log')}")
        found += [f"run {number}: {text}" for text in differences(undisturbed.workdir, training.workdir)]
        say(f"run {number}: {'equal' if not found else found[-1]}")
    say(f"{sum(done.values())} kills ({', '.join(f'{n} {moment}' for moment, n in done.items())}), {number} runs,")
    say(f"{len(found)} differences, {time.monotonic() - began:.0f} s")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a run (default: {STEPS})")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data (default: none)")
    parser.add_argument("--variant", default="", help="of the recipe; plain is quick: no prior, no discriminator")
    parser.add_argument("--keep", metavar="DIR", help="folder for runs and logs, which stay there")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.keep or tempfile.mkdtemp(prefix="chaos"))
    options = {name: getattr(arguments, name) for name in ("kills", "seed", "steps", "workers", "variant")}
    try:
        found = chaos(folder, **options, say=lambda text: print(text, flush=True))
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
