"""LARP-L on UCF101 alone, on a single GPU: the published tokenizer and objective on 9,537 videos.

    larp-jax train --config configs/ucf101.py --workdir runs/ucf101

Hardware (estimated): one GPU; 20 exaFLOP in total, about 14 hours on an H100 at 40% of its bfloat16 peak. Gradients of
a batch of 64 are accumulated over 8 parts of 8 clips; --config.accumulate=4 (2, 1) is faster if memory allows. No score
is published for UCF101 alone. The published PSNR 28.70, LPIPS 0.0755 and rFVD 20 are from the same model trained on
Kinetics-600 as well (configs/larp_l_long.py); 9,537 videos should not reach them. This recipe has not been run to
completion yet.

Data: the videos of split 1 in one folder for training and one for testing, with class subfolders in both. The
perceptual loss needs weights; `larp-jax doctor` tells you how to get them. --config.loss.perceptual=none trains without
it, but is another recipe.
"""

from larp_jax.config import default_recipe

BATCH = 64
STEPS_PER_EPOCH = 9_537 // BATCH  # training videos of split 1


def get_config():
    """The recipe."""
    config = default_recipe("tokenizer")
    config.steps = 500 * STEPS_PER_EPOCH
    config.optim.warmup_steps = 8 * STEPS_PER_EPOCH
    config.optim.ema_decay = 0.999
    config.precision = "bfloat16"
    config.accumulate = 8

    config.data.train = "folder:data/ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 8
    return config
