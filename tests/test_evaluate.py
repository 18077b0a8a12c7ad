"""Evaluation from Python equals that of the command; a new metric needs one class and one registry entry."""

import json

import jax.numpy as jnp
import pytest

import larp_jax
from larp_jax import cli
from larp_jax.config import GeneratorConfig, default_recipe, parse_recipe
from larp_jax.errors import InputError
from larp_jax.evaluation import registry
from larp_jax.evaluation.description import Panel
from larp_jax.evaluation.metrics import Average, Need
from larp_jax.tools import report

DATA = "moving_shapes:test"


class Brightness(Average):
    """Mean of all pixels."""

    name = "brightness"
    definitions = {"brightness": "mean of all pixels"}
    needs = (Need("light", lambda recipe, modules: "tokenizer" in modules),)
    panels = (Panel("Brightness", "", {"brightness": "evaluation"}), Panel("PSNR", "dB", {"brightness": "for scale"}))

    def values(self, weights, batch):
        return {"brightness": jnp.mean(batch.reconstruction, axis=(1, 2, 3, 4))}


def test_evaluate_returns_what_the_command_writes(trained, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    command = ["evaluate", f"--checkpoint={trained}", f"--data={DATA}", f"--output={output}"]
    assert cli.main([*command, "--metrics=psnr,usage", "--max-clips=6", "--weights=raw"]) == 0
    capsys.readouterr()
    result = larp_jax.evaluate(trained, DATA, metrics=["psnr", "usage"], max_clips=6, weights="raw")
    assert json.loads(json.dumps(result)) == json.loads(output.read_text())
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="--tokenizer is for generators"):
        larp_jax.evaluate(trained, DATA, tokenizer=trained)
    with pytest.raises(InputError, match="--training-data is for --protocol held_out"):
        larp_jax.evaluate(trained, DATA, training_data=DATA)


def test_a_metric_is_one_class_and_one_entry(trained, monkeypatch):
    monkeypatch.setitem(registry.METRICS, "brightness", Brightness)
    result = larp_jax.evaluate(trained, DATA, metrics=["brightness"], max_clips=4)
    assert result["metrics"].keys() == {"brightness"} and 0.0 < result["metrics"]["brightness"] < 1.0
    assert result["protocol"]["definitions"]["brightness"] == "mean of all pixels"
    panels = report._scalars_of_panels()
    assert panels["Brightness"] == ("", {"eval/brightness": "evaluation"})
    assert panels["PSNR"][1]["eval/brightness"] == "for scale"
    shipped = [metric for metric in registry.METRICS.values() if metric is not Brightness]
    titles = list(panels)  # in the order of METRICS
    assert all(titles.index("Brightness") > titles.index(panel.title) for one in shipped for panel in one.panels)
    fitting = registry.available(parse_recipe(default_recipe("tokenizer")), ["prior"])
    assert "brightness" not in fitting and "prior" in fitting
    with pytest.raises(InputError, match=r"does not apply to this checkpoint \(.*brightness light\)"):
        registry.choose(["brightness"], ["psnr"], "tokenizer")


@pytest.mark.parametrize("metric", list(registry.every_metric()), ids=lambda metric: metric.name)
def test_panels_are_of_scalars_that_are_defined(metric):
    for panel in metric.panels:
        assert panel.labels.keys() <= metric.definitions.keys()


def test_the_default_metrics_need_no_network():
    recipe = parse_recipe(default_recipe("tokenizer"))
    fitting = registry.available(recipe, ["tokenizer", "prior"])
    assert registry.choose(None, fitting, "tokenizer") == ["psnr", "ssim", "usage", "prior"]
    assert registry.choose(None, registry.generator_metrics(GeneratorConfig()), "generator") == ["cross_entropy"]
    assert [metric.name for metric in registry.default_metrics(fitting, recipe)] == ["psnr", "ssim", "usage", "prior"]
