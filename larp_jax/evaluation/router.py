"""How good the choices of a router are, on clips whose rewards are known."""

from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from larp_jax.data.rewards import RewardSet, best_uniform
from larp_jax.errors import InputError
from larp_jax.evaluation.description import Description, Panel
from larp_jax.models.pixels import as_float_video
from larp_jax.models.router import Router
from larp_jax.runtime import sharding


class RouterEvaluator(Description):
    """Rewards of the assignments that a router chooses, next to the best of each clip and the best for all clips.

    Args:
      module: `module(params)` returns the router.
      clips: clips with their rewards.
      mesh: where to compute.
      batch_size: clips at a time, over all processes.
      max_clips: at most this many clips, spread evenly; 0 for all.
    """

    name = "router"
    definitions: ClassVar = {
        "reward_share": "mean reward of the assignments that the router chooses, divided by that of the best assignment"
        " of each clip; rewards are those of these clips",
        "reward_share_uniform": "the same for the best uniform assignment: of those with the same number of codes in"
        " every block, the one with the highest mean reward on these clips",
        "assignment_top1": "share of clips for which the router chooses the best assignment",
        "codes": "mean number of codes of the assignments that the router chooses",
        "codes_uniform": "number of codes of the best uniform assignment",
    }
    panels = (
        Panel(
            "Share of the best reward",
            "share",
            {"reward_share": "evaluation", "reward_share_uniform": "best uniform assignment"},
        ),
        Panel("Best assignment chosen", "share", {"assignment_top1": "evaluation"}),
        Panel("Codes per clip", "codes", {"codes": "evaluation", "codes_uniform": "best uniform assignment"}),
    )

    def __init__(
        self, module: Callable[[dict], Router], clips: RewardSet, mesh: Mesh, *, batch_size: int, max_clips: int = 0
    ):
        self._clips, self._mesh, self._batch_size, self._max_clips = clips, mesh, batch_size, max_clips

        def choose(params, batch):
            return module(params)(as_float_video(batch["video"])).argmax(axis=-1), batch["mask"]

        self._choose = jax.jit(choose, out_shardings=sharding.replicated(mesh))

    def run(self, params: dict) -> dict[str, float]:
        """The scores, see `definitions`.

        Args:
          params: parameters by module name, on the mesh.

        Raises:
          InputError: no clip can be read.
        """
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        rows, batches = self._clips.eval_batches(self._max_clips, batch_size=self._batch_size, **processes)
        found = []
        with batches:
            for batch in batches:
                batch = sharding.to_mesh({name: batch[name] for name in ("video", "mask")}, self._mesh)
                found.append(jax.device_get(self._choose(params, batch)))
        chosen, mask = (np.concatenate(x)[: len(rows)] for x in zip(*found, strict=True))
        rows, chosen = rows[mask > 0], chosen[mask > 0]
        if not len(rows):
            raise InputError("no clip could be read; see the log for the reasons")
        return scores(self._clips, rows, chosen)


def scores(clips: RewardSet, rows: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """The scores of `RouterEvaluator.definitions` for some rows of `clips` and the assignments chosen for them."""
    ladder, rewards = clips.ladder, clips.rewards[rows]
    uniform = best_uniform(rewards, ladder)
    best, own = rewards.max(axis=1), rewards[np.arange(len(rows)), chosen]
    of_uniform = rewards[:, ladder.assignments.index(uniform)]
    return {
        "reward_share": share_of_best(own, best),
        "reward_share_uniform": share_of_best(of_uniform, best),
        "assignment_top1": float(np.mean(chosen == rewards.argmax(axis=1))),
        "codes": float(np.mean([sum(ladder.assignments[i]) for i in chosen])),
        "codes_uniform": float(sum(uniform)),
    }


def share_of_best(rewards: np.ndarray, best: np.ndarray) -> float:
    """Mean reward divided by the mean of the best; 1 if no assignment is better than another."""
    total = float(best.mean(dtype=np.float64))
    return float(rewards.mean(dtype=np.float64)) / total if total > 0 else 1.0
