"""LARP-L-Long as published: 1024 tokens of 13 bits for 128x128x16 clips, 172 M parameters, Kinetics-600 and UCF101.

    larp-jax train --config configs/larp_l_long.py --workdir runs/larp_l_long

Hardware as published: 47 hours on 8 H100 GPUs. Where the batch does not fit, --config.accumulate=2 (4, 8) takes it in
parts, and --config.remat=block trades time for memory. Published score on UCF101 with deterministic codes: PSNR 28.70,
LPIPS 0.0755, rFVD 20. This recipe has not been run to its end yet. The prior learns at the tokenizer's rate, as in the
released trainer; --config.optim.multipliers.prior=50 is what the paper names.

Data: one folder that holds the training videos of both data sets, or links to them, wherever they are in it
(`data/k600_ucf101/train/k600`, `data/k600_ucf101/train/ucf101`): every video is as likely as any other, which is how
the published run joins its lists. Videos are best made small beforehand. The perceptual term needs the weights that
`larp-jax doctor` names; --config.loss.perceptual=none does without, and is another recipe.
"""

from larp_jax.config import default_recipe

# Training videos: 392,622 of Kinetics-600 (Carreira et al. 2018, arXiv 1808.01340) and 9,537 of UCF101 split 1. Copies
# of Kinetics-600 differ in size, as videos have gone; with the number of yours it trains for as many epochs.
VIDEOS = 392_622 + 9_537
BATCH = 128
STEPS_PER_EPOCH = VIDEOS // BATCH


def get_config():
    """The recipe: the defaults are the published settings, epochs become steps here."""
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
