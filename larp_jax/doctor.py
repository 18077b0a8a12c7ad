"""What is installed, what it runs on, what is missing, and how to get it: the text of `larp-jax doctor`."""

import collections
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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
    "einops",
    "ml-collections",
    "numpy",
)

# Pairs that install together and fail: (package, versions, other package, its versions, how to mend).
BROKEN_PAIRS = (
    ("flax", "<0.12.10", "jax", ">=0.11", "pip install 'flax>=0.12.10' (needs Python 3.12), or 'jax<0.11'"),
    ("flax", ">=0.12.10", "jax", "<0.11", "pip install 'jax>=0.11.2' (needs Python 3.12), or 'flax<0.12.10'"),
)

# (package, what it is for, what to give to pip install).
OPTIONAL_PACKAGES = (
    ("tensorflow", "TensorBoard summaries; TFDS data sets that only TensorFlow can read", "-e '.[tensorboard]'"),
    ("tensorboard", "TensorBoard summaries", "-e '.[tensorboard]'"),
    ("huggingface_hub", "importing released weights by their repository id", "huggingface_hub"),
    ("torch", "comparisons with PyTorch in the tests; never needed to run", "torch"),
    ("libtpu", "TPUs; planning for TPU pods on any machine", "-e '.[tpu]'"),
)


def report() -> str:
    """Versions, devices, version pairs that break and optional parts, as text to print.

    Never raises: what cannot be found out is said in its place.
    """
    sections = {
        f"larp_jax {__version__}": _system,
        "Packages": _packages,
        "Version conflicts": _conflicts,
        "Devices": _devices,
        "Optional parts": _optional_parts,
        "Weights for metrics": _weights,
    }
    return "\n\n".join("\n".join([title, *_lines(section)]) for title, section in sections.items())


def _lines(section: Callable[[], Iterator[str]]) -> list[str]:
    """The section's lines, indented; the error as a last line where it fails."""
    lines = []
    try:
        for line in section():
            lines.append(f"  {line}")
    except Exception as error:  # a report on broken installations must survive them
        lines.append(f"  could not be found out: {type(error).__name__}: {error}")
    return lines


def _version(package: str) -> str | None:
    # TensorFlow is published under several names.
    for name in (package, f"{package}-cpu") if package == "tensorflow" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _within(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _system() -> Iterator[str]:
    yield f"Python {platform.python_version()} at {sys.executable}"
    yield platform.platform()


def _packages() -> Iterator[str]:
    for package in PACKAGES:
        yield f"{package:<20} {_version(package) or 'missing'}"


def _conflicts() -> Iterator[str]:
    conflicts = [*_broken_pairs(), *_unmet_requirements()]
    yield from conflicts or ["none"]


def _broken_pairs() -> Iterator[str]:
    for package, versions, other, other_versions, mend in BROKEN_PAIRS:
        version, other_version = _version(package), _version(other)
        if version is None or other_version is None:
            continue
        if _within(version, versions) and _within(other_version, other_versions):
            yield f"{package} {version} does not work with {other} {other_version}: {mend}"


def _unmet_requirements() -> Iterator[str]:
    try:
        requirements = importlib.metadata.requires("larp_jax") or ()
    except importlib.metadata.PackageNotFoundError:
        yield "larp_jax itself is not installed: pip install -e . in its repository"
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not _within(version, str(requirement.specifier)):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield f"{requirement.name} {version or 'is missing'}: pip install '{wanted}'"


def _devices() -> Iterator[str]:
    import jax

    devices = jax.devices()
    for (kind, process), count in collections.Counter((d.device_kind, d.process_index) for d in devices).items():
        yield f"{count} x {kind}" + (f" (process {process})" if jax.process_count() > 1 else "")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA driver, which JAX does not use: pip install -e '.[cuda]'"


def _optional_parts() -> Iterator[str]:
    for package, purpose, source in OPTIONAL_PACKAGES:
        version = _version(package)
        yield f"{package:<20} " + (version or f"missing: {purpose}; pip install {source}")
    yield f"{'H.264 encoder':<20} " + (_h264_encoder() or "missing: mp4 files; pip install --force-reinstall av")


def _weights() -> Iterator[str]:
    from larp_jax import perceptual

    for kind in perceptual.KINDS:
        path, origin = perceptual.locate(kind)
        yield f"{kind:<20} " + (
            f"found at {path} ({origin})" if path.is_file() else
            f"missing: looked for at {path} ({origin}); {perceptual.how_to_get(kind)}"
        )  # fmt: skip


def _h264_encoder() -> str | None:
    """Name of PyAV's encoder, None without one."""
    try:
        import av

        return av.codec.Codec("h264", "w").name
    except Exception:  # PyAV is missing, cannot be loaded, or was built without H.264
        return None
