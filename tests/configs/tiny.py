"""A tokenizer that trains in seconds, for tests: 6 steps of 8 clips of 8x32x32."""

from larp_jax.config import default_recipe


def get_config(variant: str = ""):
    """The tokenizer, or a variant.

    Variant `plain` leaves out prior and discriminator, `adaptive` has two blocks of frames with 2, 4 or 8 codes,
    `continuous` has latents in place of codes.
    """
    config = default_recipe()
    config.steps = 6
    config.log_every = 1
    config.eval_every = 3
    config.save_every = 2
    config.model.size = "custom"
    config.model.frames = 8
    config.model.resolution = 32
    config.model.num_tokens = 8
    for part in (config.model.encoder, config.model.decoder):
        part.width, part.depth, part.heads = 32, 1, 2
    config.model.quantizer.codebook_size = 32
    config.model.quantizer.code_dim = 4
    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 16, 1, 2
    config.discriminator.width, config.discriminator.depth, config.discriminator.heads = 16, 1, 2
    config.loss.perceptual = "none"
    config.loss.discriminator_every = 2
    config.optim.learning_rate = 1e-3
    config.optim.multipliers = {"prior": 1.0}
    config.optim.ema_decay = 0.9
    config.data.train = "moving_shapes"
    config.data.eval = "moving_shapes:test"
    config.data.batch_size = 8
    config.data.eval_clips = 8
    if variant == "adaptive":
        config.model.blocks, config.model.ladder, config.model.num_tokens = 2, (2, 4, 8), 12
        config.model.learned_encoder_patch_pe = config.model.learned_decoder_latent_pe = True
        config.model.learned_decoder_patch_query_embed = True
        config.start.anchored = True
        config.start.continuous_steps, config.start.kmeans_clips, config.start.ramp_steps = 2, 8, 1
        config.loss.adversarial_weight = 0.0
    if variant == "continuous":
        config.model.quantizer.kind, config.model.quantizer.kl_weight = "kl", 1e-3
    if variant in ("plain", "continuous"):
        config.loss.prior_weight = config.loss.adversarial_weight = 0.0
    return config
