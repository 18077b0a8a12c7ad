"""Generates the reference pages from the code when the documentation is built: a hook of mkdocs.yml."""

import contextlib
import dataclasses
import inspect
import io
import os
import typing

from mkdocs.structure.files import File

from larp_jax import cli, config
from larp_jax.cli import app

SIZES = {
    "TOKENIZER_SIZES": "Tokenizers (`model.size`)",
    "PRIOR_SIZES": "Priors (`prior.size`)",
    "GENERATOR_SIZES": "Generators (`model.size`)",
    "FLOW_SIZES": "Flow generators (`model.size`)",
}


def settings(cls, path: str):
    """Markdown of a dataclass and the dataclasses it contains, each setting under its name on the command line."""
    fields = dataclasses.fields(cls)
    leaves = [field for field in fields if not dataclasses.is_dataclass(field.type)]
    yield f"### `{path}`\n\n{prose(cls)}\n\n| setting | type | default |\n|---|---|---|\n"
    for field in leaves:
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind = str(field.type) if typing.get_args(field.type) else field.type.__name__
        yield f"| `{path}.{field.name}` | {kind} | `{default!r}` |\n"
    yield "\n"
    for field in fields:
        if field not in leaves:
            yield from settings(field.type, f"{path}.{field.name}")


def prose(cls) -> str:
    """The docstrings of a dataclass and of its dataclass base classes, the most general first."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return "\n\n".join(inspect.getdoc(base) for base in bases)


def configuration() -> str:
    """The page of all settings."""
    lines = [
        "# Configuration\n\nLook up the name, type and default of every setting. A recipe is a Python file whose"
        " `get_config()` returns `larp_jax.config.default_recipe(stage)` with changes. You can also change every"
        " setting on the command line under the name given here, for example `--config.model.num_tokens=256`. Defaults"
        " are the published settings. A width, depth or number of heads of 0 is taken from the named size.\n\n"
    ]
    for stage, cls in config.STAGES.items():
        lines += [f"## Stage `{stage}`\n\n", *settings(cls, "config")]
    lines.append("## Sizes\n\n")
    for table, title in SIZES.items():
        lines.append(f"### {title}\n\n| size | width | depth | heads |\n|---|---|---|---|\n")
        for size, numbers in getattr(config, table).items():
            lines.append(f"| `{size}` | {' | '.join(map(str, numbers))} |\n")
        lines.append("\n")
    return "".join(lines)


def help_of(*command: str) -> str:
    """The output of `larp-jax COMMAND --help`."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return output.getvalue()


def commands() -> str:
    """The page of all commands."""
    os.environ["COLUMNS"] = "100"  # width of the help texts
    pages = [f"## {name}\n\n```text\n{help_of(name)}```\n\n" for name in app.parsers()[1]]
    intro = "# Commands\n\nLook up the options of every command, as printed by `larp-jax COMMAND --help`.\n\n"
    return intro + "".join(pages)


def on_files(files, config):
    """Called by mkdocs with the files of the documentation; adds the generated pages."""
    for page, text in {"configuration.md": configuration(), "commands.md": commands()}.items():
        files.append(File.generated(config, page, content=text))
    return files
