"""Clips from folders of videos, TFDS data sets and the embedded moving shapes."""

from larp_jax.data.clips import ClipSpec
from larp_jax.data.pipeline import Batches, eval_batches, train_batches
from larp_jax.data.sources import Source, open_source
from larp_jax.data.spec import DataSpec, parse_spec

__all__ = [
    "Batches",
    "ClipSpec",
    "DataSpec",
    "Source",
    "eval_batches",
    "open_source",
    "parse_spec",
    "train_batches",
]
