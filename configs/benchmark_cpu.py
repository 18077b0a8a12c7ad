"""The structure of the published tokenizer, small enough to benchmark on two CPU cores: 56 GFLOP per clip.

    larp-jax benchmark train --config configs/benchmark_cpu.py

256 tokens for clips of 64x64x16, width 256, 6 + 6 layers, the smallest prior. Losses: L1, quantizer and prior, in
float32.
"""

from larp_jax.config import default_recipe


def get_config():
    """The recipe of docs/performance.md, for benchmarks, not for training."""
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
