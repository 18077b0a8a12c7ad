"""What can shape codes beside the reconstruction: features of another network, prediction, changes between frames.

    larp-jax experiment semantic --workdir runs/semantic

`future_drop` gives the encoder the first half of every second clip, and `frame_difference` adds the loss of changes
from frame to frame (both: PV-VAE, arXiv 2605.02134). `decoder` trains the decoder of `none` for some more steps, with
the encoder frozen. `longer` trains all of `none` for as many more steps, for comparison.
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for name in ("none", "future_drop", "frame_difference", "decoder", "longer"):
        arms[name], generator = experiment_recipes(variant)
    arms["future_drop"].corruption.future = 0.5
    arms["frame_difference"].loss.frame_difference_weight = 1.0
    for name in ("decoder", "longer"):
        arms[name].init_from = "none"
        arms[name].steps //= 3
        arms[name].eval_every = arms[name].save_every = arms[name].steps
        arms[name].optim.warmup_steps //= 3
        arms[name].optim.learning_rate /= 2
    arms["decoder"].trained = "decoder"
    return make_experiment(
        "What makes codes better without another network?", arms, generator, **experiment_options(variant)
    )
