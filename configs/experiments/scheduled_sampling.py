"""Scheduled sampling of the prior: none, the published form, and with samples that are likely instead of uniform.

    larp-jax experiment scheduled_sampling --workdir runs/scheduled_sampling

At temperature 1 the logits are cosines, so sampled codes are nearly uniform: scheduled sampling then replaces context
at random. `sharp` samples, and trains, at temperature 0.1.
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for name in ("one_round", "published", "one_round_sharp", "sharp"):
        arms[name], generator = experiment_recipes(variant)
        arms[name].prior.rounds = 1 if name.startswith("one_round") else 2
        arms[name].prior.temperature = 0.1 if name.endswith("sharp") else 1.0
    return make_experiment(
        "Does scheduled sampling in the prior help, and does it matter what is sampled?",
        arms,
        generator,
        **experiment_options(variant),
    )
