"""The state of training."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step updates: nested dictionaries of arrays, which can be sharded and saved directly.

    Attributes:
      step: int32 scalar, the number of finished optimizer steps.
      params: parameters by module (`tokenizer`, `prior`, ...), float32.
      opt_state: states of the optimizers, by name.
      ema: exponential moving average of the modules in `params` that are used after training; empty if turned off.
    """

    step: jax.Array
    params: dict
    opt_state: dict
    ema: dict
