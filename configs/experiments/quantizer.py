"""Stochastic against plain vector quantization.

larp-jax experiment quantizer --workdir runs/quantizer
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for kind in ("svq", "vq"):
        arms[kind], generator = experiment_recipes(variant)
        arms[kind].model.quantizer.kind = kind
    return make_experiment(
        "Does sampling codes in training help, against always taking the nearest one?",
        arms,
        generator,
        **experiment_options(variant),
    )
