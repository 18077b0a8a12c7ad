"""The clips with features that a tokenizer trains on with `data.train=features:DIR`."""

import pathlib

from larp_jax import data, files
from larp_jax.config import TokenizerRecipe
from larp_jax.data.features import COMMAND, FeatureSet
from larp_jax.errors import InputError
from larp_jax.weights import networks


def open_features(recipe: TokenizerRecipe) -> FeatureSet:
    """Opens the folder of `data.train`.

    If the file of the teacher is on this machine, its digest is compared, otherwise only the sizes of the network.

    Raises:
      InputError: the folder is incomplete or damaged, or is not of the clips, the grid or the teacher of the recipe.
    """
    spec, loss, sampled, model = data.parse_spec(recipe.data.train), recipe.loss, recipe.data, recipe.model
    given = f"data.train={recipe.data.train}"
    if not loss.alignment_weight:
        raise InputError(f"{given} is for runs with loss.alignment_weight above 0; set it, or give videos")
    if sampled.shapes:
        raise InputError(f"{given} has clips of one shape; leave out data.shapes={sampled.shapes}, or give videos")
    found = FeatureSet(spec.name)
    again = f"run {COMMAND} with this recipe"
    for name, ours, theirs in (
        ("clips", list(model.clip_shape), found.manifest["clip"]),
        ("features on the grid", list(model.decoder_grid), found.manifest["features"][:3]),
        ("clips sampled with", _sampling(sampled.fps, sampled.stride), found.clip.sampling),
    ):
        if ours != theirs:
            raise InputError(f"{given} has {name} {theirs or 'no rate'}, not {ours or 'no rate'}; {again}")
    if sampled.flip and not found.manifest["flips"]:
        raise InputError(f"{given} has no mirrored clips; {again} and --flips, or set data.flip=false")
    if complaint := _other_teacher(loss.alignment, found):
        raise InputError(f"{given} has {complaint}; {again}, or set loss.alignment")
    return found


def _sampling(fps: float, stride: int) -> dict[str, float]:
    return data.ClipSpec(fps=fps, stride=stride).sampling


def _other_teacher(teacher: str, found: FeatureSet) -> str:
    """How the features differ from those of a teacher; empty if they do not."""
    stored = found.manifest["teacher"]
    try:
        config = networks.teacher_config(teacher)
        _, path, _ = networks.locate_teacher(teacher)
    except InputError as error:
        raise InputError(f"loss.alignment={teacher}: {error}") from error
    if config != found.teacher:
        return f"features of {stored['name']}, not of loss.alignment={teacher}, or at another resolution"
    if pathlib.Path(path).is_file() and files.digest(path) != stored["sha256"]:
        return f"features of other weights than {path}, those of loss.alignment={teacher}"
    return ""
