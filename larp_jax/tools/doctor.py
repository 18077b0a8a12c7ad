"""Installed versions, devices, problems and their fixes: the text of `larp-jax doctor`."""

import collections
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from larp_jax.errors import InputError
from larp_jax.runtime import distributed
from larp_jax.version import __version__

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "clu",
    "av",
    "safetensors",
    "huggingface_hub",
    "einops",
    "ml-collections",
    "numpy",
)

# Versions that can be installed together but fail: (package, versions, other package, its versions, fix).
BROKEN_PAIRS = (
    ("flax", "<0.12.10", "jax", ">=0.11", "pip install 'flax>=0.12.10' (needs Python 3.12), or 'jax<0.11'"),
    ("flax", ">=0.12.10", "jax", "<0.11", "pip install 'jax>=0.11.2' (needs Python 3.12), or 'flax<0.12.10'"),
)

# CUDA plugins of JAX: (package, extra of jax that installs it, oldest driver that its CUDA supports).
CUDA_PLUGINS = (("jax-cuda12-plugin", "cuda12", 525), ("jax-cuda13-plugin", "cuda13", 580))

# FFmpeg codecs, by FFmpeg's names; libdav1d decodes AV1.
DECODERS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "libdav1d", "mjpeg")
ENCODERS = ("h264", "mjpeg", "png")

# (package, purpose, arguments of pip install).
OPTIONAL_PACKAGES = (
    ("tensorboardX", "writing metrics and pictures for TensorBoard", "tensorboardX tensorboard"),
    ("wandb", "reporting runs to Weights & Biases (config.tracker='wandb')", "wandb pillow"),
    ("mlflow", "reporting runs to MLflow (config.tracker='mlflow')", "mlflow"),
    ("tensorflow", "TFDS data sets that only TensorFlow can read", "tensorflow-cpu"),
    ("gcsfs", "gs:// for workdirs, checkpoints, codes and outputs", "gcsfs"),
    ("gradio", "the page of larp-jax demo", "gradio"),
    ("torch", "larp_jax.torch_reader, which reads exported tokenizers without JAX", "torch"),
    ("libtpu", "TPUs; larp-jax plan --topology on any machine", "'jax[tpu]'"),
)

DEVICE_FILES = pathlib.Path("/dev")
NVIDIA_VERSION = pathlib.Path("/proc/driver/nvidia/version")
BUSY = 0.1  # memory use of other processes above this share of a GPU is reported


def report() -> str:
    """Problems, versions, devices and optional parts, as text to print.

    Never raises: a part that fails is replaced by its error.
    """
    sections = {
        f"larp_jax {__version__}": [_system],
        # memory first: JAX allocates GPU memory as soon as it is asked for devices
        "Problems": [_broken_pairs, _unmet_requirements, _gpu_memory, _backends, _tensorflow, _gpus, _tpus, _codecs],
        "Packages": [_packages],
        "Devices": [_devices],
        "Optional parts": [_optional_parts],
        "Weights of networks": [_weights],
    }
    return "\n\n".join("\n".join([title, *(_lines(parts) or ["  none"])]) for title, parts in sections.items())


def _lines(parts: Iterable[Callable[[], Iterator[str]]]) -> list[str]:
    """The indented lines of the parts of a section; a part that fails ends with its error."""
    lines = []
    for part in parts:
        try:
            for line in part():
                lines.append(f"  {line}")
        except Exception as error:  # broken installations must not break the report
            lines.append(f"  check failed: {type(error).__name__}: {error}")
    return lines


def _version(package: str) -> str | None:
    # TensorFlow is published under several names
    for name in (package, f"{package}-cpu") if package == "tensorflow" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _wanted(package: str, other: str) -> str:
    """The versions of package `other` that `package` requires, also in its extras; empty if it does not."""
    found = (Requirement(text) for text in importlib.metadata.requires(package) or ())
    return next((str(r.specifier) for r in found if r.name == other), "")


def _within(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _system() -> Iterator[str]:
    yield f"Python {platform.python_version()} at {sys.executable}"
    yield platform.platform()


def _packages() -> Iterator[str]:
    for package in PACKAGES:
        yield f"{package:<20} {_version(package) or 'missing'}"


# ------------------------------------------------------------------------------------------------------------ problems


def _broken_pairs() -> Iterator[str]:
    for package, versions, other, other_versions, fix in BROKEN_PAIRS:
        version, other_version = _version(package), _version(other)
        if version is None or other_version is None:
            continue
        if _within(version, versions) and _within(other_version, other_versions):
            yield f"{package} {version} does not work with {other} {other_version}: {fix}"


def _unmet_requirements() -> Iterator[str]:
    """Unmet requirements of larp_jax and its dependencies: pip does not check them when another package changes."""
    if _version("larp_jax") is None:
        yield "larp_jax is not installed: run pip install -e . in its repository"
    wanted: dict[str, SpecifierSet] = {}  # versions that satisfy every dependent, by package
    unmet: dict[str, str] = {}  # a dependent that the installed version does not satisfy, by package
    for package in ("larp_jax", *PACKAGES):
        try:
            requirements = importlib.metadata.requires(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            name, version = requirement.name, _version(requirement.name)
            wanted[name] = wanted.get(name, SpecifierSet()) & requirement.specifier
            if version is None or not _within(version, str(requirement.specifier)):
                unmet.setdefault(name, package)
    for name, package in unmet.items():
        yield f"{name} {_version(name) or 'is missing'}: pip install '{name}{wanted[name]}', which {package} needs"


def _gpu_files() -> list[pathlib.Path]:
    """Device files of NVIDIA GPUs; WSL has one for all GPUs."""
    return sorted(DEVICE_FILES.glob("nvidia[0-9]*")) or sorted(DEVICE_FILES.glob("dxg"))


def _driver() -> int | None:
    """Major version of the loaded NVIDIA driver; None if there is none."""
    text = NVIDIA_VERSION.read_text() if NVIDIA_VERSION.exists() else ""
    found = re.search(r"Kernel Module.*?\s(\d+)\.\d", text)
    return int(found[1]) if found else None


def _gpus() -> Iterator[str]:
    """Reasons why JAX does not find an existing NVIDIA GPU."""
    files, driver = _gpu_files(), _driver()
    if not files and driver is None and not shutil.which("nvidia-smi"):
        return
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if not files:
        yield (
            f"found an NVIDIA driver but no device file in {DEVICE_FILES}: start the container with --gpus all (docker)"
            " or --nv (apptainer); outside a container, run nvidia-modprobe"
        )
    for path in files:
        if not os.access(path, os.R_OK | os.W_OK):
            yield f"no permission to open {path}: add this user to the group that owns it (ls -l {path})"
    installed = [(*plugin, _version(plugin[0])) for plugin in CUDA_PLUGINS if _version(plugin[0])]
    if not installed:
        best = [extra for _, extra, oldest in CUDA_PLUGINS if driver is None or driver >= oldest] or ["cuda12"]
        yield f"found an NVIDIA GPU, but jax has no CUDA plugin: pip install 'jax[{best[0]}]=={jax}'"
    if len(installed) > 1:
        names = " and ".join(name for name, *_ in installed)
        yield f"{names} are both installed and conflict: pip uninstall one of them"
    for name, extra, oldest, version in installed:
        if version and jaxlib and Version(version).release != Version(jaxlib).release:  # as jaxlib compares
            yield f"{name} {version} is ignored by jaxlib {jaxlib}: pip install 'jax[{extra}]=={jax}'"
        if driver is not None and driver < oldest:
            yield f"driver {driver} is too old for {name}, which needs {oldest}: install a newer driver"
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        yield f"JAX_PLATFORMS={platforms} excludes the GPU: unset JAX_PLATFORMS"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        yield f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: unset CUDA_VISIBLE_DEVICES"
    if files and installed and _backend() == "cpu" and os.environ.get("LD_LIBRARY_PATH"):
        yield "LD_LIBRARY_PATH is set, so the CUDA plugin may load libraries other than its own: unset it"


def _backend() -> str:
    """The platform that JAX computes on; empty if there is none, which `_backends` reports."""
    import jax

    try:
        return jax.default_backend()
    except Exception:  # RuntimeError, AssertionError and others
        return ""


def _backends() -> Iterator[str]:
    """The reason why JAX has no device."""
    try:
        distributed.check_devices()
    except InputError as error:
        yield str(error).removesuffix(", or see larp-jax doctor")


def _tpus() -> Iterator[str]:
    if any(DEVICE_FILES.glob("accel[0-9]*")) and _version("libtpu") is None:
        yield f"found a TPU, but jax has no libtpu: pip install 'jax[tpu]=={_version('jax')}'"
    if (libtpu := _version("libtpu")) and (wanted := _wanted("jax", "libtpu")) and not _within(libtpu, wanted):
        yield (
            f"libtpu {libtpu} is installed, but jax {_version('jax')} needs libtpu{wanted}: some programs fail to"
            f" compile; pip install 'jax[tpu]=={_version('jax')}'"
        )


def _gpu_memory() -> Iterator[str]:
    """GPU memory used by other processes, such as TensorFlow, which allocates all of it."""
    for index, used, total in _nvidia_smi("gpu=index,memory.used,memory.total"):
        if float(used) > BUSY * float(total):
            rows = _nvidia_smi("compute-apps=pid,process_name,used_memory")
            holders = ", ".join(f"{name} (process {pid}, {mib} MiB)" for pid, name, mib in rows) or "unknown processes"
            yield (
                f"GPU {index}: {used} of {total} MiB are in use (on all GPUs by {holders}); JAX allocates three"
                " quarters at start: end those processes, or set XLA_PYTHON_CLIENT_PREALLOCATE=false"
            )


def _nvidia_smi(query: str) -> list[list[str]]:
    """Rows of a query; none if nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return [line.split(", ") for line in result.stdout.splitlines()] if result.returncode == 0 else []


def _tensorflow() -> Iterator[str]:
    try:
        version = importlib.metadata.version("tensorflow")
    except importlib.metadata.PackageNotFoundError:
        return
    if _gpu_files() and os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH") != "true":
        yield (
            f"tensorflow {version} is built for GPUs and allocates all their memory when imported (larp_jax prevents"
            " this, other code may not): pip uninstall -y tensorflow && pip install tensorflow-cpu"
        )


def _codecs() -> Iterator[str]:
    try:
        import av
    except Exception as error:  # not only ImportError: also shared libraries of the wrong version
        yield f"videos can be neither read nor written, PyAV fails ({error}): pip install --force-reinstall av"
        return
    for what, mode, names in (("decoders", "r", DECODERS), ("encoders", "w", ENCODERS)):
        if missing := [name for name in names if not _has_codec(av, name, mode)]:
            yield f"PyAV lacks the {what} {', '.join(missing)}: pip install --force-reinstall --only-binary av av"


def _has_codec(av, name: str, mode: str) -> bool:
    try:
        return bool(av.codec.Codec(name, mode))
    except Exception:  # its type depends on the version of PyAV
        return False


# --------------------------------------------------------------------------------------------------------------- state


def _devices() -> Iterator[str]:
    import jax

    devices = jax.devices()
    for (kind, process), count in collections.Counter((d.device_kind, d.process_index) for d in devices).items():
        yield f"{count} x {kind}" + (f" (process {process})" if jax.process_count() > 1 else "")


def _optional_parts() -> Iterator[str]:
    for package, purpose, source in OPTIONAL_PACKAGES:
        version = _version(package)
        yield f"{package:<20} " + (version or f"missing: {purpose}; pip install {source}")


def _weights() -> Iterator[str]:
    from larp_jax.config.teachers import TEACHERS
    from larp_jax.weights import networks

    for kind in networks.KINDS:
        path, origin = networks.locate(kind)
        yield f"{kind:<20} " + (
            f"found at {path} ({origin})" if path.is_file() else
            f"missing: expected at {path} ({origin}); {networks.how_to_get(kind)}"
        )  # fmt: skip
    named = {networks.locate(kind)[0] for kind in networks.KINDS}  # the file of LPIPS contains a teacher
    places = {name: place for name in TEACHERS if (place := networks.locate(name))[0] not in named}
    for name, (path, origin) in places.items():
        if path.is_file():
            yield f"{name:<20} found at {path} ({origin})"
    if missing := [name for name, (path, _) in places.items() if not path.is_file()]:
        yield f"{'teachers':<20} missing: {', '.join(missing)}; {networks.how_to_get(missing[0])}, and so on"
