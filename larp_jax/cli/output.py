"""What commands print."""

from typing import Any, TextIO

from larp_jax.errors import printable


def print_table(values: dict[str, Any]) -> None:
    """Prints names and values, one pair per line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")


class Printable:
    """Standard output without control characters, such as those that move the cursor; see `larp_jax.errors.printable`.

    Standard error has progress bars, which move the cursor: only messages are made printable there.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the printable form of a text; returns its length, as other streams do."""
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
