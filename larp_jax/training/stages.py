"""The stages of training: what the trainer needs of one, and which there are."""

import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx
from jax.sharding import Mesh

from larp_jax import data
from larp_jax.state import TrainState
from larp_jax.training.flow import FlowTask
from larp_jax.training.generator import GeneratorTask
from larp_jax.training.router import RouterTask
from larp_jax.training.tokenizer import TokenizerTask
from larp_jax.training.writers import MetricWriter


class Stage(Protocol):
    """The computation of a stage: pure functions of arrays, ready for `jax.jit`."""

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update: the next state and float32 scalars by name. `key` is the run's root key."""

    def frozen_shapes(self) -> dict:
        """Shapes and dtypes of what `train_step` needs as `frozen`."""

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module of that name with its parameters, `params[name]`."""


class Task(Protocol):
    """A run of a stage, as the trainer uses it. The constructor, given recipe and mesh, opens data and writes nothing.

    Attributes:
      stage_class: the class of `stage`, which may also be created from a complete recipe alone.
      recipe: complete, including sizes that only the data or another checkpoint determine.
      stage: computes the steps.
      frozen: weights that `train_step` reads and never changes, on the mesh.
      inputs: names of the arrays of a batch that `train_step` needs.
      shown: names of the logs that the progress bar shows.
      only_logged: names of the logs that are computed in logged steps only.
    """

    stage_class: ClassVar[type]
    recipe: Any
    stage: Stage
    frozen: dict
    inputs: tuple[str, ...]
    shown: tuple[str, ...]
    only_logged: tuple[str, ...]

    def __init__(self, recipe: Any, mesh: Mesh):
        pass

    def after_step(self, state: TrainState, step: int, placement: TrainState, key: jax.Array) -> TrainState:
        """The state to continue with after a step, given the result of `stage.train_step`, which may be donated.

        It depends only on the arguments, the recipe and the training data, so that a resumed run is the same.
        """

    def open_evaluation(self, workdir: pathlib.Path) -> None:
        """Prepares for `evaluate`, after this run has claimed the workdir."""

    def batches(self, start_step: int) -> data.Batches:
        """This process's rows of the batches from a step on."""

    def watch(self, step: int, logs: Mapping[str, float]) -> None:
        """Warns if the logs of a step show a problem."""

    def evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
        """Writes the scalars and images of an evaluation; returns the scalars."""

    def metadata(self) -> dict[str, Any]:
        """Metadata of the run stored in a checkpoint, besides the recipe; ready for JSON."""

    def resume(self, metadata: Mapping[str, Any]) -> None:
        """Continues from the `metadata` of the checkpoint that the run resumes from."""


# By the stage's name in a recipe.
TASKS: dict[str, type[Task]] = {
    "tokenizer": TokenizerTask,
    "generator": GeneratorTask,
    "flow": FlowTask,
    "router": RouterTask,
}
