"""Holistic against patchwise codes: the same number of codes of the same codebook, and the same training time.

    larp-jax experiment patchwise --workdir runs/patchwise

Patchwise codes belong to patches that are larger, so that there are as many of them as holistic codes.
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment

# Steps of a patchwise arm in the time of one step of the holistic one: measured in turns on two CPU cores, where
# `larp-jax benchmark train` of the two recipes gave 1.7 to 2.1 times as many steps per second. Estimated for a GPU.
FASTER = 2.0


def get_config(variant=""):
    """The experiment."""
    holistic, generator = experiment_recipes(variant)
    patchwise, _ = experiment_recipes(variant)
    patchwise.model.layout = "patchwise"
    patchwise.model.patch_frames, patchwise.model.patch_size = {"gpu64": (8, 8), "gpu128": (16, 8)}.get(variant, (8, 8))
    patchwise.start.anchored = False  # there are no queries to place
    for name in ("steps", "eval_every", "save_every"):
        patchwise[name] = int(FASTER * patchwise[name])
    patchwise.start.continuous_steps = int(FASTER * patchwise.start.continuous_steps)
    patchwise.start.ramp_steps = int(FASTER * patchwise.start.ramp_steps)
    patchwise.optim.warmup_steps = int(FASTER * patchwise.optim.warmup_steps)
    return make_experiment(
        "Do holistic codes reconstruct better than patchwise ones, at equal bits and training time?",
        {"holistic": holistic, "patchwise": patchwise},
        generator,
        **experiment_options(variant),
    )
