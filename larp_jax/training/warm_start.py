"""Starting a run from the weights of another run or of the released code: `init_from`."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax import api
from larp_jax.config import TRAINING_FIELDS, GeneratorRecipe, TokenizerRecipe, differences, to_dict
from larp_jax.errors import InputError
from larp_jax.files import readable
from larp_jax.models.paths import path_name
from larp_jax.state import TrainState
from larp_jax.weights import checkpoint
from larp_jax.weights.fingerprint import fingerprint
from larp_jax.weights.tensors import check_finite

logger = logging.getLogger(__name__)

SHOWN = 20  # number of mismatches in the message

# Settings of a model that its weights do not depend on: names of sizes, the size of clips (only the number of patches
# depends on it), sampling and dropout in training, and settings that change shapes, which are compared anyway.
NOT_OF_WEIGHTS = TRAINING_FIELDS | {"size", "frames", "resolution", "shape", "quantizer.kind", "init_std",
                                    "mlp_multiplier", "mlp_multiple", "class_dropout", "frames_dropout",
                                    "token_dropout", "attention_dropout", "residual_dropout", "mlp_dropout",
                                    "path_dropout",
                                    # settings of a prior
                                    "positions", "dropout", "temperature", "rounds", "mix_max", "mix_ramp"}  # fmt: skip


def read(recipe: TokenizerRecipe | GeneratorRecipe, shapes: dict) -> dict:
    """The weights of `recipe.init_from` for the modules of a run.

    The EMA is used if there is one. A module that the source does not contain, such as the prior or the discriminator,
    is left out and initialized as in any run; so are a projector to another teacher and a discriminator of another
    kind.

    Args:
      recipe: the complete recipe of the run.
      shapes: shapes of the run's parameters by module, as `TrainState.params`.

    Returns:
      Parameters by module, float32 NumPy arrays.

    Raises:
      InputError: there are no such weights, they are of another stage, or some do not match; the message names each
        parameter and setting that differs.
    """
    path = readable(recipe.init_from, "init_from")
    try:
        found = api.load_checkpoint(path, kind=recipe.stage)
        params = dict(found.params)
        if shapes.keys() - params.keys() and checkpoint.is_checkpoint(found.path):
            # the EMA does not include the discriminator
            params = api.load_checkpoint(found.path, weights="raw", kind=recipe.stage).params | params
    except InputError as error:
        raise InputError(f"init_from={recipe.init_from}: {error}") from error
    params = {name: params[name] for name in params.keys() - _of_other_networks(recipe, found.recipe)}
    for name in sorted(shapes.keys() - params.keys()):
        logger.info("init_from: %s has no fitting %s, which starts afresh", path, name)
    for name in sorted(params.keys() - shapes.keys()):
        logger.info("init_from: the recipe has no %s, that of %s is left out", name, path)
    params = {name: params[name] for name in params if name in shapes}
    _check_fit(recipe, found.recipe, {name: shapes[name] for name in params}, params)
    check_finite(_by_name(params), str(path))
    if getattr(recipe, "trained", "all") == "decoder":
        _check_codes(recipe, found.recipe, params["tokenizer"])
    ours, theirs = (getattr(x, "tokenizer_fingerprint", "") for x in (recipe, found))
    if theirs and ours != theirs:
        logger.warning("init_from: %s was trained on codes of tokenizer %s, not of this run's %s", path, theirs, ours)
    logger.info("starting from %s (step %d): %s", found.path, found.step, ", ".join(sorted(params)))
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def apply(state: TrainState, params: dict, placement: TrainState) -> TrainState:
    """The state before the first step with these parameters by module, and equal EMA parameters.

    Args:
      state: from a stage's `init`; donated.
      params: from `read`.
      placement: shardings of the state.
    """
    params = jax.device_put(params, {name: placement.params[name] for name in params})

    def replace(state, params):
        params = state.params | params
        return dataclasses.replace(
            state, params=params, ema=jax.tree.map(jnp.copy, {name: params[name] for name in state.ema})
        )

    return jax.jit(replace, donate_argnums=0, out_shardings=placement)(state, params)


def _of_other_networks(ours, theirs) -> set[str]:
    """Modules of the source that belong to other frozen networks than those of the recipe, and mean nothing here."""
    if not isinstance(ours, TokenizerRecipe):
        return set()
    reads = {
        "projector": lambda r: (r.loss.alignment, r.loss.alignment_layer),
        "discriminator": lambda r: (r.discriminator.kind, r.discriminator.kind == "frozen" and r.discriminator.trunk),
    }
    return {name for name, of in reads.items() if of(ours) != of(theirs)}


def _check_fit(ours, theirs, shapes: dict, params: dict) -> None:
    """`InputError` unless the parameters have these shapes, and the settings they depend on are the same."""
    complaints = []
    for part in ("model", *({"prior", "discriminator"} & params.keys())):
        for name, (here, there) in sorted(differences(*(to_dict(getattr(x, part)) for x in (ours, theirs))).items()):
            if name not in NOT_OF_WEIGHTS:
                complaints.append(f"{part}.{name} is {here} here, {there} there")
    here, there = _by_name(shapes), _by_name(params)
    for name in sorted(here.keys() | there.keys()):
        sides = [str(list(x[name].shape)) if name in x else "none" for x in (here, there)]
        if sides[0] != sides[1]:
            complaints.append("{} is {} here, {} there".format(name, *sides))
    if complaints:
        more = f"; and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        raise InputError(f"init_from={ours.init_from} does not fit the recipe: {'; '.join(complaints[:SHOWN])}{more}")


def _check_codes(ours, theirs, params: dict) -> None:
    """`InputError` if a setting that may differ otherwise, such as the size of clips, changes what codes mean."""
    before, after = (fingerprint(x.model, params) for x in (theirs, ours))
    if before != after:
        changed = differences(to_dict(theirs.model), to_dict(ours.model))
        found = ", ".join(f"model.{name}={there}, not {here}" for name, (there, here) in sorted(changed.items()))
        raise InputError(f"trained=decoder keeps the codes of init_from={ours.init_from}, which has {found}")


def _by_name(tree: dict) -> dict:
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
