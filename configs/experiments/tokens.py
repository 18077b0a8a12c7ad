"""The number of tokens of a clip.

larp-jax experiment tokens --workdir runs/tokens
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment

COUNTS = {"": (8, 16, 32, 64), "tiny": (8, 16)}


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for count in COUNTS.get(variant, (16, 32, 64, 128, 256)):
        name = f"tokens_{count}"
        arms[name], generator = experiment_recipes(variant)
        arms[name].model.num_tokens = count
    return make_experiment(
        "How do reconstruction and samples depend on the number of tokens?",
        arms,
        generator,
        **experiment_options(variant),
    )
