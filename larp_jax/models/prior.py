"""The autoregressive prior: a small GPT on continuous latents, used only in training.

See LARP, arXiv 2410.21264, section 3.3.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import PriorConfig
from larp_jax.models.dropout import dropout
from larp_jax.models.layers import Block, Dtype, LayerNorm, Linear, run_stack, stack
from larp_jax.models.packing import Layout
from larp_jax.models.quantizer import normalize


class Prior(nnx.Module):
    """Predicts the direction of the next latent from the latents before it.

    Linear layers are initialized Xavier-uniform: the released code initializes the prior as part of the tokenizer.

    Args:
      config: size, dropout.
      num_tokens: N, or the most codes of a block; also the number of rows of the position table, unless
        `config.positions` is above 0.
      code_dim: d, width of the latents.
      blocks: T; with several, each block has a learned vector that is added to the positions of its codes.
      rngs: `params` stream for the initial weights.
      remat: see `larp_jax.models.layers.run_stack`.
      dtype: dtype of the computation; the output is float32.
    """

    def __init__(
        self,
        config: PriorConfig,
        num_tokens: int,
        code_dim: int,
        *,
        blocks: int = 1,
        rngs: nnx.Rngs,
        remat: str = "none",
        dtype: Dtype = jnp.float32,
    ):
        self.config = config
        self.in_linear = Linear(code_dim, config.width, rngs=rngs, dtype=dtype)
        rows = config.positions or num_tokens
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, config.width), jnp.float32))
        self.block_table = nnx.data(None)
        if blocks > 1:
            self.block_table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (blocks, config.width), jnp.float32))
        self.blocks = stack(
            config.depth,
            lambda r: Block(
                config.width,
                config.heads,
                rngs=r,
                causal=True,
                separate_qkv=True,
                attention_dropout=config.dropout,
                residual_dropout=config.dropout,
                dtype=dtype,
            ),
            rngs,
        )
        self.norm = LayerNorm(config.width, epsilon=1e-5, dtype=dtype)
        self.head = Linear(config.width, code_dim, rngs=rngs, dtype=dtype)
        self.remat = remat

    def __call__(
        self, latents: jax.Array, *, key: jax.Array | None = None, layout: Layout | None = None
    ) -> jax.Array:
        """Latents [B, n <= N, d] -> unit vectors [B, n, d] float32: output i predicts token i + 1.

        `key` turns on dropout; `layout` is that of the latents if they are packed.
        """
        embed_key, block_key = (None, None) if key is None else jax.random.split(key)
        x = self.in_linear(latents)
        if layout is None:
            x = x + self.positions[: x.shape[1]]
        else:
            x = x + self.positions[...][layout.place]
            if self.block_table is not None:
                x = x + jnp.take(self.block_table[...], layout.block, axis=0, mode="clip")
        x = dropout(x, self.config.dropout, embed_key)
        x = run_stack(self.blocks, x, remat=self.remat, key=block_key)
        return normalize(self.head(self.norm(x)).astype(jnp.float32))
