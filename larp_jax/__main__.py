"""`python -m larp_jax` is `larp-jax`."""

import sys

from larp_jax.cli import main

# the guard matters: worker processes import this module again
if __name__ == "__main__":
    sys.exit(main())
