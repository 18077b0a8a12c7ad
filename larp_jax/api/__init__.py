"""The Python interface: trained tokenizers, which encode and decode, and trained generators, which sample codes."""

from larp_jax.api.generator import LoadedFlow, LoadedGenerator
from larp_jax.api.loading import load_checkpoint, load_generator, load_router, load_tokenizer
from larp_jax.api.tokenizer import LoadedTokenizer, blocks_of

__all__ = ["LoadedFlow", "LoadedGenerator", "LoadedTokenizer", "blocks_of"]
__all__ += ["load_checkpoint", "load_generator", "load_router", "load_tokenizer"]
