"""A generator of size S to benchmark sampling: 12 layers, width 384, 256 tokens, codebook size 8,192.

    larp-jax benchmark sample --config configs/generator_s.py --batch-size 8 --cfg-scale 1.25
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe."""
    config = default_recipe("generator")
    config.model.size = "S"
    config.model.num_tokens = 256
    return config
