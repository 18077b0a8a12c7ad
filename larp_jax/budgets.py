"""Which numbers of codes suit a clip: the quality of every assignment, or the fewest codes that reach a quality.

Blocks are coded one by one. A block depends on those before only through their keys and values, so assignments that
begin alike share these blocks: they are a tree, whose nodes are prefixes. The 625 assignments of 4 blocks with 5
numbers of codes take 5 + 25 + 125 + 625 = 780 blocks instead of 2,500.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.config import AUTO, Assignment, Greedy, Ladder, RouterConfig, TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.metrics import SMALLEST_MSE
from larp_jax.models import packing
from larp_jax.models.lpips import Lpips
from larp_jax.models.pixels import as_float_video
from larp_jax.models.router import Router
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng
from larp_jax.weights import networks


def _code_block(
    tokenizer: Tokenizer, lpips: Lpips | None, past: Sequence, video: jax.Array, lengths: jax.Array
) -> tuple[dict[str, jax.Array], tuple]:
    """Codes the block after `past`, with deterministic codes.

    Args:
      tokenizer: with a ladder.
      lpips: to measure LPIPS besides the error.
      past: memory of the blocks before.
      video: [B, T, H, W, C] uint8, or floats in [0, 1].
      lengths: [B] int32, numbers of codes of the block.

    Returns:
      Means over the block's frames, [B] each: `mse` and maybe `lpips`; and the memory of the block.
    """
    size = tokenizer.config.frames // tokenizer.config.blocks
    frames = as_float_video(video[:, len(past) * size :][:, :size])
    _, reconstruction, memory = tokenizer.extend(frames, lengths, past)
    reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
    errors = {"mse": jnp.square(reconstruction - frames).mean((1, 2, 3, 4))}
    if lpips is not None:
        pairs = (x.reshape(-1, *x.shape[2:]) for x in (reconstruction, frames))
        errors["lpips"] = lpips.distance(*pairs).reshape(-1, size).mean(axis=1)
    return errors, memory


class Assigner:
    """How many codes the blocks of clips get under a budget.

    Args:
      config: of the tokenizer.
      budget: an assignment for all clips, `AUTO`, or `Greedy`; None for a tokenizer without a ladder.
      module: `module(params)` returns the tokenizer.
      router: the router's module and parameters, for `AUTO`.

    Attributes:
      fixed: the assignment of all clips; None if clips differ, or if there is no ladder.
      params: the parameters that a call needs besides those of the tokenizer, by name of the module.

    Raises:
      InputError: there is no router, or it is of another ladder; or weights of LPIPS are missing.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        budget: Assignment | Greedy | str | None,
        module: Callable[[Mapping], Tokenizer],
        router: tuple[Router, Mapping] | None = None,
    ):
        self.fixed = budget if isinstance(budget, tuple) else None
        self.params: dict[str, Mapping] = {}
        self._budget, self._module, self._graphdefs = budget, module, {}
        if budget == AUTO:
            if router is None:
                raise InputError("budget auto needs a router, trained on what larp-jax allocate writes; add --router R")
            check_router(router[0].config, config)
            self._add("router", router[0], router[1])
        elif isinstance(budget, Greedy) and budget.metric == "lpips":
            lpips = networks.load_lpips()
            self._add("lpips", lpips, nnx.to_pure_dict(nnx.state(lpips, nnx.Param)))

    def _add(self, name: str, module: nnx.Module, params: Mapping) -> None:
        self._graphdefs[name], self.params[name] = nnx.graphdef(module), params

    def __call__(self, params: Mapping, video: jax.Array) -> jax.Array | None:
        """Assigns clips; can be traced.

        Args:
          params: those of the tokenizer as `tokenizer`, and `self.params`.
          video: [B, T, H, W, C] uint8, or floats in [0, 1].

        Returns:
          [B, blocks] int32; None without a ladder.
        """
        modules = {name: nnx.merge(graphdef, params[name]) for name, graphdef in self._graphdefs.items()}
        if self.fixed:
            return packing.repeated(self.fixed, len(video))
        if self._budget is None:
            return None
        if isinstance(self._budget, Greedy):
            tokenizer = self._module(params["tokenizer"])
            return greedy_lengths(tokenizer, video, self._budget, modules.get("lpips"))
        return modules["router"].lengths(as_float_video(video))


def check_router(router: RouterConfig, tokenizer: TokenizerConfig) -> None:
    """`InputError` unless a router chooses among the assignments of a tokenizer, for its clips."""
    ours, theirs = (
        f"clips of {'x'.join(map(str, c.clip_shape[:3]))} and model.ladder={','.join(map(str, c.ladder))},"
        f" model.blocks={c.blocks}, model.num_tokens={c.num_tokens}"
        for c in (tokenizer, router)
    )
    if ours != theirs:
        raise InputError(f"the router is for {theirs}; the tokenizer has {ours}; give a router of this tokenizer")


class QualityTree:
    """How well a tokenizer reconstructs clips with every assignment. Compiled once for each block, in float32.

    Args:
      config: of the tokenizer, with a ladder.
      module: `module(params)` returns the tokenizer.
      lpips: the trained network, to measure LPIPS besides PSNR.
    """

    def __init__(self, config: TokenizerConfig, module: Callable[[Mapping], Tokenizer], lpips: Lpips | None = None):
        self._ladder: Ladder = config.adaptive
        self._lpips = lpips

        def code(params, lpips, past, video, lengths):
            errors, memory = _code_block(module(params), lpips, past, video, lengths)
            return errors, memory if len(past) < config.blocks - 1 else None  # no block reads that of the last

        self._code = jax.jit(code)

    @rng.pinned()
    def measure(self, params: Mapping, video: jax.Array | np.ndarray) -> dict[str, np.ndarray]:
        """Measures clips.

        Args:
          params: of the tokenizer.
          video: [B, T, H, W, C] uint8, or floats in [0, 1].

        Returns:
          `psnr` in dB of whole clips, and with the network `lpips`, mean over frames: [B, A] float32 each, in the order
          of `Ladder.assignments`.
        """
        ladder, found = self._ladder, []

        def visit(past, prefix, totals):
            """Depth first: only the memory of one path is kept, and assignments come in their order."""
            for rung in ladder.next_rungs(prefix):
                lengths = jnp.full(len(video), rung, jnp.int32)
                with jax.default_matmul_precision("float32"):
                    errors, memory = self._code(params, self._lpips, past, video, lengths)
                sums = errors if totals is None else jax.tree.map(jnp.add, totals, errors)
                if len(prefix) == ladder.blocks - 1:
                    found.append(sums)
                else:
                    visit((*past, memory), (*prefix, rung), sums)

        visit((), (), None)
        means = {name: np.stack([np.asarray(x[name]) for x in found], axis=1) / ladder.blocks for name in found[0]}
        psnr = -10.0 * np.log10(np.maximum(means.pop("mse"), SMALLEST_MSE))
        return {"psnr": psnr.astype(np.float32)} | {name: x.astype(np.float32) for name, x in means.items()}


def greedy_lengths(tokenizer: Tokenizer, video: jax.Array, goal: Greedy, lpips: Lpips | None = None) -> jax.Array:
    """The fewest codes with which each block reaches a quality, chosen block after block; can be traced.

    A block that does not reach it with any number of codes that the others leave room for gets the largest of them.

    Args:
      tokenizer: with a ladder.
      video: [B, T, H, W, C] uint8, or floats in [0, 1].
      goal: the quality that the frames of each block are to reach.
      lpips: the trained network, if it is an LPIPS.

    Returns:
      Numbers of codes by block, [B, blocks] int32.
    """
    ladder = tokenizer.config.adaptive
    rungs = jnp.asarray(ladder.rungs, jnp.int32)
    most = goal.target if goal.metric == "lpips" else 10.0 ** (-goal.target / 10.0)  # in terms of the error
    error = "lpips" if goal.metric == "lpips" else "mse"
    past: tuple = ()
    room = jnp.full(len(video), ladder.bucket, jnp.int32)
    chosen = []
    for block in range(ladder.blocks):
        code = functools.partial(_code_block, tokenizer, lpips, past, video)
        fits = room[:, None] - (ladder.blocks - block - 1) * ladder.rungs[0] >= rungs  # [B, rungs]

        def unfinished(state, fits=fits):
            number, _, reached, _ = state
            return (number < len(rungs)) & jnp.any(~reached & fits[:, jnp.minimum(number, len(rungs) - 1)])

        def attempt(state, fits=fits, code=code):
            number, lengths, reached, memory = state
            tried = ~reached & fits[:, number]
            lengths = jnp.where(tried, rungs[number], lengths)
            errors, new = code(lengths)
            return number + 1, lengths, reached | (tried & (errors[error] <= most)), _where(tried, new, memory)

        lengths = jnp.full(len(video), rungs[0])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(code, lengths)[1])
        state = jnp.int32(0), lengths, jnp.zeros(len(video), bool), nothing
        _, lengths, _, memory = jax.lax.while_loop(unfinished, attempt, state)
        past, room = (*past, memory), room - lengths
        chosen.append(lengths)
    return jnp.stack(chosen, axis=1)


def _where(rows: jax.Array, new, old):
    """The memory `new` in these rows of the batch, else `old`; keys and values have the batch as second axis."""

    def choose(a, b):
        shape = (-1, 1) if a.dtype == bool else (1, -1, *(1,) * (a.ndim - 2))
        return jnp.where(rows.reshape(shape), a, b)

    return jax.tree.map(choose, new, old)
