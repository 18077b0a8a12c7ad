"""A small flow generator for tokenizers trained with configs/latents.py; trains on two CPU cores.

    larp-jax tokenize --checkpoint runs/latents --input moving_shapes/plain:train --output runs/latents_codes \
        --windows 4 --flips
    larp-jax train --config configs/flow_small.py --workdir runs/flow

Other tokenizers with continuous latents will do, such as that of configs/vitok_small.py: give --config.tokenizer, and
data that it encoded.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe: a DiT of 1.3 M parameters."""
    config = default_recipe("flow")
    config.tokenizer = "runs/latents"
    config.steps = 3000

    model = config.model
    model.size = "custom"
    model.width, model.depth, model.heads = 128, 4, 4
    model.num_tokens = model.code_dim = model.num_classes = 0  # taken from tokenizer and data

    optim = config.optim
    optim.kind = "muon"  # learns more per step than AdamW
    optim.learning_rate = 2e-3
    optim.warmup_steps = 100
    optim.floor = 0.05  # few steps end better with a rate that decays
    optim.ema_decay = 0.995

    config.data.train = "tokens:runs/latents_codes"
    config.data.eval = "moving_shapes/plain:test"
    config.data.batch_size = 32
    config.data.eval_clips = 128
    config.log_every = 50
    config.eval_every = config.save_every = 1000
    return config
