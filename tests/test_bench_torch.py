"""The comparison with a loop in PyTorch: both sample the same codes, and the script writes its table."""

import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest

from larp_jax.api import load_generator
from larp_jax.config import GeneratorConfig
from larp_jax.errors import InputError

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


def test_the_script(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench.json"
    sizes = "--sizes 1x16 --tokens 5 --vocabulary 8 --batches 2 --rounds 3 --output".split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes, str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(output.read_text())
    assert list(found) == ["1x16, batch 2, guidance 1.0", "1x16, batch 2, guidance 1.25"]
    for result in found.values():
        assert list(result) == ["float32", "int8", "load"]
        for form in ("float32", "int8"):
            for ratios in result[form].values():
                assert 0 < ratios[1] <= ratios[0] <= ratios[2]
    assert capsys.readouterr().out.count("times as fast") == 4
