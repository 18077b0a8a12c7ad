"""What every metric states about itself: name, definitions and panels of the report."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple


class Panel(NamedTuple):
    """A panel of `larp-jax report` in which scalars of a metric are plotted.

    Attributes:
      title: of the panel; metrics and training scalars of one title share it.
      unit: of the vertical axis.
      labels: label of each scalar.
    """

    title: str
    unit: str
    labels: Mapping[str, str]


class Description:
    """Base of all metrics.

    Attributes:
      name: for `--metrics`.
      definitions: what each scalar is, by its name; recorded with the scores.
      network: the network it needs, a kind of `larp_jax.weights.networks`; empty for none.
      panels: where the report plots the scalars of evaluations during training.
    """

    name: ClassVar[str]
    definitions: ClassVar[Mapping[str, str]]
    network: ClassVar[str] = ""
    panels: ClassVar[tuple[Panel, ...]] = ()
