"""A tokenizer with adaptive numbers of codes at the sizes of EVATok (arXiv 2603.12267): 128 to 1024 codes a clip.

    larp-jax train --config configs/evatok_ucf_k600.py --workdir runs/evatok
    larp-jax train --config configs/evatok_ucf_k600.py:fixed --workdir runs/evatok_256  # 256 codes in every block
    larp-jax train --config configs/evatok_ucf_k600.py:semantic --workdir runs/evatok_semantic

Stated in the paper: clips of 16x128x128 in 4 blocks of 4 frames; 32, 64, 128, 256 or 512 codes a block; an encoder of 6
layers of width 512 with 8 heads and a decoder of 12 layers of width 768 with 12 heads; 8,192 codes of 8 dimensions of
unit length, commitment weight 0.25; random numbers of codes in the first stage, Kinetics-600 and UCF101.

Not stated, or different here: the networks are LARP's stack over [patches; queries] with one block-causal mask, not
cross-attention (105 M parameters, not 145 M), and SVQ with LARP's prior take the place of plain VQ
(--config.model.quantizer.kind=vq, --config.loss.prior_weight=0). A clip has at most 1024 codes, which 472 of the 625
assignments fit. Steps, batch, rates and the other losses are LARP's. This recipe has not been run to completion yet.

The variant `semantic` adds what the paper's tokenizers are trained with: alignment of the decoder's third block with
V-JEPA 2 L (weight 0.7), an entropy loss (weight 0.02), and the discriminator on a frozen VideoMAE-B. The weights of
both networks must be imported first (docs/training.md).

Data: as for configs/larp_l_long.py. On GPUs, attention with a mask runs without fused kernels (docs/adaptive.md): if
memory does not suffice, use --config.accumulate=2 (4, 8) or --config.remat=block.
"""

from larp_jax.config import default_recipe

VIDEOS = 392_622 + 9_537  # as in configs/larp_l_long.py
BATCH = 128
STEPS_PER_EPOCH = VIDEOS // BATCH


def get_config(variant=""):
    """The recipe; `fixed` trains with 256 codes in every block, to compare with; `semantic` with frozen networks."""
    if variant not in ("", "fixed", "semantic"):
        raise ValueError(f"variant {variant!r} is not known, only 'fixed' and 'semantic' are")
    config = default_recipe("tokenizer")
    config.steps = 150 * STEPS_PER_EPOCH
    config.optim.warmup_steps = 8 * STEPS_PER_EPOCH
    config.precision = "bfloat16"

    model = config.model
    model.size = "evatok"
    model.blocks = 4
    model.ladder = (32, 64, 128, 256, 512)
    model.num_tokens = 1024
    model.encoder.width, model.encoder.depth, model.encoder.heads = 512, 6, 8
    model.decoder.width, model.decoder.depth, model.decoder.heads = 768, 12, 12
    model.quantizer.code_dim = 8
    if variant == "fixed":
        config.budget = "1024"
    if variant == "semantic":
        config.loss.alignment_weight, config.loss.alignment, config.loss.alignment_layer = 0.7, "vjepa2_l", 3
        # the entropy loss is one of the losses of the quantizer, which are weighted together
        model.quantizer.entropy_weight = 0.02 / config.loss.quantizer_weight
        config.discriminator.kind, config.discriminator.trunk = "frozen", "videomae_b"

    config.data.train = "folder:data/k600_ucf101/train"
    config.data.eval = "folder:data/ucf101/test"
    config.data.batch_size = BATCH
    config.data.workers = 16
    config.eval_every = 5 * STEPS_PER_EPOCH
    return config
