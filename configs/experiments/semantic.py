"""What can shape codes beside the reconstruction: features of another network, prediction, changes between frames.

    larp-jax import --kind lpips  # contains the weights of VGG16
    larp-jax experiment semantic --workdir runs/semantic

`alignment` aligns the decoder with VGG16 (EVATok, arXiv 2603.12267). `future_drop` hides the end of every second clip
from the encoder, and `frame_difference` adds a loss of the changes from frame to frame (PV-VAE, arXiv 2605.02134).
`decoder` trains the decoder of `none` further, with all that codes depend on frozen; `longer` trains all of `none` for
as many more steps, to compare with.

Runs of the default size have half the steps of those of other experiments, because VGG16 is slow on a CPU.
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for name in ("none", "alignment", "future_drop", "frame_difference", "decoder", "longer"):
        arms[name], generator = experiment_recipes(variant)
        if not variant:
            halve(arms[name])
    if not variant:
        halve(generator)
    loss = arms["alignment"].loss
    loss.alignment_weight, loss.alignment, loss.alignment_layer = ALIGNMENT_WEIGHT, "vgg16", 1
    arms["future_drop"].corruption.future = 0.5
    arms["frame_difference"].loss.frame_difference_weight = 1.0
    for name in ("decoder", "longer"):
        arm = arms[name]
        arm.init_from = "none"
        arm.steps //= 3
        arm.eval_every = arm.save_every = arm.steps
        arm.optim.warmup_steps //= 3
        arm.optim.learning_rate /= 2
    arms["decoder"].trained = "decoder"
    return make_experiment(
        "What makes codes better, besides the reconstruction?", arms, generator, **experiment_options(variant)
    )


def halve(recipe):
    """Half the steps of everything."""
    for name in ("steps", "eval_every", "save_every"):
        recipe[name] //= 2
    recipe.optim.warmup_steps //= 2
    if recipe.stage == "tokenizer":
        recipe.start.continuous_steps //= 2
        recipe.start.ramp_steps //= 2


# The published 0.7 is relative to L1, LPIPS and an adversarial loss. It is lowered by the factor of the base recipe's
# weight of the prior, 0.001 in place of 0.06, because squared errors of pixels are small.
ALIGNMENT_WEIGHT = 0.7 * 0.001 / 0.06
