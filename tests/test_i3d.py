"""I3D agrees with the reference, and only exactly matching weights are imported."""

import pickle
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import i3d_deviations
from flax import nnx
from network_weights import i3d_tensors
from safetensors.numpy import save_file

from larp_jax.errors import InputError
from larp_jax.models.i3d import I3d
from larp_jax.weights.i3d import import_i3d


@pytest.fixture(scope="module")
def tensors(reference_dir):
    return i3d_tensors(reference_dir)


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        import_i3d(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


def test_logits_of_the_reference(reference_dir):
    deviations = i3d_deviations(reference_dir / "i3d")
    assert not [d for d in deviations if not d.within]


def test_shapes_for_videos_of_any_size():
    i3d = nnx.eval_shape(lambda: I3d(rngs=nnx.Rngs(0)))

    def shape(*video):
        return jax.eval_shape(lambda m, v: m.logits(v), i3d, jax.ShapeDtypeStruct(video, jnp.float32)).shape

    assert shape(3, 9, 20, 33, 3) == (3, 400)
    assert shape(1, 40, 224, 224, 3) == (1, 400)
    for wrong in [(3, 8, 64, 64, 3), (16, 64, 64, 3), (1, 3, 16, 64, 64)]:
        with pytest.raises(InputError, match="T at least 9"):
            shape(*wrong)


def test_missing_extra_and_misshaped_tensors_are_listed(tmp_path, tensors):
    wrong = dict(tensors, extra=np.zeros(3, np.float32))
    wrong["Mixed_3b.b0.conv3d.weight"] = np.zeros((64, 192, 1, 1), np.float32)
    del wrong["logits.conv3d.bias"]
    save_file(wrong, tmp_path / "weights.safetensors")
    message = refusal(tmp_path / "weights.safetensors")
    assert "missing logits.conv3d.bias;" in message and "not expected extra;" in message
    assert "Mixed_3b.b0.conv3d.weight [64, 192, 1, 1] for [64, 192, 1, 1, 1]" in message


@pytest.mark.parametrize(
    ("part", "value"), [("running_var", -1e-5), ("running_var", np.nan), ("weight", 3e38), ("running_mean", np.inf)]
)
def test_impossible_values_are_refused(tmp_path, tensors, part, value):
    name = f"Conv3d_2b_1x1.bn.{part}"
    wrong = dict(tensors) | {name: np.full(64, value, np.float32)}
    wrong["Conv3d_2b_1x1.bn.running_mean"] = wrong["Conv3d_2b_1x1.bn.running_mean"] + np.float32(10.0)
    save_file(wrong, tmp_path / "weights.safetensors")
    assert "not finite in conv3d_2b/" in refusal(tmp_path / "weights.safetensors")


def test_npz_and_safetensors_give_the_same(tmp_path, tensors):
    save_file(tensors, tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **tensors)
    ours = [import_i3d(tmp_path / name) for name in ("weights.safetensors", "weights.npz")]
    jax.tree.map(np.testing.assert_array_equal, *ours)


def test_a_pickle_inside_npz_is_not_read(tmp_path):
    np.savez(tmp_path / "weights.npz", weights=np.array([{}], object))
    assert "not object (weights)" in refusal(tmp_path / "weights.npz")


def test_pytorch_files(tmp_path, tensors):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    expected = import_i3d(tmp_path / "weights.safetensors")
    for zipped in (True, False):
        torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
        jax.tree.map(np.testing.assert_array_equal, import_i3d(tmp_path / "weights.pt"), expected)
    content = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    assert "read safely" in refusal(tmp_path / "half.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "contains a list" in refusal(tmp_path / "list.pt")


def test_torchscript_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings(action="ignore"):  # newer PyTorch deprecates it
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "state_dict(), 'weights.pt')" in refusal(tmp_path / "script.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_not_executed(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    refusal(tmp_path / "weights.pt")
    assert not (tmp_path / "burst").exists()


def test_pytorch_files_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "pip install torch, or give its tensors as .safetensors or .npz" in refusal(tmp_path / "weights.pt")
