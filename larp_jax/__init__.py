"""LARP: a video tokenizer with a learned autoregressive generative prior (arXiv 2410.21264), in JAX and Flax NNX."""

import importlib
import typing

from larp_jax.version import __version__

if typing.TYPE_CHECKING:
    from larp_jax.api import LoadedGenerator, LoadedTokenizer, load_generator, load_tokenizer
    from larp_jax.evaluation.evaluate import evaluate

__all__ = ["LoadedGenerator", "LoadedTokenizer", "__version__", "evaluate", "load_generator", "load_tokenizer"]


def __getattr__(name: str):
    # imported on first use, so that `import larp_jax` alone does not import JAX
    if name in __all__:
        module = "larp_jax.evaluation.evaluate" if name == "evaluate" else "larp_jax.api"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
