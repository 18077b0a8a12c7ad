"""A small tokenizer that gives each block of frames as many codes as it needs: clips of 16x32x32, 16 to 64 codes.

    larp-jax train --config configs/adaptive.py --workdir runs/adaptive
    larp-jax evaluate --checkpoint runs/adaptive --data moving_shapes/busy:test --budget 16  # or 32, 64, 4,32,4,4

The clips of moving_shapes/busy have from none to six moving shapes. In training, each clip has random numbers of codes,
so that one tokenizer works with any. docs/adaptive.md explains them, and how to choose them by clip.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe."""
    config = default_recipe("tokenizer")
    config.steps = 3600

    model = config.model
    model.size = "custom"
    model.frames, model.resolution, model.patch_size = 16, 32, 4
    model.blocks = 4  # of 4 frames, one row of patches in time each
    model.ladder = (4, 8, 16, 32)
    model.num_tokens = 64  # the most codes of a clip
    model.encoder.width, model.encoder.depth, model.encoder.heads = 96, 2, 4
    model.decoder.width, model.decoder.depth, model.decoder.heads = 128, 3, 4
    model.learned_encoder_patch_pe = True  # anchors are written into the position tables
    model.learned_decoder_latent_pe = True
    model.learned_decoder_patch_query_embed = True

    # as in configs/quickstart.py, which explains them, but with 1200 continuous steps
    model.quantizer.codebook_size = 2048
    model.quantizer.code_dim = 6
    model.quantizer.temperature = 0.005
    config.start.anchored = True
    config.start.continuous_steps = 1200
    config.start.ramp_steps = 200

    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.prior_weight = 0.001
    config.loss.perceptual = "none"
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.kind = "muon"
    optim.learning_rate = 2e-3
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_steps = 200
    optim.multipliers = {"prior": 1.0, "tokenizer/decoder/head": 10.0}

    config.data.train = "moving_shapes/busy:train"
    config.data.eval = "moving_shapes/busy:test"
    config.data.batch_size = 4
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 250
    config.save_every = 500
    return config
