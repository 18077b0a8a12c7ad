"""The comparison with a loop in PyTorch: both sample the same codes, and the script writes its table."""

import argparse
import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest

from larp_jax.api import load_generator
from larp_jax.config import GeneratorConfig, GeneratorRecipe, to_dict
from larp_jax.errors import InputError
from larp_jax.weights import checkpoint

pytest.importorskip("torch")
SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "bench_torch.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT), run_name="bench_torch")


def test_the_loop_samples_the_same_codes(script, reference_dir):
    generator = load_generator(reference_dir / "ar_class")
    loop = script["PlainLoop"](generator.config, jax.device_get(generator.params))
    classes = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    for scale in (1.0, 3.0):
        theirs = loop.sample(classes, cfg_scale=scale, greedy=True)
        ours = generator.sample(classes, key=jax.random.key(5), cfg_scale=scale, top_k=1)
        np.testing.assert_array_equal(theirs, ours)
    drawn = np.asarray(loop.sample(classes))
    assert drawn.shape == ours.shape and len(np.unique(drawn)) > len(classes)


def test_generators_of_other_kinds_are_refused(script):
    config = GeneratorConfig(width=8, depth=1, heads=1, codebook_size=4, num_tokens=4, condition="frames")
    with pytest.raises(InputError, match="given a class"):
        script["PlainLoop"](config, {})


@pytest.mark.slow
def test_the_script(script, tmp_path, monkeypatch, capsys):
    sizes = argparse.Namespace(checkpoint=None, sizes="1x16", tokens=5, vocabulary=8)
    ((name, (config, params)),) = script["models"](sizes).items()
    assert (name, config.depth, config.width, config.num_tokens, config.codebook_size) == ("1x16", 1, 16, 5, 8)
    saved, output = tmp_path / "generator", tmp_path / "bench.json"
    checkpoint.write_imported(saved, to_dict(GeneratorRecipe(model=config)), {"generator": params})
    options = f"--checkpoint {saved} --windows 2 --batches 2 --rounds 3 --output {output}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(output.read_text())
    assert list(found) == [f"{saved}, batch 2, guidance {scale}" for scale in (1.0, 1.25)]
    for result in found.values():
        assert list(result) == ["float32", "int8", "window 2", "load"]
        for form in ("float32", "int8", "window 2"):
            for name in ("speedup", "processor_speedup"):
                middle, least, most = result[form][name]
                assert 0 < least <= middle <= most
        assert 1 <= result["window 2"]["codes_per_pass"] <= 2
    assert capsys.readouterr().out.count("times as fast") == 6
