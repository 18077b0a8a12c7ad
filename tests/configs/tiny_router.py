"""A router for the tokenizer of tiny.py:adaptive, for tests: 4 steps of 8 clips. Give config.data.train."""

from larp_jax.config import default_recipe


def get_config():
    """The recipe; what the rewards say is left open."""
    config = default_recipe("router")
    config.steps = 4
    config.log_every = 1
    config.eval_every = 2
    config.save_every = 2
    model = config.model
    model.size = "custom"
    model.input = "differences"
    model.width, model.depth, model.heads, model.patch_size = 16, 1, 2, 16
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.5
    config.data.batch_size = 8
    config.data.eval_clips = 0
    return config
