"""The networks that a tokenizer's training reads and never changes: router, LPIPS, teachers."""

import functools
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax import api
from larp_jax.budgets import check_router
from larp_jax.config import TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.models.lpips import Lpips
from larp_jax.models.paths import path_name
from larp_jax.models.teachers import Teacher, make_teacher
from larp_jax.training import common
from larp_jax.weights import networks
from larp_jax.weights.fingerprint import digest
from larp_jax.weights.tensors import read_safetensors


class Frozen:
    """The frozen networks of a recipe, by name: `router`, `lpips`, `teacher` (of alignment), `trunk` (of the
    discriminator); only those that the recipe needs.

    Attributes:
      modules: the networks without weights.

    Raises:
      InputError: the router cannot be read or is of other clips, or there is no such teacher.
    """

    def __init__(self, recipe: TokenizerRecipe):
        self._recipe, self.modules = recipe, {}
        loss, dtype = recipe.loss, common.DTYPES[recipe.precision]
        if loss.perceptual != "none":
            self.modules["lpips"] = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), dtype=dtype))
        self._router_params = None
        if recipe.router:
            self.modules["router"], self._router_params = _load_router(recipe)
        self._teachers = {}
        if loss.alignment_weight:
            self._teachers["teacher"] = "loss.alignment", loss.alignment, dtype
        if loss.adversarial_weight and recipe.discriminator.kind == "frozen":
            # second derivatives as in `larp_jax.training.adversarial.Adversary.make`
            trunk_dtype = jnp.float32 if loss.r1_weight else dtype
            self._teachers["trunk"] = "discriminator.trunk", recipe.discriminator.trunk, trunk_dtype
        for name, (setting, wanted, dtype) in self._teachers.items():
            self.modules[name] = self._teacher(setting, wanted, dtype)
        if recipe.data.has_features:  # the teacher's are read, so only its sizes are needed
            self._teachers.pop("teacher", None)

    def _teacher(self, setting: str, wanted: str, dtype) -> Teacher:
        try:
            config = networks.teacher_config(wanted)
            make = functools.partial(make_teacher, config, remat=self._recipe.remat, dtype=dtype)
            module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
            frames, *own, _ = self._recipe.model.clip_shape
            for size in (own, *self._recipe.data.sizes):
                module.grid((frames, *size))
        except InputError as error:
            raise InputError(f"{setting}={wanted}: {error}") from error
        return module

    def load(self) -> dict:
        """Parameters by network, of those that steps run. The kernels of teachers are in the dtype of the computation.

        Raises:
          InputError: a file of weights is missing or damaged.
        """
        loaded = {} if self._router_params is None else {"router": self._router_params}
        if "lpips" in self.modules:
            loaded["lpips"] = self._load_lpips()
        for name, (setting, wanted, dtype) in self._teachers.items():
            try:
                loaded[name] = _kernels_as(dtype, _params(networks.load_teacher(wanted)))
            except InputError as error:
                raise InputError(f"{setting}={wanted}: {error}") from error
        return loaded

    def digests(self) -> dict[str, str]:
        """A hash of the weights of each network that `load` reads, by network, without the router.

        It does not depend on `precision`, nor on how a file orders its metadata: two imports of a network are equal.
        """
        return {name: digest("", read_safetensors(path)) for name, (_, path) in self._files().items()}

    def check(self, digests: Mapping[str, str], before: Mapping[str, str]) -> None:
        """`InputError` if a run had other weights of a network before; networks that it did not record may be any.

        Args:
          digests: those of now, from `digests`.
          before: those that the run has recorded.
        """
        for name, (setting, path) in self._files().items():
            if before.get(name, digests[name]) != digests[name]:
                raise InputError(
                    f"{setting}: {path} holds other weights than when the run was saved ({digests[name]}, not"
                    f" {before[name]}); put the file of that time back, or choose another --workdir"
                )

    def _files(self) -> dict[str, tuple[str, pathlib.Path]]:
        """The setting, with its value, and the file of each network that `load` reads, without the router."""
        found = {}
        if "lpips" in self.modules:
            path, _ = networks.locate("lpips", self._lpips())
            found["lpips"] = f"loss.perceptual={self._recipe.loss.perceptual}", path
        for name, (setting, wanted, _) in self._teachers.items():
            found[name] = f"{setting}={wanted}", networks.locate_teacher(wanted)[1]
        return found

    def _lpips(self) -> str | None:
        """The path of LPIPS; None for the one that `locate` finds."""
        name = self._recipe.loss.perceptual
        return None if name == "lpips" else name

    def _load_lpips(self) -> dict:
        name = self._recipe.loss.perceptual
        try:
            return _params(networks.load_lpips(self._lpips()))
        except InputError as error:
            raise InputError(f"loss.perceptual={name!r}: {error}; or choose loss.perceptual='none'") from error

    def shapes(self) -> dict:
        """Shapes and dtypes of what `load` returns, without any file of weights."""
        run = self._teachers.keys() | {"lpips", "router"}
        shapes = {name: _params(module) for name, module in self.modules.items() if name in run}
        for name, (_, _, dtype) in self._teachers.items():
            shapes[name] = jax.eval_shape(functools.partial(_kernels_as, dtype), shapes[name])
        return shapes


def _params(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _kernels_as(dtype, params: dict) -> dict:
    """The parameters, with kernels in this dtype: what every product would convert them to."""

    def converted(path, x):
        return jnp.asarray(x, dtype) if path_name(path).endswith("kernel") else x

    return jax.tree_util.tree_map_with_path(converted, params)


def _load_router(recipe: TokenizerRecipe) -> tuple[nnx.Module, dict]:
    """Module and parameters of the recipe's router; `InputError` if it cannot be read or is of other clips."""
    try:
        module, params = api.load_router(os.path.expanduser(recipe.router))
        check_router(module.config, recipe.model)
    except InputError as error:
        raise InputError(f"router={recipe.router}: {error}") from error
    return module, params
