"""The published class-conditional generator: 632 M parameters, 1024 codes of a LARP-L-Long tokenizer, UCF101.

    larp-jax train --config configs/generator_ucf101.py --workdir runs/generator_ucf101

Hardware (estimated): 111 exaFLOP in the weights of the generator (6 x 632 M x 1024 codes x 64 clips x 447,000 steps),
about 10 hours on 8 H100 GPUs at 40% of their bfloat16 peak, without attention and tokenizer. --config.mesh.fsdp=8
splits parameters and optimizer state over 8 devices; --config.remat=block saves memory and costs time. Published score:
gFVD 57 at guidance scale 1.25 (102 with size L). This recipe has not been run to completion yet.

Use the tokenizer trained by configs/larp_l_long.py, or import the published one with larp-jax import. By default, the
training step computes the codes, in float32. To save this time, write the codes in advance:

    larp-jax tokenize --checkpoint runs/larp_l_long --input folder:data/ucf101/train --output data/ucf101_codes \
        --windows 10
    larp-jax train --config configs/generator_ucf101.py --workdir runs/generator_ucf101 \
        --config.data.train=tokens:data/ucf101_codes
"""

from larp_jax.config import default_recipe

BATCH = 64
STEPS_PER_EPOCH = 9_537 // BATCH  # training videos of split 1


def get_config():
    """The recipe: the defaults are the published settings; epochs are converted to steps."""
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
