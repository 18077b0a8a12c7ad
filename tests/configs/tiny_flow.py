"""A flow generator for the variant `kl` of tiny.py, for tests: 6 steps of 8 clips. Give config.tokenizer."""

from larp_jax.config import default_recipe


def get_config():
    """The recipe; what the tokenizer and the data tell is left open."""
    config = default_recipe("flow")
    config.steps = 6
    config.log_every = 1
    config.eval_every = 3
    config.save_every = 2
    model = config.model
    model.width, model.depth, model.heads = 16, 1, 2
    model.num_tokens = model.code_dim = model.num_classes = 0
    config.cond_frames = 3
    config.statistics_clips = 12
    config.optim.learning_rate = 1e-2
    config.optim.ema_decay = 0.9
    config.data.train = "moving_shapes"
    config.data.eval = "moving_shapes:test"
    config.data.batch_size = 8
    config.data.eval_clips = 12
    return config
