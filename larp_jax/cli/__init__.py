"""The command line: `larp-jax COMMAND`."""

from larp_jax.cli.app import main

__all__ = ["main"]
