"""The metrics by name, and which of them apply to a checkpoint."""

from collections.abc import Container, Iterator, Sequence

import numpy as np

from larp_jax.config import Conditional, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.evaluation.description import Description
from larp_jax.evaluation.evaluators import FlowEvaluator, NextCodeEvaluator
from larp_jax.evaluation.fvd import FvdEvaluator
from larp_jax.evaluation.metrics import METRICS, Metric, Setting
from larp_jax.evaluation.router import RouterEvaluator

GENERATOR_METRICS: dict[str, type[FvdEvaluator] | type[NextCodeEvaluator] | type[FlowEvaluator]] = {
    metric.name: metric for metric in (FvdEvaluator, NextCodeEvaluator, FlowEvaluator)
}


def every_metric() -> Iterator[type[Description]]:
    """The metrics of tokenizers, then those of generators and routers."""
    yield from METRICS.values()
    yield from GENERATOR_METRICS.values()
    yield RouterEvaluator


def definitions() -> dict[str, str]:
    """The definition of each scalar, by its name."""
    return {name: text for metric in every_metric() for name, text in metric.definitions.items()}


def available(recipe: TokenizerRecipe, modules: Container[str]) -> tuple[str, ...]:
    """Names of the metrics that apply to a tokenizer.

    Args:
      recipe: recipe of the tokenizer.
      modules: names of the modules that the checkpoint has parameters of.
    """
    return tuple(name for name, metric in METRICS.items() if metric.fits(recipe, modules))


def generator_metrics(config: Conditional) -> tuple[str, ...]:
    """Names of the metrics that apply to a generator with this configuration."""
    left_out = FlowEvaluator.name if config.has_codes else NextCodeEvaluator.name
    return tuple(name for name in GENERATOR_METRICS if name != left_out)


def default_metrics(
    names: Sequence[str], recipe: TokenizerRecipe, *, mean_clip: np.ndarray | None = None
) -> list[Metric]:
    """The metrics with these names, except those that need a network."""
    setting = Setting(recipe=recipe, mean_clip=mean_clip)
    return [METRICS[name].create(setting) for name in names if not METRICS[name].network]


def choose(asked: Sequence[str] | None, fitting: Sequence[str], stage: str) -> list[str]:
    """Names of the metrics to compute.

    Args:
      asked: names; None for all that apply and need no network.
      fitting: names of the metrics that apply to the checkpoint.
      stage: stage of the checkpoint, `tokenizer` or `generator`.

    Raises:
      InputError: a name is unknown or its metric does not apply to the checkpoint.
    """
    kinds: dict[str, dict] = {"tokenizer": METRICS, "generator": GENERATOR_METRICS}
    ours = kinds.pop(stage)
    ((other, theirs),) = kinds.items()
    if asked is None:
        return [name for name in fitting if not ours[name].network]
    if unknown := sorted(set(asked) - ours.keys() - theirs.keys()):
        raise InputError(f"--metrics {','.join(unknown)} is not known; choose from {', '.join(ours)}")
    if wrong := [name for name in asked if name in theirs]:
        raise InputError(
            f"--metrics {','.join(wrong)} is for a {other}, this is a {stage}; choose from {', '.join(ours)}"
        )
    if unfit := [name for name in asked if name not in fitting]:
        raise InputError(
            f"--metrics {','.join(unfit)} does not apply to this checkpoint ({_needs()}); choose from"
            f" {', '.join(fitting)}"
        )
    return [name for name in fitting if name in asked]


def _needs() -> str:
    """The conditions of the metrics, as text."""
    needs = sorted((" and ".join(need.text for need in metric.needs), name) for name, metric in METRICS.items())
    texts = [f"{name} {text}" for text, name in needs if text]
    return ", ".join(texts).replace(" ", " needs ", 1)
