"""A small tokenizer for clips of 64x64x16 that trains on two CPU cores: 256 tokens of 9 bits, 1.6 M parameters.

    larp-jax train --config configs/quickstart.py --workdir runs/quickstart
    larp-jax train --config configs/quickstart.py:adversarial --workdir runs/adversarial  # with a discriminator

For your own clips, add --config.data.train=folder:PATH --config.data.eval=folder:PATH. The settings differ from the
published recipe because a small model and few steps need another initialization: see "Small runs" in the README.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The recipe; the variant `adversarial` adds a small discriminator."""
    if variant not in ("", "adversarial"):
        raise ValueError(f"variant {variant!r} is not known, only 'adversarial' is")
    config = default_recipe("tokenizer")
    config.steps = 1000

    model = config.model
    model.size = "custom"
    model.resolution = 64
    model.num_tokens = 256  # one per patch, so that each starts as one patch
    for part in (model.encoder, model.decoder):
        part.width, part.depth, part.heads = 128, 2, 2
    model.learned_encoder_patch_pe = True  # data_init writes to the position tables
    model.learned_decoder_latent_pe = True
    model.learned_decoder_patch_query_embed = True
    model.quantizer.codebook_size = 512
    model.quantizer.temperature = 0.002  # codes start close together: 0.03 would mix them
    config.data_init_clips = 256

    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.prior_weight = 0.01  # squared errors are small: 0.06 would dominate them
    config.loss.perceptual = "none"  # its weights are a separate download: see larp-jax doctor
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.learning_rate = 5e-4
    optim.b1, optim.b2 = 0.9, 0.99
    optim.warmup_steps = 50
    # The decoder learns first. With a faster encoder, the codes collapse.
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
        config.loss.adversarial_start = 100  # before, patch edges make it too easy for the discriminator
        config.discriminator.width, config.discriminator.depth, config.discriminator.heads = 128, 2, 2
        config.optim.discriminator_learning_rate = 1e-4
    return config
