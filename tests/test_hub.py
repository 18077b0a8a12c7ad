"""Models are pushed to and loaded from a server that speaks the hub's interface; the real hub is never reached."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import hub_server
import numpy as np
import pytest
from network_weights import write_teacher
from test_export import assert_same, random_params, recipe

import larp_jax
from larp_jax import api, cli, config, files, hub
from larp_jax.errors import InputError
from larp_jax.tools.card import model_card
from larp_jax.weights import checkpoint, export, importing, networks

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "owner/model"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server, as the hub of this process; the cache and the home are empty, and the owner is logged in."""
    from huggingface_hub import constants

    with hub_server.running() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patches = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        patches |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "none")}
        patches |= {"HF_HUB_DISABLE_PROGRESS_BARS": True}
        for name, value in patches.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
        yield server


@pytest.fixture
def model(tmp_path):
    """A tokenizer with random weights, as an imported checkpoint."""
    made = recipe(data=config.DataConfig(train=f"folder:{tmp_path}/private/clips", fps=8.0))
    counts = list(range(made.model.quantizer.codebook_size))
    checkpoint.write_imported(
        tmp_path / "model", config.to_dict(made), random_params(made), {"step": 120, "code_counts": counts}
    )
    return tmp_path / "model"


def push(folder, name=NAME, *more):
    return cli.main(["export", f"--checkpoint={folder}", "--format=huggingface", f"--push={name}", *more])


def error(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("larp-jax: error: ")]
    return line


def test_the_card_counts_only_what_is_pushed(model):
    found = api.load_checkpoint(model)
    beside = {name: {"out": np.zeros((3, 2), np.float32)} for name in ("projector", "discriminator")}
    found = dataclasses.replace(found, params=found.params | beside)
    text = model_card(found, NAME, "unknown")["README.md"].decode()
    assert "parameters of the tokenizer" in text and "projector" not in text
    assert "parameters of the discriminator" not in text


def test_a_model_is_pushed_and_loaded_back_by_id(server, model, tmp_path, capsys):
    results = {"metrics": {"psnr": 25.5}, "protocol": {"step": 120, "clips": 7, "data": f"folder:{tmp_path}/held|out"}}
    results["protocol"]["definitions"] = {"psnr": "mean over clips"}
    files.write_json(model / "evaluation.json", results)
    files.write_json(model / "earlier.json", {"metrics": {"psnr": 1.5}, "protocol": {"step": 20}})
    (model / "media").mkdir()
    for step, content in ((20, b"old"), (120, b"picture"), (140, b"of a later step")):
        (model / "media" / f"{step:08d}_reconstruction.png").write_bytes(content)
    assert push(model, NAME, "--license", "apache-2.0") == 0
    (commit,) = [c for c, held in server.repositories[NAME]["commits"].items() if "config.json" in held]
    assert f"step 120 pushed: {server.url}/{NAME}/commit/{commit}" in capsys.readouterr().out
    held = server.repositories[NAME]["commits"][commit]
    assert NAME in server.private and held["picture.png"] == b"picture"
    card = held["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n") and f'load_tokenizer("hf://{NAME}")' in card
    assert "| psnr | 25.5 | mean over clips |" in card and "1.5" not in card and "clips: 7" in card
    assert "folder:clips" in card and "held\\|out" in card and "![" in card
    assert not any(str(tmp_path).encode() in content for content in held.values())

    found, here = api.load_checkpoint(f"hf://{NAME}"), api.load_checkpoint(model)
    assert found.recipe.model == here.recipe.model and found.recipe.data.fps == 8.0 and found.step == 120
    assert_same(found.params, here.params)
    np.testing.assert_array_equal(found.code_counts, here.code_counts)
    tokenizer, original = larp_jax.load_tokenizer(f"hf://{NAME}@{commit}"), larp_jax.load_tokenizer(model)
    video = np.random.default_rng(0).random((1, *tokenizer.config.clip_shape), np.float32)
    np.testing.assert_array_equal(tokenizer.encode(video), original.encode(video))
    for source in (NAME, f"hf://{NAME}@main"):
        output = tmp_path / source.replace("/", "_")
        assert cli.main(["import", f"--source={source}", f"--output={output}"]) == 0
        assert_same(api.load_checkpoint(output).params, here.params)


SMALL = {"size": "custom", "width": 16, "depth": 1, "heads": 2, "codebook_size": 10, "num_tokens": 5, "num_classes": 3}


FLOW = {name: SMALL[name] for name in SMALL if name != "codebook_size"} | {"code_dim": 2}


@pytest.mark.parametrize(
    ("network", "known"),
    [
        (
            config.GeneratorConfig(**SMALL, frame_prediction=True, frames_dropout=0.25),
            {"tokenizer_fingerprint": "0123456789abcdef"},
        ),
        (config.GeneratorConfig(**SMALL), {"class_names": ["a", "b"], "class_counts": [1, 2, 3]}),
        (
            config.FlowConfig(**FLOW, condition="class+frames"),
            {"latent_statistics": {"mean": [0.1, -2.0], "std": [1.0, 0.3]}, "class_counts": [1, 2, 3]},
        ),
    ],
    ids=["frames", "class", "flow"],
)
def test_a_generator_keeps_what_the_released_layout_has_no_field_for(server, tmp_path, network, known):
    made = (config.GeneratorRecipe if network.has_codes else config.FlowRecipe)(model=network, cond_frames=2)
    checkpoint.write_imported(tmp_path / "g", config.to_dict(made), random_params(made.model), known)
    (tmp_path / "g" / "metrics.jsonl").write_text('{"step": 0, "eval/top1": 0.5}\n{"step": 9, "eval/top1": 0.75}\n')
    assert push(tmp_path / "g") == 0
    *_, held = server.repositories[NAME]["commits"].values()
    card = held["README.md"].decode()
    assert "| top1 | 0.5 |" in card and "0.75" not in card and 'computed: "during training"' in card
    assert f'load_generator("hf://{NAME}")' in card and "license: unknown" in card and "picture.png" not in held
    assert cli.main(["import", f"--source=hf://{NAME}", f"--output={tmp_path / 'copy'}"]) == 0
    for path in (f"hf://{NAME}", tmp_path / "copy"):
        generator = larp_jax.load_generator(path)
        assert generator.config == made.model and generator.config.has_null_frames == (network.frames_dropout > 0)
        assert generator.fingerprint == larp_jax.load_generator(tmp_path / "g").fingerprint
        assert generator.tokenizer_fingerprint == known.get("tokenizer_fingerprint")
        assert generator.class_names == tuple(known.get("class_names", ()))
        np.testing.assert_array_equal(generator.class_counts, known.get("class_counts"))
        assert api.load_checkpoint(path, kind="generator").recipe.cond_frames == 2
    assert ("`from_pretrained` of the authors' code reads" in card) == network.has_codes
    if not network.has_codes:
        assert "latents = generator.sample(classes=classes, frames=frames" in card
        assert "| latents of a clip | 5 of 2 floats |" in card


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"settings": {"model.width": 3}}', '{"settings": {"data.fps": -1}}', '{"class_counts": [1]}',
     '{"step": "x"}', '{"code_counts": [1]}', '{"more": 1}', '{"settings": []}'],
)  # fmt: skip
def test_what_lies_beside_the_weights_is_checked(model, tmp_path, content):
    found = api.load_checkpoint(model)
    export.export_huggingface(tmp_path / "out", found.recipe, found.params)
    (tmp_path / "out" / "larp_jax.json").write_text(content)
    with pytest.raises(InputError, match="larp_jax.json"):
        importing.read_model(tmp_path / "out")


def exported(model, tmp_path):
    found = api.load_checkpoint(model)
    export.export_huggingface(tmp_path / "files", found.recipe, found.params)
    return {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}


def test_revisions_and_what_the_hub_refuses(server, model, tmp_path, capsys, monkeypatch):
    server.repositories[NAME] = {"commits": {}, "refs": {}}
    first = server.commit(NAME, exported(model, tmp_path) | {"weights.pth": b"a pickle", "pytorch_model.bin": b"too"})
    server.commit(NAME, {"README.md": b"no model any more"})
    server.repositories[NAME]["refs"]["v1"] = first
    server.moved["owner/old"] = NAME

    def load(text, code=2):
        output = tmp_path / "imported"
        assert cli.main(["import", f"--source=hf://{text}", f"--output={output}"]) == code and not output.exists()
        return error(capsys)

    assert [hub.download(f"hf://{x}", "x").name for x in (f"{NAME}@v1", f"owner/old@{first}")] == [first, first]
    names = {path.name for path in hub.download(f"hf://{NAME}@v1", "x").iterdir()}
    assert names <= set(hub.FILES) and not any("pth" in path or "bin" in path for _, path in server.requests)
    assert "contains no model that can be read: it has no config.json and no model.safetensors" in load(NAME)
    assert f"--source hf://{NAME}@v2: the repository has no such revision; give a branch" in load(f"{NAME}@v2")
    del server.repositories[NAME]["refs"]["v1"]  # the tag is gone; what it was is still in the cache
    assert "no such revision" in load(f"{NAME}@v1")
    assert "hf://owner/none: there is no such repository, or a private one; check the name" in load("owner/none")
    server.private.add(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path / "another cache")
    assert "or run hf auth login, or set HF_TOKEN to a token that may read it" in load(NAME)
    server.status = 403
    assert "the hub refuses to read it (403); run hf auth login" in load(NAME)
    server.status = 503
    assert "the hub does not answer (status 503)" in load(NAME, code=1)
    for text in ("owner", "owner/name/more", "owner/na me", "../name", "owner/name@", "owner/name@a b"):
        assert f"--source hf://{text} is no repository; write hf://OWNER/NAME" in load(text)


def test_a_push_that_is_refused(server, model, capsys, monkeypatch):
    assert push(model, "someone/model") == 2
    assert "--push someone/model: the hub refuses to write to it (403); run hf auth login" in error(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert push(model) == 2
    assert f"--push {NAME}: the hub refuses to write to it (401); run hf auth login, or set HF_TOKEN" in error(capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert push(model) == 2
    assert "(401)" in error(capsys) and not server.repositories
    for arguments, message in (
        (["--push", f"{NAME}@v1"], "names a revision"),
        (["--push", "model"], "is no repository"),
        (["--push", NAME, "--output", "x"], "either --output PATH or --push"),
        (["--push", NAME, "--license", "two\nlines"], "is not the id of a license"),
        (["--output", "x", "--license", "mit"], "--license is for the card"),
        ([], "either --output PATH or --push"),
    ):
        assert cli.main(["export", "--checkpoint", str(model), "--format=huggingface", *arguments]) == 2
        assert message in error(capsys)
    assert cli.main(["export", "--checkpoint", str(model), "--format=stablehlo", "--push", NAME]) == 2
    assert "--push is for --format huggingface" in error(capsys)


def test_without_a_network_the_cache_is_used(server, model, tmp_path, capsys, monkeypatch):
    server.repositories[NAME] = {"commits": {}, "refs": {}}
    server.commit(NAME, exported(model, tmp_path))
    there = hub.download(f"hf://{NAME}", "x")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert hub.download(f"hf://{NAME}", "x") == there
    missing = ["reconstruct", "--checkpoint=hf://owner/other", "--input=x.mp4", f"--output={tmp_path / 'out'}"]
    assert cli.main(missing) == 1
    line = error(capsys)
    assert "checkpoint hf://owner/other: the hub does not answer (ConnectError" in line and "check the network" in line
    assert push(model) == 1
    assert f"--push {NAME}: the hub does not answer (ConnectError" in error(capsys)


def test_the_environment_of_the_hub_applies(server, model, tmp_path):
    server.repositories[NAME] = {"commits": {}, "refs": {}}
    commit = server.commit(NAME, exported(model, tmp_path))
    code = f"""
from larp_jax import hub
try:
    print(hub.download("hf://{NAME}", "--checkpoint"))
except ValueError as error:
    print(error)
"""

    def read(**changes):
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = keep | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url} | changes
        root = pathlib.Path(larp_jax.__file__).parents[1]
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    said = read(HF_HUB_OFFLINE="1")
    assert f"--checkpoint hf://{NAME} is not in the cache {tmp_path / 'home'}" in said
    assert "unset HF_HUB_OFFLINE" in said
    assert read() == str(tmp_path / "home" / "hub" / "models--owner--model" / "snapshots" / commit)
    before = len(server.requests)
    assert read(HF_HUB_OFFLINE="1").endswith(commit) and len(server.requests) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=x.py", "--workdir=hf://owner/name"],
        ["export", "--checkpoint=run", "--format=huggingface", "--output=hf://owner/name"],
        ["tokenize", "--checkpoint=hf://owner/name", "--input=x.mp4", "--output=hf://owner/name"],
        ["evaluate", "--checkpoint=hf://owner/name", "--data=folder:hf://owner/name"],
        ["train", "--config=x.py", "--workdir=run", "--config.data.train=folder:hf://owner/name"],
        ["report", "--workdir=hf://owner/name"],
    ],
)
def test_only_models_are_read_from_the_hub(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    line = error(capsys)
    assert "hf:// is not supported here" in line and "export --push OWNER/NAME writes one" in line
    assert not list(tmp_path.iterdir())


def test_settings_that_name_a_model(server, tmp_path, capsys):
    from larp_jax.cli.app import parse
    from larp_jax.cli.arguments import check_paths

    for setting in ("init_from", "tokenizer"):
        check_paths(parse(["train", "--config=x.py", f"--workdir={tmp_path}", f"--config.{setting}=hf://owner/name"]))
    parsed = parse(["sample", "--checkpoint=hf://a/b", "--tokenizer=hf://c/d@v1", f"--output={tmp_path}"])
    check_paths(parsed)
    assert (parsed.checkpoint, parsed.tokenizer) == ("hf://a/b", "hf://c/d@v1")
    assert files.relative("hf://a/b") == "hf://a/b" and not server.requests
    assert hub.parse("hf://a/b@refs/pr/1", "x") == ("a/b", "refs/pr/1")


def test_a_teacher_is_imported_by_its_repository(server, tmp_path, reference_dir):
    """Its settings and safetensors are downloaded, and no pickle."""
    folder = write_teacher(tmp_path, reference_dir, "dinov2")
    server.repositories["owner/dino"] = {"commits": {}, "refs": {}}
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.commit("owner/dino", contents | {"pytorch_model.bin": b"pickle"})
    output = tmp_path / "dino.safetensors"
    arguments = ["import", "--kind=dinov2", "--source=hf://owner/dino", f"--output={output}"]
    assert cli.main(arguments) == 0 and networks.load_teacher(output).config.width == 24
    assert not [request for request in server.requests if "pytorch_model.bin" in str(request)]
