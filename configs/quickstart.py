"""A small LARP tokenizer that trains in minutes on two CPU cores: clips of 4x32x32 as 32 tokens of 11 bits.

    larp-jax train --config configs/quickstart.py --workdir runs/quickstart
    larp-jax train --config configs/quickstart.py:adversarial --workdir runs/adversarial  # with a discriminator
    larp-jax train --config configs/quickstart.py:perceptual --workdir runs/perceptual  # with LPIPS

For your own clips, add --config.data.train=folder:PATH --config.data.eval=folder:PATH. For 8 frames in place of 4, with
twice as many patches and codes, add --config.model.frames=8 --config.model.num_tokens=64; for frames of 64x64, with as
many patches, --config.model.resolution=64 --config.model.patch_size=8, and with a discriminator, its patch_size=8 too.
The settings differ from the published recipe because a small model and few steps need another start: see "Small runs"
in the README.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The recipe; the variant `adversarial` adds a small discriminator, `perceptual` LPIPS of one frame per clip."""
    if variant not in ("", "adversarial", "perceptual"):
        raise ValueError(f"variant {variant!r} is not known, only 'adversarial' and 'perceptual' are")
    config = default_recipe("tokenizer")
    config.steps = 3500

    model = config.model
    model.size = "custom"
    model.frames, model.resolution, model.patch_size = 4, 32, 4
    model.num_tokens = 32  # half as many as patches
    model.encoder.width, model.encoder.depth, model.encoder.heads = 96, 2, 4
    model.decoder.width, model.decoder.depth, model.decoder.heads = 128, 3, 4
    model.learned_encoder_patch_pe = True  # anchors are written into the position tables
    model.learned_decoder_latent_pe = True
    model.learned_decoder_patch_query_embed = True
    # with few dimensions, codes are close to the latents that they replace; closer codes need a lower temperature
    model.quantizer.codebook_size = 2048
    model.quantizer.code_dim = 6
    model.quantizer.temperature = 0.005

    # From the usual start, all codes say the same for a thousand steps.
    config.start.anchored = True
    config.start.continuous_steps = 1150
    config.start.ramp_steps = 200

    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.prior_weight = 0.001  # squared errors are small: 0.06 would dominate them
    config.loss.perceptual = "none"  # its weights are a separate download: see larp-jax doctor
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.kind = "muon"  # learns more per step than Adam
    optim.learning_rate = 2e-3
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_steps = 200
    optim.multipliers = {"prior": 1.0, "tokenizer/decoder/head": 10.0}  # the head starts at zero

    config.data.train = "moving_shapes/plain:train"
    config.data.eval = "moving_shapes/plain:test"
    config.data.batch_size = 4
    config.data.eval_clips = 128
    config.log_every = 20
    config.eval_every = 500
    config.save_every = 1000

    if variant == "perceptual":
        # see docs/training.md for what it costs; the weights come from larp-jax import --kind lpips
        config.loss.perceptual = "lpips"
        config.loss.perceptual_frames = 1
        config.loss.perceptual_weight = 0.02  # LPIPS is about forty times as large as the squared error
    if variant == "adversarial":
        config.loss.reconstruction = "l1"
        config.loss.prior_weight = 0.003
        config.loss.adversarial_weight = 0.03
        config.loss.adversarial_start = 2000  # once codes have replaced the latents
        config.discriminator.width, config.discriminator.depth, config.discriminator.heads = 128, 2, 2
        config.discriminator.patch_size = model.patch_size
        config.optim.discriminator_learning_rate = 1e-4
    return config
