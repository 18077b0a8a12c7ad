"""A small tokenizer that trains on two CPU cores.

    larp-jax train --config configs/quickstart.py --workdir runs/quickstart

Your own clips: --config.data.train=folder:PATH --config.data.eval=folder:PATH.
"""

from larp_jax.config import default_recipe


def get_config():
    """64x64x16 clips, 64 tokens of 10 bits."""
    config = default_recipe("tokenizer")
    config.data.train = "moving_shapes:train"
    config.data.eval = "moving_shapes:test"
    return config
