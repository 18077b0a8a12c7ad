"""Progress of long work: a bar with rates and time left, or plain lines in a log."""

import os
import sys
from typing import Any, Self, TextIO

import jax
from tqdm import tqdm


class Progress:
    """A progress bar with rates, time left and chosen values; in logs, a plain line every few seconds.

    Only the process with index 0 shows anything.

    Args:
      total: number of units of work.
      description: text on the left.
      unit: name of a unit.
      initial: units done in an earlier run.
      clips_per_unit: if given, also shows clips per second.
      interval: seconds between lines if the stream is not a terminal.
      stream: standard error by default.
    """

    def __init__(
        self,
        total: int,
        *,
        description: str = "",
        unit: str = "step",
        initial: int = 0,
        clips_per_unit: float | None = None,
        interval: float = 10.0,
        stream: TextIO | None = None,
    ):
        stream = stream or sys.stderr
        # Some containers have a terminal of width 0, which cannot show a bar.
        terminal = stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
        # With a width of 0 tqdm shows the numbers without the bar.
        look = {"dynamic_ncols": True} if terminal else {"ncols": 0, "mininterval": interval}
        self._bar = _Bar(
            clips_per_unit=clips_per_unit,
            total=total,
            desc=description,
            unit=unit,
            initial=initial,
            miniters=1,
            file=stream if terminal else _Lines(stream),
            disable=jax.process_index() != 0,
            **look,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, units: int = 1, **values: float) -> None:
        """Counts units as done; `values` replace those shown before."""
        if values:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update(units)

    def close(self) -> None:
        """Shows the last state and ends the bar."""
        self._bar.close()


class _Bar(tqdm):
    """tqdm that also shows clips per second."""

    def __init__(self, *args, clips_per_unit: float | None, **kwargs):
        self._clips_per_unit = clips_per_unit
        super().__init__(*args, **kwargs)

    @property
    def format_dict(self) -> dict[str, Any]:
        fields = super().format_dict
        elapsed = fields.get("elapsed")
        if self._clips_per_unit and elapsed:
            rate = fields["rate"] or (fields["n"] - fields["initial"]) / elapsed
            clips = f"{self._clips_per_unit * rate:.3g} clips/s"
            fields["postfix"] = f"{clips}, {fields['postfix']}" if fields["postfix"] else clips
        return fields


class _Lines:
    """A stream for tqdm that writes each update of the bar as a separate line."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()
