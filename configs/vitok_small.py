"""A small ViTok tokenizer that trains in minutes on two CPU cores: clips of 8x64x64 as 128 latents of 8 floats.

    larp-jax train --config configs/vitok_small.py --workdir runs/vitok_small
    larp-jax train --config configs/vitok_small.py:gan --workdir runs/vitok_small_gan  # second stage: decoder, GAN

For your own clips, add --config.data.train=folder:PATH --config.data.eval=folder:PATH.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The first stage; the variant `gan` is the second: the encoder frozen, with a discriminator."""
    if variant not in ("", "gan"):
        raise ValueError(f"variant {variant!r} is not known, only 'gan' is")
    config = default_recipe("tokenizer")
    config.steps = 1000

    model = config.model
    model.size = "custom"
    model.block, model.layout = "vitok", "patchwise"
    model.frames, model.resolution = 8, 64
    model.num_tokens = 128  # one for each patch of 4x8x8
    model.encoder.width, model.encoder.depth, model.encoder.heads = 64, 2, 4
    model.decoder.width, model.decoder.depth, model.decoder.heads = 96, 3, 4
    model.quantizer.kind, model.quantizer.code_dim = "kl", 8
    # 1e-4 of the mean over all floats: a tenth of the published weight, because there is no LPIPS beside it
    model.quantizer.kl_weight = 1e-4 / (model.num_tokens * model.quantizer.code_dim)

    config.loss.reconstruction = "l2"
    config.loss.quantizer_weight = 1.0
    config.loss.prior_weight = config.loss.adversarial_weight = 0.0
    config.loss.perceptual = "none"  # its weights are a separate download: see larp-jax doctor

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_steps = 200
    optim.multipliers = {"tokenizer/decoder/head": 10.0}  # the head starts at zero

    config.data.train = "moving_shapes/plain:train"
    config.data.eval = "moving_shapes/plain:test"
    config.data.batch_size = 8
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 250
    config.save_every = 500

    if variant == "gan":
        config.init_from = "runs/vitok_small"
        config.trained = "decoder"
        config.steps = 300
        optim.learning_rate, optim.warmup_steps = 2e-4, 50
        optim.discriminator_learning_rate = 1e-4
        config.loss.adversarial_weight = 0.003  # squared errors are small
        config.discriminator.width, config.discriminator.depth, config.discriminator.heads = 128, 2, 2
    return config
