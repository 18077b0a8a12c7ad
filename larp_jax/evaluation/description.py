"""The description of a metric: name, definitions of its scalars and panels of the report."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple


class Panel(NamedTuple):
    """A panel of `larp-jax report` in which scalars of a metric are plotted.

    Attributes:
      title: title of the panel; metrics and training scalars with the same title share it.
      unit: unit of the vertical axis.
      labels: label of each scalar, by its name.
    """

    title: str
    unit: str
    labels: Mapping[str, str]


class Description:
    """Base of all metrics.

    Attributes:
      name: name of the metric in `--metrics`.
      definitions: definition of each scalar, by its name; recorded with the scores.
      network: the network it needs, a kind of `larp_jax.weights.networks`; empty for none.
      panels: panels of the report with the scalars of evaluations during training.
    """

    name: ClassVar[str]
    definitions: ClassVar[Mapping[str, str]]
    network: ClassVar[str] = ""
    panels: ClassVar[tuple[Panel, ...]] = ()
