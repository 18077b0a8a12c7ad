"""README and docs: links are valid, commands are accepted and run, code blocks run, the site builds."""

import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from data_helpers import moving_frames
from test_generate import write_generator

from larp_jax import cli
from larp_jax.cli import app
from larp_jax.cli.recipe import load_recipe
from larp_jax.data import parse_spec
from larp_jax.data.video import write_video

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
# Marks a code block whose inputs are not available: it is only compiled, and its imports are checked.
NOT_RUN = "<!-- not run: "


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """(the line before, the block) of each fenced block in a language."""
    found = re.finditer(rf"(?:^([^\n]*)\n)?^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(match[1] or "", match[2]) for match in found]


def shell_lines(text: str) -> list[list[str]]:
    """Words of the command lines in fenced and indented blocks, without comments."""
    fences = "\n".join(block for _, block in blocks(text, "bash"))
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(line for line in outside.splitlines() if line.startswith("    "))
    lines = re.sub(r"\\\n\s*", " ", f"{fences}\n{textwrap.dedent(indented)}").splitlines()
    known = ("larp-jax", "bash", "python", "pip")
    return [shlex.split(line, comments=True) for line in lines if line.strip().startswith(known)]


RECIPES = {f"configs/{path.name}": runpy.run_path(str(path))["__doc__"] for path in ROOT.glob("configs/*.py")}
COMMANDS = {page: shell_lines(text) for page, text in (PAGES | RECIPES).items()}


def test_every_command_of_the_guide_to_pods_is_one(monkeypatch):
    """The launch script prints what it would do, train accepts its command; of gcloud, only the group is checked."""
    monkeypatch.chdir(ROOT)
    text = "".join(block for _, block in blocks(PAGES["docs/pods.md"], "bash"))
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line]
    kinds = {line.split()[0] for line in lines}
    assert kinds == {"gcloud", "pip", "larp-jax", "bash"}
    groups = {("config", "set"), ("services", "enable"), ("storage", "buckets")}
    for words in map(shlex.split, lines):
        if words[0] == "gcloud":
            assert tuple(words[1:3]) in groups, words
        elif words[0] == "bash":
            result = subprocess.run([*words[:2], "--dry-run", *words[2:]], capture_output=True, text=True, check=False)
            assert result.returncode == 0 and "gcloud compute tpus" in result.stdout, result.stderr
            if "train" in words:
                accept(["larp-jax", *words[words.index("train") :]])


def test_commands_are_found():
    assert len(COMMANDS["README.md"]) > 15
    assert all(COMMANDS[page] for page in (*RECIPES, "docs/training.md", "docs/evaluation.md", "docs/data.md"))


@pytest.mark.parametrize("page", [page for page in COMMANDS if page != "docs/code.md"])
def test_commands_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in COMMANDS[page]:
        if words[0] in ("bash", "python") and words[1] != "-m":
            assert pathlib.Path(words[1]).is_file(), words
        if words[:2] == ["bash", "launch/gpu.sh"]:
            words = ["larp-jax", *words[2:]]
        if words[0] == "larp-jax":
            accept(words)


def accept(words):
    """Raises unless a command line is valid, including the settings of its config."""
    arguments = app.parse(words[1:])
    specs = [getattr(arguments, "data", None)]
    if getattr(arguments, "config", None):
        recipe = load_recipe(arguments)
        specs += [recipe.data.train, recipe.data.eval]
    for spec in filter(None, specs):
        parse_spec(spec)


@pytest.mark.parametrize("words", [["train", "--config=configs/quickstart.py", "--workdir=x", "--config.stepz=3"],
                                   ["evaluate", "--checkpoint=x", "--data=moving_shape"]])  # fmt: skip
def test_commands_that_are_wrong_would_be_noticed(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="did you mean"):
        accept(["larp-jax", *words])


@pytest.fixture(scope="module")
def place(trained, tokenizer, tmp_path_factory):
    """A folder with the inputs of the README's commands and of the code blocks: tiny models and clips."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(trained, folder / "runs" / "mine")
    fingerprint = {"tokenizer_fingerprint": tokenizer.fingerprint}
    write_generator(folder / "runs" / "generator", fingerprint | {"class_counts": [2] * 8}, num_classes=8)
    write_generator(folder / "runs" / "predictor", fingerprint, frame_prediction=True)
    for name in ("train/wave/a", "train/jump/b", "test/wave/c", "test/jump/d"):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / f"{name}.mp4", moving_frames(12, seed=len(name)), 8.0)
    shutil.copy(folder / "videos/test/wave/c.mp4", folder / "video.mp4")
    return folder


HUB = {"hywang66/LARP-L-long-tokenizer": "tokenizer", "hywang66/LARP-L-long-AR": "ar_class"}


@pytest.fixture(scope="module")
def readme_ran(place, reference_dir):
    """The same folder after the README's commands, except some (train, plan, ...); the hub's models are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in COMMANDS["README.md"]:
            if words[0] == "larp-jax" and words[1] not in ("train", "plan", "prepare", "doctor"):
                assert "configs" not in " ".join(words)
                words = [str(reference_dir / HUB[word]) if word in HUB else word for word in words[1:]]
                assert cli.main(words) == 0, words
    return place


@pytest.mark.slow
def test_the_commands_of_the_readme_run(readme_ran):
    written = {path.name for path in readme_ran.iterdir()}
    assert {"reconstructions", "codes", "decoded", "samples", "predictions"} <= written
    assert "evaluation.json" in (readme_ran / "runs" / "mine" / "report.html").read_text("utf-8")
    assert {"codebook.npz", "codebook.safetensors"} <= written


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python") and page != "docs/code.md"])
def test_python_blocks_run(page, readme_ran, monkeypatch):
    monkeypatch.chdir(readme_ran)
    if page == "docs/export.md":
        for kind, output in (("stablehlo", "exported"), ("huggingface", "tokenizer_torch")):
            assert cli.main(["export", "--checkpoint=runs/mine", f"--format={kind}", f"--output={output}"]) == 0
    names = {}
    for before, block in blocks(PAGES[page], "python"):
        code = compile(block, page, "exec")
        if before.startswith(NOT_RUN):
            exec("\n".join(line for line in block.splitlines() if line.startswith(("import ", "from "))), {})
        elif "torch" not in block or importlib.util.find_spec("torch"):
            exec(code, names)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_examples_of_changing_the_code(tmp_path):
    """The diffs of docs/code.md apply to a copy of the package, and its examples then run."""
    for name in ("larp_jax", "tests/configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = PAGES["docs/code.md"]
    for _, diff in blocks(text, "diff"):
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    (command,) = [words for words in COMMANDS["docs/code.md"] if words[0] == "larp-jax"]
    code = "".join(block for _, block in blocks(text, "python"))
    code += f"from larp_jax import cli\nassert cli.__file__.startswith({str(tmp_path)!r})\n"
    code += f"raise SystemExit(cli.main({command[1:]!r}))\n"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "trained to step 2" in result.stdout
    assert "eval/motion" in (tmp_path / "runs" / "changed" / "metrics.jsonl").read_text("utf-8")
    if shutil.which("ruff"):
        subprocess.run(["ruff", "check", "--quiet", f"--config={ROOT / 'pyproject.toml'}", "larp_jax"], cwd=tmp_path,
                       check=True)  # fmt: skip


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


GENERATED = {"docs/commands.md", "docs/configuration.md"}  # written by docs/reference.py


@pytest.mark.parametrize("page", PAGES)
def test_links_are_valid(page):
    """`mkdocs build --strict` checks only docs; this test also checks the pages next to the README."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (ROOT / page).parent / name if name else ROOT / page
        relative = os.path.relpath(found, ROOT)
        if relative in GENERATED:
            continue
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(PAGES[relative]), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:larp_jax|tests|configs|launch|docs)/[\w./]+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_copies_in_other_colors_change_clothes_and_hardly_the_wall():
    script = runpy.run_path(str(ROOT / "docs" / "actions_recolored.py"))
    frames = np.full((6, 24, 32, 3), (160, 150, 140), np.uint8)
    where = np.zeros(frames.shape[:3], bool)
    for time in range(6):
        where[time, 8:20, 12 + time : 17 + time] = True  # stands partly in the same place, as people do
    frames[where] = (40, 30, 60)
    assert np.array_equal(script["person_mask"](frames / 255)[..., 0], where)

    copies = [script["recolored"](frames, np.random.default_rng(number)).astype(int) for number in range(20)]
    clothes = np.stack([copy[where] for copy in copies])
    assert np.all(clothes == clothes[:, :1])  # held over the whole video
    assert np.all(np.ptp(clothes[:, 0], axis=0) > 40)
    wall = np.stack([copy[~where] for copy in copies])
    assert np.all(wall == wall[:, :1])
    assert np.all(np.abs(wall / (160, 150, 140) - 1) < 0.09)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_without_warnings(tmp_path):
    # not --quiet: strictness counts only the warnings that are shown
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    configuration = (tmp_path / "configuration" / "index.html").read_text("utf-8")
    for setting in ("config.model.num_tokens", "config.optim.ema_decay", "config.mesh.fsdp", "larp_l"):
        assert setting in configuration
    assert "--cfg-scale" in (tmp_path / "commands" / "index.html").read_text("utf-8")
    api = (tmp_path / "api" / "index.html").read_text("utf-8")
    assert all(f'id="larp_jax.{name}"' in api for name in ("api.LoadedTokenizer.encode", "data.open_source"))
