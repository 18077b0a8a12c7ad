"""A small LARP tokenizer with continuous latents in place of codes: clips of 8x32x32 as 16 latents of 8 floats.

    larp-jax train --config configs/latents.py --workdir runs/latents

It is the tokenizer of the experiments (docs/experiments.md) with the KL bottleneck, Muon, more layers and more steps.
It trains in minutes on two CPU cores. configs/flow_small.py is a generator for it.
"""

from larp_jax.config import experiment_recipes


def get_config():
    """The recipe."""
    config, _ = experiment_recipes()
    config.steps = 2400
    config.model.encoder.width, config.model.decoder.width, config.model.decoder.depth = 96, 128, 3
    config.model.quantizer.kind, config.model.quantizer.kl_weight = "kl", 1e-5
    config.loss.prior_weight = 0.0
    config.start.continuous_steps = config.start.ramp_steps = 0
    config.optim.kind = "muon"  # learns more per step than Adam
    config.optim.warmup_steps = 200
    config.optim.multipliers = {"tokenizer/decoder/head": 10.0}  # the head starts at zero
    config.optim.ema_decay = 0.99
    config.data.batch_size = 8
    config.eval_every = config.save_every = 400
    return config
