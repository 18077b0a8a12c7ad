"""A flow generator as a Hugging Face directory, and back."""

import json

import jax
import numpy as np
import pytest
from test_export import random_params

import larp_jax
from larp_jax import cli
from larp_jax.config import FlowConfig, FlowRecipe, to_dict
from larp_jax.errors import InputError
from larp_jax.weights import checkpoint

SIZES = {"size": "custom", "width": 16, "depth": 1, "heads": 2, "num_tokens": 5, "code_dim": 2, "num_classes": 3}
STATISTICS = {"mean": [0.1, -2.0], "std": [1.0, 0.3]}


def test_a_flow_comes_back_with_equal_samples(tmp_path, capsys):
    recipe = FlowRecipe(model=FlowConfig(**SIZES), cond_frames=2)
    known = {"step": 7, "latent_statistics": STATISTICS, "class_names": ["a", "b"]}
    checkpoint.write_imported(tmp_path / "g", to_dict(recipe), random_params(recipe.model), known)
    folder = tmp_path / "exported"
    assert cli.main(["export", f"--checkpoint={tmp_path / 'g'}", "--format=huggingface", f"--output={folder}"]) == 0
    assert json.loads((folder / "config.json").read_text())["kind"] == "flow"
    assert cli.main(["import", f"--source={folder}", f"--output={tmp_path / 'again'}"]) == 0
    first, *others = (larp_jax.load_generator(path) for path in (tmp_path / "g", folder, tmp_path / "again"))
    samples = first.sample([0, -1], key=jax.random.key(0), solver_steps=2)
    for other in others:
        assert (other.config, other.class_names, other.fingerprint) == (first.config, ("a", "b"), first.fingerprint)
    np.testing.assert_allclose(other.sample([0, -1], key=jax.random.key(0), solver_steps=2), samples, atol=1e-6)

    assert cli.main(["export", f"--checkpoint={tmp_path / 'g'}", "--format=stablehlo", f"--output={folder}2"]) == 2
    assert "contains a generator, which exports as huggingface only" in capsys.readouterr().err
    for file, content, said in (
        ("larp_jax.json", {"latent_statistics": {"mean": [0, 1], "std": [1]}}, "latent_statistics is not what"),
        ("larp_jax.json", {}, "latent_statistics are missing"),
        ("larp_jax.json", None, "larp_jax.json is missing"),
        ("config.json", {"kind": "flow", "heads": 5}, "config.json: model"),
        ("config.json", {"kind": "flow", **SIZES, "widht": 5}, "config.json: model.widht"),
    ):
        before = (folder / file).read_text()
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            larp_jax.load_generator(folder)
        (folder / file).write_text(before)
