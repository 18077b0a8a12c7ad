"""The published frame-prediction generator: 632 M parameters, 5 of 16 frames given, Kinetics-600.

    larp-jax train --config configs/generator_k600_prediction.py --workdir runs/generator_k600_prediction

A sequence is the 1024 codes of the given frames, a separator, and the 1024 codes to predict. Hardware (estimated): 229
exaFLOP in the weights of the generator (6 x 632 M x 2048 positions x 64 clips x 460,050 steps), about 20 hours on 8
H100 GPUs at 40% of their bfloat16 peak, without attention and tokenizer. Published score: FVD 5.1. This recipe has not
been run to completion yet.

Use the tokenizer trained by configs/larp_l_long.py, or import the published one with larp-jax import. Convert the
videos to training size first (larp-jax prepare), or write the codes in advance (larp-jax tokenize --windows 4
--cond-frames 5, then --config.data.train=tokens:DIR), so that the training step does not run the tokenizer.
"""

from larp_jax.config import default_recipe

# Training videos (Carreira et al. 2018, arXiv 1808.01340). Copies differ in size, because videos have disappeared: set
# this to the number in yours to train for the same number of epochs.
VIDEOS = 392_622
BATCH = 64
STEPS_PER_EPOCH = VIDEOS // BATCH


def get_config():
    """The recipe: the defaults are the published settings; epochs are converted to steps."""
    config = default_recipe("generator")
    config.tokenizer = "runs/larp_l_long"
    config.model.frame_prediction = True
    config.cond_frames = 5
    config.steps = 75 * STEPS_PER_EPOCH
    config.optim.warmup_steps = STEPS_PER_EPOCH
    config.precision = "bfloat16"

    config.data.train = "folder:data/k600/train"
    config.data.eval = "folder:data/k600/validation"
    config.data.batch_size = BATCH
    config.data.workers = 16
    config.eval_every = STEPS_PER_EPOCH
    return config
