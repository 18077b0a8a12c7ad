"""What the prior does to the codes: without it, in its published form, and in other forms.

    larp-jax experiment prior --workdir runs/prior

`none` has no prior. `published` is LARP's: cross-entropy at temperature 1, scheduled sampling, gradients to the encoder
through the context. `detached` is the same without gradients to the tokenizer, so the codes should be those of `none`.
`sharp` lowers the temperature of the cosines to 0.1. `latent` predicts the next continuous latent with a squared error
(arXiv 2412.16326).
"""

from larp_jax.config import experiment_recipes, make_experiment


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for name in ("none", "published", "detached", "sharp", "latent"):
        arms[name], generator = experiment_recipes(variant)
    arms["none"].loss.prior_weight = 0.0
    arms["detached"].prior.detached = True
    arms["sharp"].prior.temperature = 0.1
    arms["latent"].prior.objective = "latent"
    arms["latent"].loss.prior_weight = LATENT_WEIGHT
    return make_experiment("Does a prior make the codes easier to predict, and give them an order?", arms, generator)


# Published weights are relative to L1 and LPIPS: 4 for the squared error of latents, 0.06 for the cross-entropy. The
# base recipe has 0.001 for the cross-entropy, because squared errors of pixels are small; 4 is lowered by that factor.
LATENT_WEIGHT = 4 * 0.001 / 0.06
