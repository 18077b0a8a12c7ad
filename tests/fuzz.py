"""Reads mutated files and checks that each is read, or rejected in one line, in limited time and memory.

    python tests/fuzz.py --count 2000                  # of each kind
    python tests/fuzz.py videos --count 2000 --seed 7
    python tests/fuzz.py videos --only 1234            # one input again, with its traceback

A valid file of each kind is written once. Input i of a seed is this file with bytes flipped, cut out, repeated or
replaced, or with values of its JSON exchanged. Success and `InputError`, of which users see one line, are allowed. A
separate process with limited memory reads the inputs. If it dies or hangs, this is reported, and a new one continues.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

HERE = pathlib.Path(__file__).parent
MEMORY = 2 * 2**30  # bytes in addition to those used before the first input
SECONDS = 20  # time limit of one input
ODD_NUMBERS = (0, -1, 1, 7, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, 0.5, -1e9, 1e308)
ODD_VALUES = (None, True, False, "", "x", "../../etc/passwd", "/", "a\0b", "nan", [], {}, [[]], {"a": 1}, "é" * 50)


# ------------------------------------------------------------------------------------------------------------ mutation


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Applies a few mutations (bits, bytes, integers, cuts, repetitions, zeros), most near the beginning (headers)."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        if not data:
            break
        place = rng.randrange(min(len(data), rng.choice((64, 1024, len(data)))))
        length = min(rng.choice((1, 2, 4, 8, 100, 1000)), len(data) - place)
        action = rng.randrange(8)
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[place : place + length] = rng.randbytes(length)
        elif action == 2:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1)))
        elif action == 3:
            del data[place : place + length]
        elif action == 4:
            data[place:place] = data[place : place + length]
        elif action == 5:
            data[place : place + length] = bytes(length)
        elif action == 6:
            data[place : place + 1] = bytes([rng.choice((0, 9, 34, 44, 45, 48, 57, 91, 123, 125, 127, 255))])
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def mutate_values(rng: random.Random, values):
    """A copy of JSON values with one to three of them exchanged, removed, renamed or replaced by odd values."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(values)) or [(None, None)])
        if holder is None:
            return rng.choice(ODD_VALUES)
        action = rng.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1:
            holder[key] = rng.choice(ODD_VALUES)
        elif action == 2 and isinstance(holder, dict):
            holder[rng.choice((key + "s", "x", ""))] = holder.pop(key)
        elif action == 3:
            holder[key] = json.loads(json.dumps(rng.choice(list(_places(values)))[0]))
        elif isinstance(holder[key], str):
            holder[key] = mutate_bytes(rng, holder[key].encode()).decode(errors="replace")
        else:
            holder[key] = rng.choice(ODD_NUMBERS)
    return values


def _places(values):
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        yield values, key
        yield from _places(value)


def mutate_json(rng: random.Random, path: pathlib.Path) -> None:
    """Mutates a JSON file: its values, sometimes its bytes, sometimes to text that is difficult for parsers."""
    kind = rng.randrange(10)
    if kind == 0:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif kind == 1:
        path.write_text(rng.choice(("[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "1e999", "NaN", '"\\ud800"', "")))
    else:
        path.write_text(json.dumps(mutate_values(rng, json.loads(path.read_text()))))


def mutate_files(rng: random.Random, folder: pathlib.Path) -> None:
    """Mutates one or two files below a folder, or removes or exchanges them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
        if (action := rng.randrange(8)) == 0:
            path.unlink()
        elif action == 1:
            path.write_bytes(_content(rng.choice(files)))
        elif path.suffix == ".json" or path.name == "metadata":
            with contextlib.suppress(ValueError):
                mutate_json(rng, path)
        else:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _content(path: pathlib.Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


# --------------------------------------------------------------------------------------------------------------- kinds


class Videos:
    """Video files of several codecs, opened as a folder; clips and windows are read."""

    def make(self, folder):
        from data_helpers import KINDS, moving_frames, write_as

        for name in ("h264_bframes.mp4", "h264_opengop.ts", "mpeg4_bframes.avi", "vp9.webm", "mjpeg.mov", "rgb.gif"):
            write_as(folder / name, moving_frames(12, 32, 48), *KINDS[name])

    def try_one(self, rng, good, scratch):
        import numpy as np

        from larp_jax.data import ClipSpec, open_source
        from larp_jax.data.video import read_windows

        path = rng.choice(sorted(good.iterdir()))
        (scratch / path.name).write_bytes(mutate_bytes(rng, path.read_bytes()))
        source = open_source(f"folder:{scratch}")
        clip = ClipSpec(4, 16)
        source.read_clip(0, np.random.default_rng(0), clip)
        with contextlib.suppress(_input_error()):
            source.read_clip(0, 4, clip)
        for number, _ in enumerate(read_windows(scratch / path.name, clip)):
            if number > 100:
                break


class Configs:
    """Recipes: files in Python, settings given on the command line, and the config.json of a run."""

    def make(self, folder):
        from larp_jax.cli import app
        from larp_jax.cli.recipe import load_recipe
        from larp_jax.config import to_dict

        shutil.copyfile(HERE / "configs" / "tiny.py", folder / "tiny.py")
        arguments = app.parse(["benchmark", "data", "--config", str(folder / "tiny.py")])
        (folder / "config.json").write_text(json.dumps(to_dict(load_recipe(arguments))))

    def try_one(self, rng, good, scratch):
        from larp_jax.cli import app
        from larp_jax.cli.recipe import load_recipe
        from larp_jax.config import parse_recipe
        from larp_jax.weights import checkpoint

        kind, values = rng.randrange(3), json.loads((good / "config.json").read_text())
        if kind == 0:
            shutil.copyfile(good / "config.json", scratch / "config.json")
            mutate_json(rng, scratch / "config.json")
            parse_recipe(checkpoint.read_config(scratch))
            return
        overrides = []
        if kind == 1:
            text = (good / "tiny.py").read_bytes()
            start = text.index(b"config.steps")  # the settings, not the imports
            (scratch / "tiny.py").write_bytes(text[:start] + mutate_bytes(rng, text[start:]))
        else:
            shutil.copyfile(good / "tiny.py", scratch / "tiny.py")
            for _ in range(rng.choice((1, 2, 3))):
                holder, key = rng.choice([place for place in _places(values) if isinstance(place[1], str)])
                prefix = next(prefix for prefix, part in _parts(values) if part is holder)
                value = rng.choice((*ODD_NUMBERS, *ODD_VALUES, json.dumps(mutate_values(rng, values["data"]))))
                flag = f"--{'.'.join((*prefix, key))}={value}"
                if rng.random() < 0.3:
                    flag = mutate_bytes(rng, flag.encode()).decode(errors="replace")
                overrides.append(flag)
        with contextlib.redirect_stderr(io.StringIO()):  # SyntaxWarning and the like
            load_recipe(app.parse(["plan", "--devices=1", "--config", str(scratch / "tiny.py"), *overrides]))


def _parts(values, prefix=("config",)):
    yield prefix, values
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _parts(value, (*prefix, key))


class Checkpoints:
    """A run's newest checkpoint, loaded as a tokenizer; every second one as if of a version without checksums."""

    def make(self, folder):
        import jax

        from larp_jax.cli import app
        from larp_jax.cli.recipe import load_recipe
        from larp_jax.config import to_dict
        from larp_jax.training.tokenizer import TokenizerStage
        from larp_jax.weights import checkpoint

        arguments = app.parse(["benchmark", "data", "--config", str(HERE / "configs" / "tiny.py")])
        recipe = load_recipe(arguments)
        state = TokenizerStage(recipe).init(jax.random.key(0))
        manager = checkpoint.CheckpointManager(folder, keep=1, best_metric="psnr")
        manager.save(state, {"config": to_dict(recipe), "step": 0, "code_counts": [1] * 32})
        manager.close()
        checkpoint.write_config(folder, to_dict(recipe))

    def try_one(self, rng, good, scratch):
        from larp_jax import load_tokenizer

        shutil.copytree(good, scratch, dirs_exist_ok=True)
        (directory,) = (scratch / "checkpoints").iterdir()
        if rng.random() < 0.5:
            (directory / "checksums.json").unlink()
            path = directory / "metadata" / "metadata"
            path.write_text(json.dumps({**json.loads(path.read_text()), "items": []}))
        mutate_files(rng, directory)
        load_tokenizer(scratch).fingerprint  # noqa: B018


class Codes:
    """The output of `tokenize`: a manifest and shards of codes."""

    def make(self, folder):
        import numpy as np

        rng = np.random.default_rng(0)
        rows = [
            {"source": f"{'ab'[i % 2]}/{i // 2}.mp4", "start": 0, "frames": 8, "fps": 8.0, "label": i % 2}
            for i in range(12)
        ]
        shards = [{"file": f"codes-{i:05d}-of-00003.npz", "rows": 4} for i in range(3)]
        for shard in shards:
            codes = {name: rng.integers(0, 32, (4, 8), np.int32) for name in ("codes", "condition")}
            np.savez(folder / shard["file"], **codes)
        manifest = {
            "format": "larp_jax.codes", "version": 1, "fingerprint": "0" * 16, "step": 6, "K": 32, "N": 8,
            "clip": [8, 32, 32, 3], "input": "videos", "label_names": ["a", "b"], "skipped": {}, "cond_frames": 3,
            "shards": shards, "rows": rows,
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def try_one(self, rng, good, scratch):
        from larp_jax.data.codes import CodeSet

        shutil.copytree(good, scratch, dirs_exist_ok=True)
        if rng.random() < 0.5:
            mutate_json(rng, scratch / "manifest.json")
        else:
            mutate_files(rng, scratch)
        codes = CodeSet(scratch)
        codes.labels()
        codes.some(3)
        next(codes.batches(batch_size=4, seed=0))


class Features:
    """The output of `features`: a manifest and shards of clips with features."""

    def make(self, folder):
        import numpy as np

        from larp_jax.config.teachers import TeacherConfig
        from larp_jax.data import features

        rng = np.random.default_rng(0)
        rows = [{"video": i // 2, "source": f"{i // 2}.mp4", "start": 0, "flip": bool(i % 2)} for i in range(12)]
        teacher = vars(TeacherConfig("videomae", 24, 2, 8, heads=2, hidden=48, resolution=24, table=(4, 3, 3)))
        described = {"clip": [4, 16, 16, 3], "features": [2, 2, 2, 24]}
        shards = [{"file": features.shard_name(i, 3), "rows": 4} for i in range(3)]
        for number, shard in enumerate(shards):
            records = np.zeros(4, features.record(described))
            records["video"] = rng.integers(0, 256, records["video"].shape)
            records["window"], records["flip"] = 2 * number + np.arange(4) // 2, np.arange(4) % 2
            features.write_shard(folder / shard["file"], records)
        described["teacher"] = {"name": "tiny", "config": teacher, "sha256": "0" * 64}
        manifest = features.new_manifest(
            **described, precision="float32", data="folder:videos", sampling={"fps": 8.0}, windows=1, flips=True,
            shards=shards, rows=rows,
        )  # fmt: skip
        features.write_manifest(folder, manifest)

    def try_one(self, rng, good, scratch):
        import numpy as np

        from larp_jax.data import features

        shutil.copytree(good, scratch, dirs_exist_ok=True)
        if rng.random() < 0.5:
            mutate_json(rng, scratch / "manifest.json")
        else:
            mutate_files(rng, scratch)
        found = features.FeatureSet(scratch)
        found.names()
        for number in range(len(found.manifest["rows"])):
            row = found.row(number)
            assert row["video"].dtype == np.uint8 and row["features"].dtype == np.float16
        next(found.batches(batch_size=4, seed=0))
        for path in sorted(scratch.glob("*.npy")):  # as a call that continues does
            features.windows_of(path, features.record(found.manifest), 6)


class Safetensors:
    """A released model: its weights file and configuration."""

    def make(self, folder):
        shutil.copytree(HERE / "reference" / "tokenizer", folder, dirs_exist_ok=True)

    def try_one(self, rng, good, scratch):
        from larp_jax.weights.importing import import_huggingface, read_safetensors

        for name in ("config.json", "prior.json"):
            shutil.copyfile(good / name, scratch / name)
        data = (good / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + size], data[8 + size :]
        if rng.random() < 0.5:
            header = json.dumps(mutate_values(rng, json.loads(header))).encode()
            data = len(header).to_bytes(8, "little") + header + rest
        else:
            data = mutate_bytes(rng, data[: 8 + size]) + rest
        path = scratch / "model.safetensors"
        path.write_bytes(data)
        for name, array in read_safetensors(path).items():
            assert isinstance(name, str) and array.size >= 0
        import_huggingface(scratch)


class Prepared:
    """The output of `prepare`, opened as a data set and read."""

    def make(self, folder):
        from data_helpers import moving_frames

        from larp_jax.data import prepare
        from larp_jax.data.video import write_video

        with tempfile.TemporaryDirectory() as videos:
            for i in range(4):
                (pathlib.Path(videos) / "ab"[i % 2]).mkdir(exist_ok=True)
                write_video(pathlib.Path(videos) / "ab"[i % 2] / f"{i}.mp4", moving_frames(20, 32, 32, seed=i), 8)
            prepare.prepare([videos], folder, prepare.Settings(16), workers=1, progress=lambda text: None)

    def try_one(self, rng, good, scratch):
        import numpy as np

        from larp_jax.data import ClipSpec, open_source

        shutil.copytree(good, scratch, dirs_exist_ok=True)
        if rng.random() < 0.6:
            mutate_json(rng, rng.choice(sorted(scratch.glob("*.json"))))
        else:
            mutate_files(rng, scratch)
        source = open_source(f"tfds:{scratch}:train")
        for index in range(min(len(source), 8)):
            source.read_clip(index, np.random.default_rng(0), ClipSpec(4, 16))


class Lists:
    """Lists of videos: CSV and UCF101's."""

    CSV = "id,path,action,label\n" + "".join(f"{i},{'ab'[i % 2]}/{i}.mp4,{'ab'[i % 2]},{i % 2}\n" for i in range(12))

    def make(self, folder):
        for i in range(12):
            path = folder / "videos" / "ab"[i % 2] / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        (folder / "list.csv").write_text(self.CSV)
        (folder / "classInd.txt").write_text("1 a\n2 b\n")
        (folder / "trainlist01.txt").write_text("".join(f"{'ab'[i % 2]}/{i}.mp4 {i % 2 + 1}\n" for i in range(12)))

    def try_one(self, rng, good, scratch):
        from larp_jax.data.listing import list_videos

        for name in ("list.csv", "classInd.txt", "trainlist01.txt"):
            (scratch / name).write_bytes(mutate_bytes(rng, (good / name).read_bytes()))
        name = rng.choice(("list.csv", "trainlist01.txt"))
        for item in list_videos([str(scratch / name)], str(good / "videos")).items:
            assert pathlib.Path(item.path).resolve().is_relative_to((good / "videos").resolve()), item.path


KINDS = {
    "videos": Videos,
    "configs": Configs,
    "checkpoints": Checkpoints,
    "codes": Codes,
    "features": Features,
    "safetensors": Safetensors,
    "prepared": Prepared,
    "lists": Lists,
}


# ---------------------------------------------------------------------------------------------------------------- run


def _input_error():
    from larp_jax.errors import InputError

    return InputError


def attempt(kind: str, good: pathlib.Path, seed: int, number: int, *, show: bool = False) -> str:
    """Reads an input: `read`, `refused`, or a description of a wrong error."""
    rng = random.Random(f"{seed} {kind} {number}")
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        try:
            KINDS[kind]().try_one(rng, good, pathlib.Path(scratch))
            return "read"
        except _input_error() as error:
            if show:
                print(error)
            return "refused" if str(error).strip() else "refused without a word"
        except BaseException as error:
            if show:
                traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} in {pathlib.Path(frame.filename).name}:{frame.lineno}: {str(error)[:150]!r}"


def work(kind: str, good: str, seed: int, first: int, last: int) -> None:
    """The process that reads inputs: writes a line of JSON at the beginning and at the end of each."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ["LARP_VIDEO_TIME_LIMIT"] = str(SECONDS / 4)
    say = os.fdopen(os.dup(1), "w", buffering=1)
    attempt(kind, pathlib.Path(good), -1, 0)  # imports everything that it needs
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for number in range(first, last):
        say.write(json.dumps([number, None]) + "\n")
        outcome = attempt(kind, pathlib.Path(good), seed, number)
        say.write(json.dumps([number, outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]) + "\n")


def fuzz(kind: str, count: int, seed: int, say=print) -> tuple[collections.Counter, list[str]]:
    """Tries `count` inputs of a kind. Returns the number of inputs by outcome, and descriptions of the failures."""
    outcomes, found, next_input, peak, slowest = collections.Counter(), [], 0, 0, 0.0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz") as good:
        subprocess.run([*_python(), "--make", kind, good], check=True, env=_environment())
        while next_input < count:
            command = [*_python(), "--work", kind, good, str(seed), str(next_input), str(count)]
            with open(os.path.join(tempfile.gettempdir(), f"fuzz_{kind}_{os.getpid()}.log"), "wb") as log:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment())
            os.unlink(log.name)
            watch = _Watch(process)
            for line in process.stdout:
                number, outcome, *memory = json.loads(line)
                slowest = max(slowest, watch.restart())
                next_input = number if outcome is None else number + 1
                if outcome is None:
                    continue
                peak = max(peak, *memory)
                outcomes[outcome if outcome in ("read", "refused") else "wrong"] += 1
                if outcome not in ("read", "refused"):
                    found.append(f"{kind} --seed {seed} --only {number}: {outcome}")
            watch.stop()
            if next_input < count:
                reason = "hung" if watch.killed else f"ended the process with code {process.wait()}"
                outcomes["wrong"] += 1
                found.append(f"{kind} --seed {seed} --only {next_input}: {reason}")
                next_input += 1
    numbers = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    say(
        f"{kind}: {count} inputs in {time.monotonic() - began:.0f} s: {numbers}; at most {peak // 1024} MB and"
        f" {slowest:.1f} s for one"
    )
    return outcomes, found


class _Watch:
    """Kills a process without output for `SECONDS`; time in which this process was stopped does not count."""

    def __init__(self, process: subprocess.Popen):
        self._process, self._stopped, self.killed = process, threading.Event(), False
        self._silent, self._since = -60.0, time.monotonic()  # the first line comes after the imports
        threading.Thread(target=self._run, daemon=True).start()

    def restart(self) -> float:
        """Restarts the clock; returns the seconds since the last restart."""
        self._silent, passed, self._since = 0.0, time.monotonic() - self._since, time.monotonic()
        return passed if passed < SECONDS else 0.0

    def _run(self):
        while not self._stopped.wait(0.5):
            self._silent += 0.5
            if self._silent > SECONDS:
                self.killed = True
                self._process.kill()
                return

    def stop(self) -> None:
        self._stopped.set()


def _python() -> list[str]:
    return [sys.executable, str(HERE / "fuzz.py")]


def _environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"kinds of files: {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, default=2000, help="inputs of each kind (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: 0)")
    parser.add_argument("--only", type=int, metavar="I", help="input I alone, in this process")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - KINDS.keys():
        parser.error(f"{', '.join(unknown)} is not known; choose from {', '.join(KINDS)}")
    if arguments.make:
        KINDS[arguments.make[0]]().make(pathlib.Path(arguments.make[1]))
        return 0
    if arguments.work:
        kind, good, *numbers = arguments.work
        work(kind, good, *map(int, numbers))
        return 0
    if arguments.only is not None:
        (kind,) = arguments.kinds
        with tempfile.TemporaryDirectory() as good:
            KINDS[kind]().make(pathlib.Path(good))
            print(attempt(kind, pathlib.Path(good), arguments.seed, arguments.only, show=True))
        return 0
    found = []
    for kind in arguments.kinds or KINDS:
        found += fuzz(kind, arguments.count, arguments.seed, say=lambda text: print(text, flush=True))[1]
    print("\n".join(found) or "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
