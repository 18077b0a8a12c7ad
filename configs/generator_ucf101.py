"""The published class-conditional generator: 632 M parameters, 1024 codes of a LARP-L-Long tokenizer, UCF101.

    larp-jax train --config configs/generator_ucf101.py --workdir runs/generator_ucf101

Hardware: 111 exaFLOP in the generator's weights (6 x 632 M x 1024 codes x 64 clips x 447,000 steps), some 10 hours of
8 H100 GPUs at 40 % of their bfloat16 peak, attention and tokenizer not counted. With
--config.mesh.fsdp=8 parameters and moments are split over 8 devices; --config.remat=block trades time for memory.
Published score: gFVD 57 at guidance 1.25 (102 with size L). This recipe has not been run to its end yet.

The tokenizer is what configs/larp_l_long.py trains, or the published one: larp-jax import writes it. Codes are made in
the step, in float32; made beforehand they cost nothing, and nothing else changes:

    larp-jax tokenize --checkpoint runs/larp_l_long --input folder:data/ucf101/train --output data/ucf101_codes \
        --windows 10
    larp-jax train --config configs/generator_ucf101.py --workdir runs/generator_ucf101 \
        --config.data.train=tokens:data/ucf101_codes
"""

from larp_jax.config import default_recipe

BATCH = 64
STEPS_PER_EPOCH = 9_537 // BATCH  # training videos of split 1


def get_config():
    """The recipe: the defaults are the published settings, epochs become steps here."""
    config = default_recipe("generator")
    config.tokenizer = "runs/larp_l_long"
    config.steps = 3000 * STEPS_PER_EPOCH
    config.optim.warmup_steps = 4 * STEPS_PER_EPOCH
    config.precision = "bfloat16"

    config.data.train = "folder:data/ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 8
    config.eval_every = 20 * STEPS_PER_EPOCH
    return config
