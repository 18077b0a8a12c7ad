"""ViTok's continuous tokenizer on UCF101 (arXiv 2501.09755): 1,024 latents of 16 floats for clips of 16x128x128.

    larp-jax train --config configs/vitok_ucf101.py --workdir runs/vitok_ucf101
    larp-jax train --config configs/vitok_ucf101.py:gan --workdir runs/vitok_ucf101_gan  # second stage: decoder, GAN

From the paper (section 2.3 and table 1): S-B/4x8, which is encoder S, decoder B and patches of 4x8x8, with 16 channels;
SwiGLU and 3-D axial RoPE; squared error + LPIPS + 1e-3 KL; AdamW with (0.9, 0.95), weight decay 1e-4 and a cosine
decay; bfloat16; 100,000 steps in each stage; in the second stage an EMA of 0.9999 and a discriminator at 2e-5. The
paper reports PSNR 30.1, rFVD 8.0 and, with a DiT-L as generator, gFVD 27.4.

Different here. The paper trains on 30 million videos (Shutterstock), with 256 clips in a batch, then 128, at a rate of
1e-4 / 256 times the clips and frames of a batch. This recipe trains on the 9,537 videos of UCF101, and cannot be
expected to reach these numbers. It has 64 clips in a batch, and the rate of that rule, 4e-4. The discriminator of the
paper is StyleGAN's on single frames, with weight 1; here it is LARP's on clips, with LARP's weight. Choices where the
paper says nothing: RMS norms, a warmup of 1,000 steps, and a KL divergence that is the mean over all floats, because
1e-3 times a sum over 16,384 of them would leave nothing in the latents. The decoder of the second stage is given the
means of the latents. This recipe has not been run to completion yet.

Data and the weights of the perceptual loss: as for configs/ucf101.py. If memory does not suffice, use
--config.accumulate=16 or --config.remat=block.
"""

from larp_jax.config import default_recipe

BATCH = 64


def get_config(variant=""):
    """The first stage; the variant `gan` is the second: the encoder frozen, with a discriminator."""
    if variant not in ("", "gan"):
        raise ValueError(f"variant {variant!r} is not known, only 'gan' is")
    config = default_recipe("tokenizer")
    config.steps = 100_000
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
    optim.learning_rate = 1e-4 / 256 * BATCH * model.frames
    optim.b1, optim.b2 = 0.9, 0.95
    optim.weight_decay = 1e-4
    optim.warmup_steps = 1_000
    optim.multipliers = {}

    config.data.train = "folder:data/ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 8

    if variant == "gan":
        config.init_from = "runs/vitok_ucf101"
        config.trained = "decoder"
        config.loss.adversarial_weight = 0.3
        optim.discriminator_learning_rate = 2e-5
        optim.ema_decay = 0.9999
    return config
