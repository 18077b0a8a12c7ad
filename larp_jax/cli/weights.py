"""The commands export and import."""

from larp_jax import files
from larp_jax.cli.arguments import add_checkpoint, add_command
from larp_jax.errors import InputError

EXPORTS = ("codebook-npz", "codebook-safetensors", "huggingface", "stablehlo")


def add_export(commands) -> None:
    """Adds the command export."""
    sub = add_command(
        commands,
        "export",
        _export,
        "export a tokenizer or generator for other frameworks",
        "--checkpoint runs/quickstart --format codebook-npz --output codebook.npz",
    )
    add_checkpoint(sub)
    sub.add_argument("--format", required=True, choices=EXPORTS, help="output format")
    sub.add_argument("--output", required=True, metavar="PATH", help="file (codebook formats) or directory")


def _export(arguments):
    from larp_jax import api
    from larp_jax.weights import export

    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind=None)
    model, params = found.recipe.model, found.params.get("tokenizer")
    export.check_output(arguments.output, arguments.format)
    if arguments.format == "huggingface":
        config = found.recipe if params is not None else model
        export.export_huggingface(arguments.output, config, found.params)
    elif params is None:
        raise InputError(f"{arguments.checkpoint} contains a generator, which exports as huggingface only")
    elif arguments.format == "stablehlo":
        export.export_stablehlo(arguments.output, model, params, step=found.step)
    else:
        write = {
            "codebook-npz": export.export_codebook_npz,
            "codebook-safetensors": export.export_codebook_safetensors,
        }[arguments.format]
        write(arguments.output, model, params, step=found.step, usage_counts=found.code_counts)
    print(f"{arguments.format} of step {found.step} written to {arguments.output}")


def add_import(commands) -> None:
    """Adds the command import."""
    sub = add_command(
        commands,
        "import",
        _import,
        "import released PyTorch weights, or convert the weights of LPIPS or I3D",
        "--source larp_tokenizer --output runs/released",
    )
    sub.add_argument(
        "--kind", choices=("model", "lpips", "i3d"), default="model", help="what to import (default: model)"
    )
    sub.add_argument(
        "--source", required=True, metavar="S",
        help="directory with config.json and model.safetensors, Hugging Face repository id, or .pth file; for lpips and"
        " i3d, the VGG16 or I3D file that larp-jax doctor names",
    )  # fmt: skip
    sub.add_argument("--heads", metavar="FILE", help="for lpips: file with the linear heads")
    sub.add_argument(
        "--output", required=True, metavar="P", help="new folder for the checkpoint; for lpips and i3d, a file"
    )
    sub.add_argument("--ema", action="store_true", help="import the EMA weights of a .pth file")


def _import(arguments):
    if (arguments.heads is None) == (arguments.kind == "lpips"):
        raise InputError("import needs --heads FILE with --kind lpips, and only with it")
    if arguments.ema and arguments.kind != "model":
        raise InputError(f"--ema is for models, not for {arguments.kind}; leave it out")
    if arguments.kind == "model":
        _import_model(arguments)
        return
    from larp_jax.weights import networks
    from larp_jax.weights.i3d import import_i3d
    from larp_jax.weights.lpips import import_lpips

    networks.check_output(arguments.output, arguments.kind)
    sources = [arguments.source] if arguments.heads is None else [arguments.source, arguments.heads]
    read = {"lpips": import_lpips, "i3d": import_i3d}[arguments.kind]
    networks.save(arguments.output, arguments.kind, read(*sources), sources)
    print(f"{arguments.kind} imported into {arguments.output}")


def _import_model(arguments):
    from larp_jax.config import GeneratorRecipe, to_dict
    from larp_jax.weights import checkpoint, importing

    files.check_new_folder(arguments.output)
    kind, recipe, params = importing.import_huggingface(arguments.source, ema=arguments.ema)
    if kind == "generator":
        recipe = GeneratorRecipe(model=recipe)
    checkpoint.write_imported(arguments.output, to_dict(recipe), params)
    print(f"{kind} imported into {arguments.output}")
