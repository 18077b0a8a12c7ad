"""Which numbers of codes suit a clip: the quality of every assignment, or the fewest codes that reach a quality.

Blocks are coded one by one. A block depends on those before only through their keys and values, so assignments that
begin alike share these blocks: they are a tree, whose nodes are prefixes. The 625 assignments of 4 blocks with 5
numbers of codes take 5 + 25 + 125 + 625 = 780 blocks instead of 2,500.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import TokenizerConfig
from larp_jax.metrics import SMALLEST_MSE
from larp_jax.models.lpips import Lpips
from larp_jax.models.pixels import as_float_video
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng


class BlockCoder:
    """Codes clips block by block with a tokenizer, and measures how well each block is reconstructed.

    Compiled once for each block, in float32. Codes are deterministic.

    Args:
      config: of the tokenizer, with a ladder.
      module: `module(params)` returns the tokenizer.
      lpips: the trained network, to measure LPIPS besides the error.
    """

    def __init__(self, config: TokenizerConfig, module: Callable[[Mapping], Tokenizer], lpips: Lpips | None = None):
        self.ladder, self._lpips = config.adaptive, lpips
        blocks, size = config.blocks, config.frames // config.blocks

        def code(params, lpips, past, video, lengths):
            frames = as_float_video(video[:, len(past) * size :][:, :size])
            _, reconstruction, memory = module(params).extend(frames, lengths, past)
            reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
            errors = {"mse": jnp.square(reconstruction - frames).mean((1, 2, 3, 4))}
            if lpips is not None:
                pairs = (x.reshape(-1, *x.shape[2:]) for x in (reconstruction, frames))
                errors["lpips"] = lpips.distance(*pairs).reshape(-1, size).mean(axis=1)
            return errors, None if len(past) == blocks - 1 else memory  # no block reads that of the last

        self._code = jax.jit(code)

    def _run(self, params, past, video, lengths):
        with rng.pinned(), jax.default_matmul_precision("float32"):
            return self._code(params, self._lpips, past, video, jnp.asarray(lengths, jnp.int32))

    def qualities(self, params: Mapping, video: jax.Array) -> dict[str, np.ndarray]:
        """How well clips are reconstructed with every assignment.

        Args:
          params: of the tokenizer.
          video: [B, T, H, W, C] uint8, or floats in [0, 1].

        Returns:
          `psnr` in dB of whole clips, and with the network `lpips`, mean over frames: [B, A] float32 each, in the order
          of `Ladder.assignments`.
        """
        ladder, found = self.ladder, []

        def visit(past, prefix, totals):
            """Depth first, so that only the memory of one path is kept."""
            for rung in self._next(prefix):
                errors, memory = self._run(params, past, video, np.full(len(video), rung))
                sums = errors if totals is None else jax.tree.map(jnp.add, totals, errors)
                if len(prefix) == ladder.blocks - 1:
                    found.append(sums)
                else:
                    visit((*past, memory), (*prefix, rung), sums)

        visit((), (), None)
        means = {name: np.stack([np.asarray(x[name]) for x in found], axis=1) / ladder.blocks for name in found[0]}
        psnr = -10.0 * np.log10(np.maximum(means.pop("mse"), SMALLEST_MSE))
        return {"psnr": psnr.astype(np.float32)} | {name: x.astype(np.float32) for name, x in means.items()}

    def _next(self, prefix: tuple[int, ...]) -> list[int]:
        """Numbers of codes that the block after these may have, so that the blocks after it can have the fewest."""
        ladder = self.ladder
        left = ladder.bucket - sum(prefix) - (ladder.blocks - len(prefix) - 1) * ladder.rungs[0]
        return [rung for rung in ladder.rungs if rung <= left]

    def greedy(self, params: Mapping, video: jax.Array, metric: str, target: float) -> np.ndarray:
        """The fewest codes with which each block reaches a quality, chosen block after block.

        A block that does not reach it with any number of codes that the others leave room for gets the largest.

        Args:
          params: of the tokenizer.
          video: [B, T, H, W, C] uint8, or floats in [0, 1].
          metric: `psnr` or `lpips`.
          target: the quality, of the frames of a block.

        Returns:
          Lengths of the blocks, [B, T] int32.
        """
        ladder = self.ladder
        chosen, past = np.zeros((len(video), ladder.blocks), np.int32), ()
        most = target if metric == "lpips" else 10.0 ** (-target / 10.0)  # in terms of the error
        for block in range(ladder.blocks):
            reached, memory = np.zeros(len(video), bool), None
            room = ladder.bucket - chosen.sum(axis=1) - (ladder.blocks - block - 1) * ladder.rungs[0]
            for rung in ladder.rungs:
                tried = ~reached & (rung <= room)
                if not tried.any():
                    break
                chosen[:, block] = np.where(tried, rung, chosen[:, block])
                errors, new = self._run(params, past, video, chosen[:, block])
                memory = new if memory is None else _where(tried, new, memory)
                reached |= tried & (np.asarray(errors["mse" if metric == "psnr" else metric]) <= most)
            past = (*past, memory)
        return chosen


def _where(rows: np.ndarray, new, old):
    """The memory `new` in these rows of the batch, else `old`; arrays of a stack have the batch as second axis."""

    def choose(a, b):
        batch = 0 if a.dtype == bool else 1
        return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - 1 - batch)), a, b)

    return jax.tree.map(choose, new, old)
