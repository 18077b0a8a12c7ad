"""The model card of a repository on the hub, made from what a run has recorded."""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax

from larp_jax.config import TokenizerRecipe, default_recipe, differences, flat, parse_recipe, to_dict
from larp_jax.evaluation import registry
from larp_jax.tools import report
from larp_jax.tools.charts import short
from larp_jax.training.writers import read_metrics
from larp_jax.version import __version__
from larp_jax.weights.checkpoint import CHECKPOINTS, Checkpoint
from larp_jax.weights.fingerprint import fingerprint

CARD, PICTURE = "README.md", "picture.png"
PAPER = "https://arxiv.org/abs/2410.21264"
EXPORTED = ("generator", "prior", "tokenizer")  # modules in what is pushed; discriminator and projector are not
# Settings that say nothing about the model: where a run read from, and how it was computed.
_LEFT_OUT = ("tokenizer", "init_from", "mesh", "data", "tracker", "log_every", "eval_every", "save_every", "keep")
# The folders of an absolute path, or of one that leaves its folder.
_FOLDERS = re.compile(r"(?<![\w.])(?:~[\w.-]*|\.{1,2})?/(?=[^\s/])(?:[^+\s/]+/)*")


def model_card(found: Checkpoint, repository: str, license_id: str) -> dict[str, bytes]:
    """The card, and the newest picture that the run has drawn of its own videos, by file name.

    The metrics are those of the evaluations of this step in the workdir (`evaluate --output WORKDIR/NAME.json`), or
    else what training wrote. Of paths, only the last part is shown.

    Args:
      found: the checkpoint that is pushed.
      repository: `OWNER/NAME`.
      license_id: as the hub names it, such as `apache-2.0`; `unknown` if the owner has not chosen one.
    """
    workdir = found.path.parent.parent if found.path.parent.name == CHECKPOINTS else found.path
    picture = _picture(workdir, found.step)
    lines = [*_head(found, repository, license_id, picture is not None), *_use(found, repository)]
    lines += ["## Model", "", *_table(_facts(found)), "## Data", "", *_table(_data(found)), "## Recipe", ""]
    lines += [*_recipe(found), "## Metrics", "", *_metrics(found, workdir), "## License", ""]
    lines += ["The owner has not stated one." if license_id == "unknown" else f"`{license_id}`"]
    text = "\n".join(lines) + "\n"
    return {CARD: text.encode("utf-8", "backslashreplace")} | ({} if picture is None else {PICTURE: picture})


def _head(found: Checkpoint, repository: str, license_id: str, has_picture: bool) -> Iterable[str]:
    stage = found.recipe.stage
    tags = f"[larp, video, {stage}, jax]"
    yield from ("---", f"license: {license_id}", "library_name: larp_jax", f"tags: {tags}", "---", "")
    what = {
        "tokenizer": "A video tokenizer with a learned autoregressive prior",
        "generator": "An autoregressive generator of the codes of a video tokenizer",
        "flow": "A flow generator of the continuous latents of a video tokenizer",
    }[stage]
    yield from (f"# {repository.partition('/')[2]}", "")
    yield from (f"{what}: LARP ([arXiv 2410.21264]({PAPER})), with larp_jax {__version__}.", "")
    if has_picture:
        said = "Clips, each above its reconstruction" if stage == "tokenizer" else "Samples"
        yield from (f"![{said}]({PICTURE})", "")


def _use(found: Checkpoint, repository: str) -> Iterable[str]:
    is_tokenizer, model = isinstance(found.recipe, TokenizerRecipe), found.recipe.model
    has_codes = model.quantizer.has_codes if is_tokenizer else model.has_codes
    name, shape = ("codes", "[B, N] int32") if has_codes else ("latents", "[B, N, d] float32")
    yield from ("```python", *([] if is_tokenizer else ["import jax"]), "import larp_jax", "")
    if is_tokenizer:
        yield f'tokenizer = larp_jax.load_tokenizer("hf://{repository}")'
        yield f"{name} = tokenizer.encode(video)  # [B, T, H, W, 3] float in [0, 1] or uint8 -> {shape}"
        yield f"video = tokenizer.decode({name})"
    else:
        yield f'generator = larp_jax.load_generator("hf://{repository}")'
        given = {"classes": model.has_classes, "frames": model.has_frames}
        names = ", ".join(f"{name}={name}" for name, wanted in given.items() if wanted) or "indices=[0]"
        yield f"{name} = generator.sample({names}, key=jax.random.key(0))  # for the tokenizer named below"
    yield from ("```", "")
    if is_tokenizer or has_codes:
        yield "`config.json` and `model.safetensors` are also what `from_pretrained` of the authors' code reads."
        yield ""


def _facts(found: Checkpoint) -> list[tuple[str, Any]]:
    model = found.recipe.model
    trees = {name: tree for name, tree in sorted(found.params.items()) if name in EXPORTED}
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}
    facts = [(f"parameters of the {name}", f"{size:,}") for name, size in sizes.items()]
    if isinstance(found.recipe, TokenizerRecipe):
        facts += [("clip (frames, height, width, channels)", " x ".join(map(str, model.clip_shape)))]
        if model.quantizer.has_codes:
            facts += [("codes of a clip", f"{model.num_tokens:,} of {model.quantizer.codebook_size:,}")]
        else:
            facts += [("latents of a clip", f"{model.num_tokens:,} of {model.quantizer.code_dim} floats")]
        facts += [("fingerprint", fingerprint(model, found.params["tokenizer"]))]
    else:
        if model.has_codes:
            facts += [("codes of a clip", f"{model.num_tokens:,} of {model.codebook_size:,}")]
        else:
            facts += [("latents of a clip", f"{model.num_tokens:,} of {model.code_dim} floats")]
        facts += [("given", model.given)]
        facts += [("classes", f"{model.num_classes:,}")] if model.has_classes else []
        facts += [("fingerprint of its tokenizer", found.tokenizer_fingerprint or "unknown")]
    return [*facts, ("step", f"{found.step:,}" if found.step else "unknown")]


def _data(found: Checkpoint) -> list[tuple[str, Any]]:
    data = found.recipe.data
    rate = f"{data.fps:g} frames per second" if data.fps else f"every frame x {data.stride}" if data.stride > 1 else ""
    rows = [("training", data.train), ("evaluation", data.eval), ("sampled at", rate)]
    return [(name, _public(text)) for name, text in rows if text] or [("training", "not recorded")]


def _recipe(found: Checkpoint) -> list[str]:
    if not found.recipe.data.train:
        return ["Not recorded: the weights were imported.", ""]
    published = to_dict(parse_recipe(default_recipe(found.recipe.stage)))
    changed = differences(published, to_dict(found.recipe))
    changed = {name: pair for name, pair in changed.items() if name.split(".")[0] not in _LEFT_OUT}
    batch = found.recipe.data.batch_size
    text = f"{found.recipe.steps:,} steps of {batch} clips. Settings that differ from the published recipe:"
    return [text, "", *_table([(f"`{name}`", pair[1]) for name, pair in sorted(changed.items())])]


def _metrics(found: Checkpoint, workdir: pathlib.Path) -> list[str]:
    """The evaluations of this step, or else the scores that training wrote for it."""
    lines = []
    for _, held in report.written_results(workdir, []):
        if isinstance(held.get("metrics"), dict) and held["protocol"].get("step") == found.step:
            lines += _scores(held["metrics"], held["protocol"])
    if not lines:
        rows = [row for row in read_metrics(workdir) if row["step"] == found.step]
        scores = {name.removeprefix("eval/"): x for row in rows for name, x in row.items() if name.startswith("eval/")}
        data = found.recipe.data
        protocol = {"data": data.eval, "clips": data.eval_clips or "all", "computed": "during training"}
        lines = _scores(scores, protocol | {"definitions": registry.definitions()}) if scores else []
    return lines or ["Not recorded.", ""]


def _scores(scores: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    definitions = protocol.get("definitions")
    definitions = definitions if isinstance(definitions, dict) else {}
    rows = [(name, short(value), definitions.get(name, "")) for name, value in scores.items()]
    left_out = ("definitions", "checkpoint", "tokenizer")
    rest = flat({name: value for name, value in protocol.items() if name not in left_out})
    said = "; ".join(f"{name}: {_public(json.dumps(value))}" for name, value in rest)
    return [*_table(rows, ("metric", "value", "definition")), f"Protocol: {_cell(said)}", ""]


def _table(rows: Iterable[tuple], head: tuple[str, ...] = ("", "")) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [*("| " + " | ".join(_cell(_public(cell)) for cell in row) + " |" for row in lines), ""]


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def _public(text: Any) -> str:
    """A text without the folders of the paths in it, which describe a machine and not the model."""
    return _FOLDERS.sub("", str(text))


def _picture(workdir: pathlib.Path, step: int) -> bytes | None:
    """The newest picture of the run, up to a step."""

    def step_of(path) -> int:
        number = path.name.partition("_")[0]
        return int(number) if number.isascii() and number.isdigit() else -1

    found = [path for path in (workdir / "media").glob("*.png") if 0 <= step_of(path) <= step]
    return max(found, key=step_of).read_bytes() if found else None
