"""What a training run carries from step to step."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; plain nested dictionaries of arrays, so it can be sharded and saved as it is.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: parameters by module (`tokenizer`, `prior`, ...), float32.
      opt_state: the optimiser's state.
      ema: moving average of `params`; empty where none is kept.
    """

    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict
