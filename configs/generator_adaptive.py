"""A small generator for the tokenizer of configs/adaptive.py, which also decides how many codes each block gets.

    larp-jax tokenize --checkpoint runs/adaptive --input moving_shapes/busy:train --output runs/adaptive_codes \
        --budget auto --router runs/adaptive_router
    larp-jax tokenize --checkpoint runs/adaptive --input moving_shapes/busy:test --output runs/adaptive_test \
        --budget auto --router runs/adaptive_router
    larp-jax train --config configs/generator_adaptive.py --workdir runs/adaptive_generator

It trains on two CPU cores, and learns the numbers of codes that the router chose for the clips (docs/adaptive.md).
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe."""
    config = default_recipe("generator")
    config.tokenizer = "runs/adaptive"
    config.steps = 2000

    model = config.model
    model.size = "custom"
    model.width, model.depth, model.heads = 128, 4, 4
    model.mlp_multiple = 32
    # taken from the codes, and so are the blocks and the ladder
    model.codebook_size = model.num_tokens = model.num_classes = 0
    model.init_std = model.width**-0.5  # as in configs/generator_quickstart.py

    optim = config.optim
    optim.learning_rate = 3e-3
    optim.warmup_steps = 100
    optim.ema_decay = 0.99

    config.data.train = "tokens:runs/adaptive_codes"
    config.data.eval = "tokens:runs/adaptive_test"
    config.data.batch_size = 16
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 250
    config.save_every = 250
    return config
