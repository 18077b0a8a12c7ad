"""Files from elsewhere are data: nothing in them is executed, unpickled or followed out of its folder."""

import ast
import contextlib
import hashlib
import io
import json
import pathlib
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
from data_helpers import moving_frames

from larp_jax.config import parse_recipe
from larp_jax.data import codes as codes_on_disk, open_source, prepare, video
from larp_jax.errors import InputError
from larp_jax.weights import importing, tensors

PACKAGE = pathlib.Path(__file__).parents[1] / "larp_jax"
# Modules and functions that turn bytes into objects or code.
MODULES = {"cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code"}
EXCEPTIONAL = {"runpy", "subprocess", "ctypes", "pickle"}
FUNCTIONS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FUNCTIONS |= {"pickle.load", "pickle.loads", "pickle.Unpickler"}
# Recipes that users name on the command line are Python files and are executed.
# `doctor` runs nvidia-smi, `experiment` starts its own command several times, and `allocator` sets options of the C
# library. `tensors` has an unpickler that admits arrays and nothing else (tests/test_lpips.py).
EXCEPTIONS = {
    ("recipe.py", "runpy"),
    ("doctor.py", "subprocess"),
    ("experiment.py", "subprocess"),
    ("allocator.py", "ctypes"),
    ("tensors.py", "pickle"),
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def complaints(name, source):
    """The places in a module that could execute the data it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in names:
                root = module.split(".")[0]
                if root in MODULES or (root in EXCEPTIONAL and (name, root) not in EXCEPTIONS):
                    yield f"line {node.lineno}: import {module}"
        elif isinstance(node, ast.Call):
            called, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            constant = lambda key: getattr(given.get(key), "value", None)  # noqa: E731, B023
            if called in FUNCTIONS:
                yield f"line {node.lineno}: {called}"
            if called in ("np.load", "numpy.load") and constant("allow_pickle") is not False:
                yield f"line {node.lineno}: np.load without allow_pickle=False"
            if called == "torch.load" and constant("weights_only") is not True:
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if constant("shell") is True:
                yield f"line {node.lineno}: a shell"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_executes_the_data_it_reads(path):
    assert not list(complaints(path.name, path.read_text("utf-8")))


def test_the_rule_sees_every_way():
    source = "import pickle\nfrom yaml import load\nimport runpy, subprocess\neval(x)\nnp.load(p)\n"
    source += "np.load(p, allow_pickle=True)\ntorch.load(p)\ntorch.load(p, weights_only=False)\nrun(c, shell=True)\n"
    assert len(list(complaints("x.py", source))) == 10
    assert len(list(complaints("tensors.py", "import pickle\npickle.loads(x)\npickle.Unpickler(f).load()"))) == 2
    assert not list(complaints("recipe.py", "import runpy\nnp.load(p, allow_pickle=False)\nmodel.eval(x)"))


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pickles_in_the_place_of_arrays(tmp_path):
    sprung = tmp_path / "sprung"
    rows = [{"source": "a.mp4", "start": 0, "frames": 8, "fps": 8.0, "label": 0}]
    name = "codes-00000-of-00001.npz"
    manifest = {"N": 1, "K": 2, "shards": [{"file": name, "rows": 1}], "rows": rows}
    np.savez(tmp_path / name, codes=np.array([[Trap(sprung)]], object))
    with pytest.raises(InputError, match="contains object"):
        codes_on_disk.read_shard(tmp_path, manifest, 0)
    with pytest.raises(InputError, match=r"not object \(codes\)"):
        tensors.read_npz(tmp_path / name, check=lambda shapes: None)
    assert not sprung.exists()


def test_arrays_that_claim_more_than_there_is_memory(tmp_path):
    header = io.BytesIO()
    shape = (1, 2**31 - 1)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (2**40, 8)})
    name = "codes-00000-of-00001.npz"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("codes.npy", header.getvalue())
    manifest = {"N": shape[1], "K": 2, "shards": [{"file": name, "rows": shape[0]}], "rows": [{}]}
    with pytest.raises(InputError, match=r"contains int32 \[1099511627776, 8\] instead of int32 \[1, 2147483647\]"):
        codes_on_disk.read_shard(tmp_path, manifest, 0)


def test_settings_of_a_checkpoint_are_values(tmp_path):
    for text in ("__import__('os').system('true')", "${oc.env:HOME}", "!!python/object:os.system", "{0.__class__}"):
        with pytest.raises(InputError):
            parse_recipe({"steps": text})
        assert parse_recipe({"data": {"train": text}}).data.train == text  # only a name; no such data set exists
        with pytest.raises(InputError):
            open_source(text)


@pytest.fixture
def prepared(tmp_path):
    video.write_video(tmp_path / "videos.mp4", moving_frames(20, 16, 16), 8)
    (tmp_path / "videos").mkdir()
    shutil.move(tmp_path / "videos.mp4", tmp_path / "videos" / "a.mp4")
    folder = tmp_path / "prepared"
    settings = prepare.Settings(16, "raw")
    prepare.prepare([str(tmp_path / "videos")], folder, settings, workers=1, progress=lambda text: None)
    assert len(open_source(f"tfds:{folder}:train")) == 1
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_data_sets_cannot_name_files_outside_their_folder(prepared, tmp_path):
    path = prepared / "dataset_info.json"
    split = json.loads(path.read_text())["splits"][0]
    shutil.copy(next(prepared.glob("videos-train*")), tmp_path / "x-train.array_record-00000-of-00001")
    for template in (
        "../x-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}-of-{NUM_SHARDS}",
        str(tmp_path / "x-{SPLIT}.array_record"),
    ):
        change(path, splits=[split | {"filepathTemplate": template}])
        with pytest.raises(InputError, match="names a file outside "):
            open_source(f"tfds:{prepared}:train")


def test_data_sets_cannot_name_code(prepared, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Feature: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    features = json.loads((prepared / "features.json").read_text())
    text = json.dumps(features)
    names = {value for value in _strings(features) if value.startswith("tensorflow_datasets.")}
    assert names
    for name in names:
        text = text.replace(f'"{name}"', '"trap.Feature"')
    (prepared / "features.json").write_text(text)
    change(prepared / "dataset_info.json", moduleName="trap", name="trap")
    with contextlib.suppress(InputError):
        open_source(f"tfds:{prepared}:train")
    assert "trap" not in sys.modules and not (tmp_path / "sprung").exists()


def _strings(values):
    if isinstance(values, str):
        yield values
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _strings(value)


@pytest.mark.parametrize("damaged", [None, "config.json", "model.safetensors"])
def test_downloads_are_checked_by_their_hashes(tmp_path, monkeypatch, reference_dir, damaged):
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "prior.json"):
        content = (reference_dir / "tokenizer" / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if name != "model.safetensors":  # the hash that Git uses
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = tmp_path / digest
        blob.write_bytes(content + b" " if name == damaged else content)
        (snapshot / name).symlink_to(blob)
    hub = types.SimpleNamespace(snapshot_download=lambda repository, revision, allow_patterns: str(snapshot))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    if damaged:
        message = rf"{damaged} is corrupted \(its hash differs from the server's\); .* download it again"
        with pytest.raises(InputError, match=message):
            importing.import_huggingface("someone/something")
    else:
        assert importing.import_huggingface("someone/something")[0] == "tokenizer"
