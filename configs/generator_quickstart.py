"""A small class-conditional generator for tokenizers trained with configs/quickstart.py; trains on two CPU cores.

    larp-jax tokenize --checkpoint runs/quickstart --input moving_shapes/plain:train --output runs/quickstart_codes \
        --windows 4 --flips
    larp-jax train --config configs/generator_quickstart.py --workdir runs/quickstart_generator

For your own clips, use --input folder:PATH for tokenize, and --config.data.eval=folder:PATH with held-out clips.
Subfolders are the classes. Codes are written in advance, so that a training step computes only the generator.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe."""
    config = default_recipe("generator")
    config.tokenizer = "runs/quickstart"
    config.steps = 5000

    model = config.model
    model.size = "custom"
    model.width, model.depth, model.heads = 128, 4, 4
    model.mlp_multiple = 32
    model.codebook_size = model.num_tokens = model.num_classes = 0  # taken from tokenizer and data
    # a few videos are soon memorized: more dropout than published
    model.token_dropout = model.residual_dropout = model.mlp_dropout = 0.1
    # the published 0.02 is for ten times the width; with it, and a rate of 1e-3, this model learns half as fast
    model.init_std = model.width**-0.5

    optim = config.optim
    optim.kind = "muon"
    optim.learning_rate = 3e-3
    optim.warmup_steps = 100
    optim.ema_decay = 0.99

    config.data.train = "tokens:runs/quickstart_codes"
    config.data.eval = "moving_shapes/plain:test"
    config.data.batch_size = 16
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 500
    config.save_every = 500
    return config
