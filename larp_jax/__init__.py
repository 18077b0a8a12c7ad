"""LARP: a video tokenizer with a learned autoregressive generative prior (arXiv 2410.21264), in JAX and Flax NNX."""

from larp_jax.version import __version__

__all__ = ["__version__"]
