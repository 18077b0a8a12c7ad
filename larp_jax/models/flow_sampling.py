"""Sampling from a flow generator: one compiled program from noise to latents, for any number of steps."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from larp_jax.models.condition import Condition
from larp_jax.models.flow import Flow, noise_of
from larp_jax.models.sampling import Plan, guide, guided_conditions, interleaved

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class SampledLatents(NamedTuple):
    """Sampled latents.

    Attributes:
      latents: [B, N, d] float32.
      passes: number of passes through the network, int32.
    """

    latents: jax.Array
    passes: jax.Array

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Arrays by name, as of `larp_jax.data.codes.read_shard`."""
        return {"latents": self.latents}


def sample_latents(
    flow: Flow,
    condition: Condition,
    indices: jax.Array,
    key: jax.Array,
    scalars: Mapping[str, jax.Array],
    plan: Plan,
) -> SampledLatents:
    """Samples latents (standardized); to be jitted, with `plan` static.

    Row i depends on `key`, `indices[i]` and its condition, not on the rows beside it.

    Args:
      flow: the network; parameters best in its dtype already, see `larp_jax.models.sampling.cast_params`.
      condition: the parts that the configuration asks for, of B rows.
      indices: [B] int, which sample of the key each row is.
      key: of the noise.
      scalars: of `SamplingOptions.scalars`.
      plan: of `SamplingOptions.plan`.
    """
    conditions = guided_conditions(condition, plan)
    whole, groups = jax.tree.map(interleaved, *conditions), len(conditions)

    def velocity(x, time):
        times = jnp.full(len(x) * groups, time)
        rows = flow(interleaved(*[x] * groups), times, whole)
        return guide([rows[i::groups] for i in range(groups)], scalars, plan)

    noise = noise_of(jax.vmap(lambda i: jax.random.fold_in(key, i))(indices), flow.config.token_shape)
    solve = {"euler": euler, "heun": heun}[plan.solver]
    return SampledLatents(*solve(velocity, noise, scalars["solver_steps"]))


def euler(velocity: Velocity, x: jax.Array, steps: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Integrates dx/dt = v(x, t) from t = 1 to 0 by Euler's method: (x at 0, number of evaluations of v).

    Args:
      velocity: `velocity(x, t)` for x [B, ...] and a scalar t.
      x: at t = 1.
      steps: number of equal steps, at least 1; int32 scalar, may be traced.
    """
    steps = jnp.asarray(steps, jnp.int32)

    def step(i, x):
        return x - velocity(x, 1.0 - i / steps) / steps

    return jax.lax.fori_loop(0, steps, step, x), steps


def heun(velocity: Velocity, x: jax.Array, steps: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """What `euler` does, by Heun's method; the last step is Euler's (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    Training sees no times close to 0, where Heun's method would evaluate the velocity a last time. The loop is over
    evaluations, first at the start and then at the end of a step, so that the program contains the network once.
    """
    steps = jnp.asarray(steps, jnp.int32)

    def evaluate(i, carry):
        x, start, slope = carry
        v = velocity(x, 1.0 - (i + 1) // 2 / steps)
        first = i % 2 == 0
        slope = jnp.where(first, v, slope)
        start = jnp.where(first, x, start)
        return start - 0.5 * (slope + v) / steps, start, slope

    count = 2 * steps - 1
    return jax.lax.fori_loop(0, count, evaluate, (x, x, jnp.zeros_like(x)))[0], count
