"""A small tokenizer for 64x64x16 clips that trains on two CPU cores: 256 tokens of 9 bits, 1.6 M parameters.

    larp-jax train --config configs/quickstart.py --workdir runs/quickstart
    larp-jax train --config configs/quickstart.py:adversarial --workdir runs/adversarial  # with a discriminator

Your own clips: --config.data.train=folder:PATH --config.data.eval=folder:PATH. Where it differs from the published
recipe it is because a small model and few steps need another start: see "Small runs" in the README.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The recipe; with the variant `adversarial` a small discriminator joins."""
    if variant not in ("", "adversarial"):
        raise ValueError(f"variant {variant!r} is not known, only 'adversarial' is")
    config = default_recipe("tokenizer")
    config.steps = 1000

    model = config.model
    model.size = "custom"
    model.resolution = 64
    model.num_tokens = 256  # one for each patch to start from
    for part in (model.encoder, model.decoder):
        part.width, part.depth, part.heads = 128, 2, 2
    model.learned_encoder_patch_pe = True  # data_init writes places into the position tables
    model.learned_decoder_latent_pe = True
    model.learned_decoder_patch_query_embed = True
    model.quantizer.codebook_size = 512
    model.quantizer.temperature = 0.002  # codes lie close together at the start: 0.03 would mix them up
    config.data_init_clips = 256

    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.prior_weight = 0.01  # squared differences are small numbers, which 0.06 would outweigh
    config.loss.perceptual = "none"  # its weights are a download; see larp-jax doctor
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.learning_rate = 5e-4
    optim.b1, optim.b2 = 0.9, 0.99
    optim.warmup_steps = 50
    # The decoder learns first. A faster encoder outruns it, and its codes collapse.
    optim.multipliers = {
        "prior": 1.0,
        "tokenizer/encoder": 0.02,
        "tokenizer/quantizer": 0.02,
        "tokenizer/quantizer/out_linear": 1.0,
        "tokenizer/decoder/head": 0.3,
    }

    config.data.train = "moving_shapes:train"
    config.data.eval = "moving_shapes:test"
    config.data.flip = True  # few videos
    config.data.batch_size = 8
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 250
    config.save_every = 250

    if variant == "adversarial":
        config.loss.reconstruction = "l1"
        config.loss.prior_weight = 0.03
        config.loss.adversarial_weight = 0.03
        config.loss.adversarial_start = 100  # it would have an easy game before the decoder has smoothed its patches
        config.discriminator.width, config.discriminator.depth, config.discriminator.heads = 128, 2, 2
        config.optim.discriminator_learning_rate = 1e-4
    return config
