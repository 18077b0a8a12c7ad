"""A picture and an action become video, from few videos of people: clips of 16x48x48, in 4 blocks of 24 codes.

    larp-jax train --config configs/actions.py --workdir runs/actions
    larp-jax tokenize --checkpoint runs/actions --input folder:mixed --output runs/mixed_codes --windows 6 --flips \
        --cond-frames 1
    larp-jax tokenize --checkpoint runs/actions --input folder:seventh --output runs/actions_check --windows 4 \
        --cond-frames 1
    larp-jax train --config configs/actions.py:generator --workdir runs/mixed_generator

Both train in minutes on two CPU cores. docs/streaming.md says what is in the folders, and shows what comes out. Every
second frame is taken, so that a clip lasts as long as an action.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The recipe of the tokenizer, or with the variant `generator` that of the generator."""
    if variant not in ("", "generator"):
        raise ValueError(f"variant {variant!r} is not known, only 'generator' is")
    return _generator() if variant else _tokenizer()


def _tokenizer():
    config = default_recipe("tokenizer")
    config.steps = 3200

    model = config.model
    model.size = "custom"
    model.frames, model.resolution = 16, 48
    model.blocks, model.ladder, model.num_tokens = 4, (24,), 96  # 36 patches of a block as 24 codes
    for part in (model.encoder, model.decoder):
        part.width, part.depth, part.heads = 96, 2, 4
    model.decoder.depth = 3
    model.learned_encoder_patch_pe = True  # anchors are written into the position tables
    model.learned_decoder_latent_pe = True
    model.learned_decoder_patch_query_embed = True
    model.quantizer.codebook_size = 1024

    # the start of configs/quickstart.py, which explains it
    config.start.anchored = True
    config.start.continuous_steps = 900
    config.start.ramp_steps = 200

    config.prior.size = "custom"
    config.prior.width, config.prior.depth, config.prior.heads = 64, 2, 2
    config.loss.reconstruction = "l2"
    config.loss.prior_weight = 0.001
    config.loss.perceptual = "none"
    config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.kind = "muon"  # learns more in so few steps than Adam
    optim.learning_rate = 2e-3
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_steps = 150
    optim.multipliers = {"prior": 1.0, "tokenizer/decoder/head": 10.0}

    # moving shapes, because few people would be memorized
    config.data.train = "0.75*folder:people/train+0.25*moving_shapes/plain:train"
    config.data.eval = "folder:people/test"
    config.data.flip = True
    config.data.stride = 2
    config.data.batch_size = 4
    config.log_every = 20
    config.eval_every = 300
    config.save_every = 600
    return config


def _generator():
    config = default_recipe("generator")
    config.tokenizer = "runs/actions"
    config.steps = 1600

    model = config.model
    model.size = "custom"
    model.width, model.depth, model.heads = 128, 4, 4
    model.mlp_multiple = 32
    model.codebook_size = model.num_tokens = model.num_classes = 0  # taken from the codes, and so is the ladder
    model.token_dropout = model.residual_dropout = model.mlp_dropout = 0.1
    model.init_std = model.width**-0.5  # as in configs/generator_quickstart.py

    optim = config.optim
    optim.learning_rate = 3e-3
    optim.warmup_steps = 100
    optim.ema_decay = 0.99

    config.data.train = "tokens:runs/mixed_codes"
    config.data.eval = "tokens:runs/actions_check"
    config.data.batch_size = 16
    config.log_every = 20
    config.eval_every = 100
    config.save_every = 100
    return config
