"""Stage 2 for continuous latents: a flow generator of a frozen tokenizer's latents (rectified flow, arXiv 2209.03003).

It is the stage of `larp_jax.training.generator` with another network and loss, and with standardized latents.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import FlowRecipe, Ladder
from larp_jax.data.codes import CodeSet
from larp_jax.data.latents import LatentStatistics
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import FlowEvaluator
from larp_jax.models.condition import Condition
from larp_jax.models.flow import Flow, flow_errors, flow_sums, noise_of, times_of
from larp_jax.models.flow_sampling import sample_latents
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import rng, sharding
from larp_jax.training import common
from larp_jax.training.generator import GeneratorStage, GeneratorTask

SAMPLE_STEPS = 50  # of Euler's method, for the samples shown in an evaluation
LEAST_STD = 1e-6  # of a channel; smaller ones are constant


class FlowStage(GeneratorStage):
    """A flow generator, trained on the latents of a frozen tokenizer.

    A batch contains `video`, uint8 or float [B, T, H, W, C], which the tokenizer encodes, or `latents`, floats
    [B, N, d], and if frames are given `condition`, the same. `label` [B] int32 contains the classes (-1: none).

    `frozen` contains `statistics`, the `mean` and `std` [d] float32 of the channels of latents, by which they are
    standardized, and the tokenizer if batches contain videos.
    """

    network = Flow
    recipe: FlowRecipe

    def frozen_shapes(self) -> dict:
        """Shapes and dtypes of what `train_step` needs as `frozen`."""
        channel = jax.ShapeDtypeStruct((self.recipe.model.code_dim,), jnp.float32)
        return super().frozen_shapes() | {"statistics": {"mean": channel, "std": channel}}

    def encoded(self, batch: dict, frozen: dict) -> dict:
        """The batch with `latents`, and for given frames `condition`, as the tokenizer has them."""
        return super().codes(batch, frozen)

    def codes(self, batch: dict, frozen: dict) -> dict:
        """The batch with `latents`, and for given frames `condition`, standardized, instead of its `video`."""
        batch, statistics = self.encoded(batch, frozen), frozen["statistics"]
        given = {name: batch[name].astype(np.float32) for name in ("latents", "condition") if name in batch}
        return batch | {name: (x - statistics["mean"]) / statistics["std"] for name, x in given.items()}

    def sums(self, params: dict, batch: dict) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Sums of the scores of clips with a `number`, see `flow_sums`."""
        return flow_sums(self.module("generator", params), batch, rng.key(0))

    def scheduled(self, step: jax.Array | int) -> dict[str, jax.Array]:
        """None: there is no context."""
        return {}

    def objective(
        self, params: dict, batch: dict, key: jax.Array, codes: jax.Array | int, **scheduled: jax.Array
    ) -> tuple[jax.Array, dict]:
        """The mean squared error of the velocity in part of a batch without `video`, and scalars to log."""
        latents, (noise_key, drop_key) = batch["latents"], jax.random.split(key)
        keys = jax.random.split(noise_key, len(latents))
        condition = Condition.of_batch(self.recipe.model, batch)
        noise, times = noise_of(keys, latents.shape[1:]), times_of(keys)
        flow = self.module("generator", params)
        errors, squares = flow_errors(flow, latents, condition, noise, times, key=drop_key)
        return errors.mean(), {"loss": errors.mean(), "explained": 1.0 - errors.mean() / squares.mean()}

    def sample(
        self, params: dict, condition: Condition, numbers: np.ndarray, key: jax.Array, cfg_scale: float
    ) -> tuple[jax.Array, None]:
        """Samples standardized latents, for `decode`."""
        options = SamplingOptions(cfg_scale=cfg_scale, solver_steps=SAMPLE_STEPS)
        plan = options.plan(self.recipe.model.symbols)
        flow = self.module("generator", params)
        return sample_latents(flow, condition, numbers, key, options.scalars(), plan).latents, None

    def decode(self, frozen: dict, codes: jax.Array, lengths: None = None) -> jax.Array:
        """Videos of standardized latents."""
        statistics = frozen["statistics"]
        return super().decode(frozen, codes * statistics["std"] + statistics["mean"])


class FlowTask(GeneratorTask):
    """A run that trains a flow generator, as `larp_jax.training.stages.Task` defines it.

    Raises:
      InputError: model, tokenizer and data do not match.
    """

    stage_class = FlowStage
    evaluator_class = FlowEvaluator
    shown = ("loss", "explained")
    stage: FlowStage
    recipe: FlowRecipe

    @property
    def tokens(self) -> str:
        """The name of the array that clips are encoded to."""
        return "latents"

    def sizes(self, size: int, num_tokens: int, ladder: Ladder | None) -> dict[str, Any]:
        """The settings of the model that latents of so many channels tell."""
        if ladder is not None:
            raise InputError("a flow generator needs clips of one length; give a tokenizer without model.ladder")
        return {"code_dim": size, "num_tokens": num_tokens}

    def rows(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of a `CodeSet`, standardized."""
        return self.stage.codes(rows, {"statistics": self._statistics})

    def open_evaluation(self, workdir):
        """As for a generator of codes, after the statistics are known: from the checkpoint, the folder, or clips."""
        if "statistics" not in self.frozen:
            self._use(self._of_folder() if isinstance(self._train, CodeSet) else self._of_clips())
        super().open_evaluation(workdir)

    def _of_folder(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(self._train.manifest[name], np.float32) for name in ("mean", "std")}

    def _of_clips(self) -> dict[str, np.ndarray]:
        """The statistics of the first training clips."""
        found = LatentStatistics(self.recipe.model.code_dim)
        whole = sharding.replicated(self._mesh)
        encode = jax.jit(lambda batch, frozen: self.stage.encoded(batch, frozen)["latents"], out_shardings=whole)
        count = -(-self.recipe.statistics_clips // self.recipe.data.batch_size)
        with common.train_clips(self.recipe, self._clip, 0) as batches:
            for batch in itertools.islice(batches, count):
                video = sharding.to_mesh({"video": batch["video"]}, self._mesh)
                found.add(jax.device_get(encode(video, self.frozen)))
        return {"mean": found.mean.astype(np.float32), "std": found.std.astype(np.float32)}

    def _use(self, statistics: dict[str, np.ndarray]) -> None:
        std = np.maximum(statistics["std"], np.float32(LEAST_STD))
        self._statistics = {"mean": statistics["mean"], "std": std}
        placed = jax.device_put(self._statistics, sharding.replicated(self._mesh))
        self.frozen = self.frozen | {"statistics": placed}

    def metadata(self):
        """As for a generator of codes, and the statistics of the latents."""
        return super().metadata() | {"latent_statistics": {k: x.tolist() for k, x in self._statistics.items()}}

    def resume(self, metadata):
        """As for a generator of codes; the statistics stay those of the checkpoint."""
        super().resume(metadata)
        stored = metadata["latent_statistics"]
        self._use({name: np.asarray(stored[name], np.float32) for name in ("mean", "std")})
