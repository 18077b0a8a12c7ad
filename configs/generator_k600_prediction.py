"""The published frame prediction: 632 M parameters, 5 of 16 frames given, Kinetics-600.

    larp-jax train --config configs/generator_k600_prediction.py --workdir runs/generator_k600_prediction

Sequences are 1024 codes of the given frames, a separator and the 1024 codes to predict. Hardware: 229 exaFLOP in the
generator's weights (6 x 632 M x 2048 positions x 64 clips x 460,050 steps), some 20 hours of 8 H100 GPUs at 40 % of
their bfloat16 peak, attention and tokenizer not counted. Published score: FVD 5.1. This recipe has not been run to its
end yet.

The tokenizer is what configs/larp_l_long.py trains, or the published one: larp-jax import writes it. Videos are best
made small beforehand; codes made beforehand (larp-jax tokenize --windows 4 --cond-frames 5, then
--config.data.train=tokens:DIR) take the tokenizer out of the step.
"""

from larp_jax.config import default_recipe

# Training videos (Carreira et al. 2018, arXiv 1808.01340); copies differ in size, as videos have gone. With the number
# of yours it trains for as many epochs.
VIDEOS = 392_622
BATCH = 64
STEPS_PER_EPOCH = VIDEOS // BATCH


def get_config():
    """The recipe: the defaults are the published settings, epochs become steps here."""
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
