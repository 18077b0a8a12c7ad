"""LARP: a video tokenizer with a learned autoregressive generative prior (arXiv 2410.21264), in JAX and Flax NNX."""

import importlib
import typing

from larp_jax.version import __version__

if typing.TYPE_CHECKING:
    from larp_jax.api import LoadedGenerator, LoadedTokenizer, load_generator, load_tokenizer
    from larp_jax.evaluation.evaluate import evaluate
    from larp_jax.inference.stream import Stream

_ABOVE = {"Stream": "inference.stream", "evaluate": "evaluation.evaluate"}  # the modules of what is not in api
__all__ = ["LoadedGenerator", "LoadedTokenizer", "Stream", "__version__"]
__all__ += ["evaluate", "load_generator", "load_tokenizer"]


def __getattr__(name: str):
    # imported on first use, so that `import larp_jax` alone does not import JAX
    if name in __all__:
        return getattr(importlib.import_module(f"larp_jax.{_ABOVE.get(name, 'api')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
