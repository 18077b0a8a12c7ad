"""LARP-L-Long as published: 1024 tokens of 13 bits for clips of 128x128x16, 172 M parameters, Kinetics-600 and UCF101.

    larp-jax train --config configs/larp_l_long.py --workdir runs/larp_l_long

Hardware, as published: 47 hours on 8 H100 GPUs. If the batch does not fit in memory, --config.accumulate=2 (4, 8)
accumulates gradients over parts of it, and --config.remat=block saves memory and costs time. Published scores on UCF101
with deterministic codes: PSNR 28.70, LPIPS 0.0755, rFVD 20. This recipe has not been run to completion yet. The prior
learns at the rate of the tokenizer, as in the released trainer; --config.optim.multipliers.prior=50 is the rate that
the paper names.

Data: one folder with the training videos of both data sets, or links to them, anywhere below it
(`data/k600_ucf101/train/k600`, `data/k600_ucf101/train/ucf101`). Every video is equally likely, as in the published
run. Convert the videos to training size first (larp-jax prepare). The perceptual loss needs weights; `larp-jax doctor`
tells you how to get them. --config.loss.perceptual=none trains without it, but is another recipe.
"""

from larp_jax.config import default_recipe

# Training videos: 392,622 of Kinetics-600 (Carreira et al. 2018, arXiv 1808.01340) and 9,537 of UCF101 split 1. Copies
# of Kinetics-600 differ in size, because videos have disappeared: set this to the number in yours to train for the same
# number of epochs.
VIDEOS = 392_622 + 9_537
BATCH = 128
STEPS_PER_EPOCH = VIDEOS // BATCH


def get_config():
    """The recipe: the defaults are the published settings; epochs are converted to steps."""
    config = default_recipe("tokenizer")
    config.steps = 150 * STEPS_PER_EPOCH
    config.optim.warmup_steps = 8 * STEPS_PER_EPOCH
    config.precision = "bfloat16"

    config.data.train = "folder:data/k600_ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 16
    config.eval_every = 5 * STEPS_PER_EPOCH
    return config
