"""ViTok's continuous tokenizer on UCF101 (arXiv 2501.09755): 1,024 latents of 16 floats for clips of 16x128x128.

    larp-jax train --config configs/vitok_ucf101.py --workdir runs/vitok_ucf101
    larp-jax train --config configs/vitok_ucf101.py:gan --workdir runs/vitok_ucf101_gan  # second stage: decoder, GAN

Stated in the paper: patches of 4x8x8, the sizes (here encoder S and decoder B: a larger decoder reconstructs better, a
larger encoder does not), SwiGLU and 3-D axial RoPE, squared error + LPIPS + 1e-3 KL, AdamW with (0.9, 0.95), bfloat16.
With 4x8 patches it reports PSNR 30.1, rFVD 8.0 and, with a DiT-L as generator, gFVD 27.4, from tokenizers trained on
far more data than UCF101, whose 9,537 videos should not reach it. This recipe has not been run to completion yet.

Not stated where we looked: heads (64 dimensions each here), RMS norms or layer norms (RMS), 16 channels, and whether
the KL divergence is a sum or a mean: here the mean over all floats, because 1e-3 times a sum over 16,384 of them would
leave nothing in the latents. Steps, batch and learning rate are those of configs/ucf101.py, the weight decay is 1e-4.
second stage trains a fifth as long, on the means of the latents, with LARP's discriminator and weight.

Data and the weights of the perceptual loss: as for configs/ucf101.py. If memory does not suffice, use
--config.accumulate=16 or --config.remat=block.
"""

from larp_jax.config import default_recipe

BATCH = 64
STEPS_PER_EPOCH = 9_537 // BATCH  # training videos of split 1


def get_config(variant=""):
    """The first stage; the variant `gan` is the second: the encoder frozen, with a discriminator."""
    if variant not in ("", "gan"):
        raise ValueError(f"variant {variant!r} is not known, only 'gan' is")
    config = default_recipe("tokenizer")
    config.steps = 500 * STEPS_PER_EPOCH
    config.precision = "bfloat16"
    config.accumulate = 8

    model = config.model
    model.size = "vitok_b"
    model.encoder.depth = 6  # vitok_s
    model.block, model.layout = "vitok", "patchwise"
    model.quantizer.kind, model.quantizer.code_dim = "kl", 16
    model.quantizer.kl_weight = 1e-3 / (model.num_tokens * model.quantizer.code_dim)  # of a sum: see above

    config.loss.reconstruction = "l2"
    config.loss.quantizer_weight = 1.0
    config.loss.prior_weight = config.loss.adversarial_weight = 0.0

    optim = config.optim
    optim.b1, optim.b2 = 0.9, 0.95
    optim.weight_decay = 1e-4
    optim.warmup_steps = 8 * STEPS_PER_EPOCH
    optim.ema_decay = 0.999
    optim.multipliers = {}

    config.data.train = "folder:data/ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 8

    if variant == "gan":
        config.init_from = "runs/vitok_ucf101"
        config.trained = "decoder"
        config.steps //= 5
        config.loss.adversarial_weight = 0.3
    return config
