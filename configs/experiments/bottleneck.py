"""Codes and an autoregressive generator against continuous latents and a flow, at equal training FLOPs.

    larp-jax experiment bottleneck --workdir runs/bottleneck

Both arms have the same tokenizer network, data, steps and number of tokens, with as many channels: `codes` quantizes
them (SVQ, with the prior at the small weight of the base recipe), `latents` has the KL bottleneck and no prior. The
generators have the same width, depth, heads and batch size. The flow takes more steps, because it has no logits over a
codebook: both train with the same FLOPs.

Sampling is not equal: N passes with one code each cost about as much as one pass with all tokens. The flow passes all
of them through its network in each of the 100 steps of Euler's method.
"""

from larp_jax.config import default_recipe, experiment_options, experiment_recipes, make_experiment

# FLOPs of a training step of the generator of codes, over those of the flow, by `larp_jax.tools.flops`.
RATIO = {"": 1.136, "tiny": 2.117, "gpu64": 1.014, "gpu128": 1.015}


def get_config(variant=""):
    """The experiment."""
    codes, generator = experiment_recipes(variant)
    latents, _ = experiment_recipes(variant)
    latents.model.quantizer.kind, latents.model.quantizer.kl_weight = "kl", 1e-5
    latents.loss.prior_weight = 0.0
    latents.start.continuous_steps = latents.start.ramp_steps = 0  # they are continuous to the end
    latents.optim.multipliers = {"tokenizer/decoder/head": 10.0}  # there is no prior
    return make_experiment(
        "Are codes with an autoregressive generator better than latents with a flow, at equal training FLOPs?",
        {"codes": codes, "latents": latents},
        generator,
        generators={"latents": flow(generator, RATIO[variant])},
        **experiment_options(variant),
    )


def flow(generator, ratio):
    """A flow of the size of a generator of codes, with as many times its steps, and the rest as similar as possible."""
    recipe = default_recipe("flow")
    recipe.model.size = "custom"
    for name in ("width", "depth", "heads", "class_dropout"):
        recipe.model[name] = generator.model[name]
    recipe.model.num_tokens = recipe.model.code_dim = recipe.model.num_classes = 0
    for name in ("learning_rate", "warmup_steps", "floor", "ema_decay"):
        recipe.optim[name] = generator.optim[name]
    recipe.data = generator.data
    recipe.log_every, recipe.precision = generator.log_every, generator.precision
    recipe.steps = round(ratio * generator.steps)
    recipe.eval_every = recipe.save_every = -(-recipe.steps * generator.eval_every // generator.steps)
    return recipe
