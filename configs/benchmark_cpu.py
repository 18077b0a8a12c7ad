"""The published tokenizer's structure at a size that two CPU cores can be measured with: 56 GFLOP a clip.

    larp-jax benchmark train --config configs/benchmark_cpu.py

256 tokens for 64x64x16 clips, width 256, 6 + 6 layers, the smallest prior; L1, quantiser and prior, in float32.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe of docs/performance.md; it is to be measured, not trained."""
    config = default_recipe("tokenizer")
    config.model.size = "custom"
    config.model.resolution = 64
    config.model.num_tokens = 256
    for part in (config.model.encoder, config.model.decoder):
        part.width, part.depth, part.heads = 256, 6, 4
    config.prior.size = "XXS"
    config.loss.perceptual = "none"
    config.loss.adversarial_weight = 0.0
    config.data.batch_size = 4
    return config
