"""A small tokenizer for 64x64x16 clips that trains on two CPU cores: 128 tokens of 8 bits, 1.5 M parameters.

    larp-jax train --config configs/quickstart.py --workdir runs/quickstart

Your own clips: --config.data.train=folder:PATH --config.data.eval=folder:PATH. Where it differs from the published
recipe it is because a small model and few steps need another start: see "Small runs" in the README.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe."""
    config = default_recipe("tokenizer")
    config.steps = 3000

    model = config.model
    model.size = "larp_s"
    model.resolution = 64
    model.patch_size = 16
    model.num_tokens = 128
    for part in (model.encoder, model.decoder):
        part.width, part.depth, part.heads = 128, 2, 2
    model.patch_position_base = 16.0  # a grid of 4x4x4 patches: the published 10,000 tells its positions hardly apart
    model.learned_decoder_latent_pe = True
    model.quantizer.codebook_size = 256
    model.quantizer.code_dim = 8
    model.quantizer.temperature = 0.01
    model.quantizer.entropy_weight = 0.1
    model.quantizer.entropy_temperature = 0.03
    config.data_init_clips = 512

    config.prior.size = "XXS"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.perceptual = "none"  # its weights are a download; see larp-jax doctor
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.learning_rate = 1e-3
    optim.b1, optim.b2 = 0.9, 0.99
    optim.warmup_steps = 20
    # The decoder learns first. A faster encoder outruns it, and its codes collapse.
    optim.multipliers = {
        "prior": 1.0,
        "tokenizer/encoder": 0.01,
        "tokenizer/quantizer": 0.01,
        "tokenizer/quantizer/out_linear": 1.0,
        "tokenizer/decoder/head": 0.3,
    }

    config.data.train = "moving_shapes:train"
    config.data.eval = "moving_shapes:test"
    config.data.batch_size = 8
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 500
    config.save_every = 250
    return config
