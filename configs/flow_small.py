"""A small flow generator of continuous latents, and the tokenizer that it is for; both train on two CPU cores.

    larp-jax train --config configs/flow_small.py:tokenizer --workdir runs/latents
    larp-jax tokenize --checkpoint runs/latents --input moving_shapes/plain:train --output runs/latents_codes \
        --windows 4 --flips
    larp-jax train --config configs/flow_small.py --workdir runs/flow

Clips of 8x32x32 become 16 latents of 8 channels. Other tokenizers with continuous latents will do: give
--config.tokenizer, and data that they encoded.
"""

from larp_jax.config import default_recipe, experiment_recipes


def get_config(variant=""):
    """The recipe of the generator, or with the variant `tokenizer` that of its tokenizer."""
    if variant not in ("", "tokenizer"):
        raise ValueError(f"variant {variant!r} is not known, only 'tokenizer' is")
    return tokenizer() if variant else generator()


def tokenizer():
    """The tokenizer of the experiments, with a Gaussian bottleneck in place of codes."""
    config, _ = experiment_recipes()
    config.model.quantizer.kind, config.model.quantizer.kl_weight = "kl", 1e-5
    config.loss.prior_weight = 0.0
    config.start.continuous_steps = config.start.ramp_steps = 0
    config.optim.multipliers = {"tokenizer/decoder/head": 10.0}  # the head starts at zero
    config.optim.ema_decay = 0.99
    return config


def generator():
    """A DiT of 1.3 M parameters."""
    config = default_recipe("flow")
    config.tokenizer = "runs/latents"
    config.steps = 3000

    model = config.model
    model.size = "custom"
    model.width, model.depth, model.heads = 96, 3, 4
    model.num_tokens = model.code_dim = model.num_classes = 0  # taken from tokenizer and data

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.warmup_steps = 100
    optim.floor = 0.05  # few steps end better with a rate that decays
    optim.ema_decay = 0.995

    config.data.train = "tokens:runs/latents_codes"
    config.data.eval = "moving_shapes/plain:test"
    config.data.batch_size = 32
    config.data.eval_clips = 128
    config.log_every = 50
    config.eval_every = config.save_every = 500
    return config
