"""A class-conditional flow generator of continuous latents at published size: DiT-L, 1024 latents, UCF101.

    larp-jax train --config configs/flow_ucf101.py --workdir runs/flow_ucf101

It is for a tokenizer with continuous latents, such as that of configs/vitok_ucf101.py. ViTok (arXiv 2501.09755) reports
gFVD 27.4 on UCF101 with 1024 latents and a DiT-L that predicts the noise: 500,000 steps of 256 clips at 1e-4, sampled
with 250 steps of DDIM. This recipe has a DiT-L too (458 M parameters), but rectified flow as in PV-VAE (arXiv
2605.02134): 250,000 steps of 64 clips with AdamW at 1e-4, sampled with 100 steps of Euler's method. From DiT are 10%
of the labels dropped and the decay of the EMA; logit-normal times are a choice made here. This recipe has not been run
to completion yet.

Hardware: docs/performance.md has its plan for 256 TPU v5e. --config.remat=block saves memory and costs time. By
default, the training step encodes clips. To save this time, write the latents in advance:

    larp-jax tokenize --checkpoint runs/vitok_ucf101 --input folder:data/ucf101/train --output data/ucf101_latents \
        --windows 10
    larp-jax train --config configs/flow_ucf101.py --workdir runs/flow_ucf101 \
        --config.data.train=tokens:data/ucf101_latents
"""

from larp_jax.config import default_recipe

BATCH = 64
STEPS_PER_EPOCH = 9_537 // BATCH  # training videos of split 1


def get_config():
    """The recipe; other settings are the defaults of the stage."""
    config = default_recipe("flow")
    config.tokenizer = "runs/vitok_ucf101"
    config.steps = 250_000
    config.model.size = "L"
    config.model.num_tokens, config.model.code_dim = 1024, 16
    config.precision = "bfloat16"

    config.data.train = "folder:data/ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 8
    config.eval_every = 20 * STEPS_PER_EPOCH
    return config
