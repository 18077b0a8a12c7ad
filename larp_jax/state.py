"""What a training run carries from step to step."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; plain nested dictionaries of arrays, so it can be sharded and saved as it is.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: parameters by module (`tokenizer`, `prior`, ...), float32.
      opt_state: what the optimizers carry, by name.
      ema: moving average of the modules in `params` that outlive training; empty where none is kept.
    """

    step: jax.Array
    params: dict
    opt_state: dict
    ema: dict
