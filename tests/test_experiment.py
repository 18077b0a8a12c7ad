"""Experiments: the same arms give the same numbers, interrupted or not, and the measures are what they say."""

import dataclasses
import json

import numpy as np
import pytest

from larp_jax import cli
from larp_jax.cli.recipe import load_experiment
from larp_jax.config import Experiment, completed, differences, experiment_recipes, make_experiment, to_dict
from larp_jax.data import moving_shapes
from larp_jax.errors import InputError
from larp_jax.models import classifier
from larp_jax.tools import experiment as experiments, flops
from larp_jax.tools.experiment_results import MEASURES, Cell, bootstrap, summarize, table
from larp_jax.tools.report import report
from larp_jax.training.generator import GeneratorTask
from larp_jax.weights.checkpoint import read_config, write_config

SHIPPED = ("bottleneck", "patchwise", "prior", "prior_size", "quantizer", "scheduled_sampling", "semantic", "tokens")


@pytest.mark.parametrize("variant", ["", "tiny", "gpu64", "gpu128"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_are_valid(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they are found from any folder
    experiment = load_experiment(f"{name}:{variant}")
    assert len(experiment.arms) >= 2 and experiment.question.endswith("?")
    sizes = {(arm.model.num_tokens, arm.model.quantizer.codebook_size) for arm in experiment.arms.values()}
    assert len(sizes) == 1 or name == "tokens"


@pytest.mark.parametrize("variant", ["", "tiny", "gpu64", "gpu128"])
def test_generators_of_codes_and_latents_train_with_equal_flops(variant):
    experiment = load_experiment(f"bottleneck:{variant}")
    codes, latents = (experiment.arms[name].model for name in ("codes", "latents"))
    assert codes == dataclasses.replace(latents, quantizer=codes.quantizer)
    generator, flow = experiment.generator_of("codes"), experiment.generator_of("latents")
    assert (generator.data, generator.precision) == (flow.data, flow.precision)
    sizes = {"num_tokens": codes.num_tokens, "num_classes": 16}
    one = dataclasses.replace(generator.model, codebook_size=codes.quantizer.codebook_size, **sizes)
    other = dataclasses.replace(flow.model, code_dim=latents.quantizer.code_dim, **sizes)
    one, other = flops.generator_train_step(one)["generator"], flops.flow_train_step(other)["generator"]
    assert flow.steps * other == pytest.approx(generator.steps * one, rel=0.05)


LATENTS = [f"latents/seed-0/{name}" for name in ("encoded/train", "codes/train", "codes/test")]


def tiny(**changes):
    recipe, generator = experiment_recipes("tiny")
    options = {"seeds": 1, "windows": 1, "samples": 16, "probe_steps": 2} | changes
    return make_experiment("Is it the same?", {"first": recipe, "same": recipe}, generator, **options)


@pytest.fixture
def small_measures(monkeypatch):
    """The classifier is narrow, and LPIPS compares few frames: both take most of the time otherwise."""
    monkeypatch.setattr(classifier, "WIDTHS", (4, 4, 4))
    monkeypatch.setattr(experiments, "LPIPS_CLIPS", 2)


@pytest.mark.slow
def test_an_interrupted_experiment_continues_to_the_same_table(tmp_path, monkeypatch, small_measures):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
    recipe, generator = experiment_recipes("tiny")
    recipe.loss.prior_weight = 0.0  # compiles in half the time
    options = {"seeds": 1, "windows": 1, "samples": 16, "probe_steps": 2}
    experiment = make_experiment("Is it the same?", {"only": recipe}, generator, **options)

    class Killed(BaseException):
        pass

    evaluate, steps = GeneratorTask.evaluate, []

    def killed(task, state, step, writer):
        steps.append(step)
        if len(steps) == 2:  # in the middle of the first generator, after a checkpoint
            raise Killed
        return evaluate(task, state, step, writer)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTask, "evaluate", killed)
        with pytest.raises(Killed):
            experiments.run_experiment(experiment, tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*/*/cell.json"))
    (tmp_path / "parts").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    parts = experiments.run_experiment(experiment, ".")
    assert {"psnr", "order_gap", "gain", "reach", "sample_accuracy"} <= parts["arms"]["only"].keys()

    experiments.run_experiment(experiment, tmp_path / "whole")
    for name in ("results.json", "results.md", "results.svg"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    page = report(tmp_path / "whole").read_text()
    assert page.count("<img") == 2 and "Order gap" in page

    with pytest.raises(InputError, match="holds an experiment with other settings"):
        experiments.run_experiment(dataclasses.replace(experiment, windows=2), tmp_path / "whole")
    check_an_arm_with_latents_is_added(experiment, tmp_path / "whole")


def check_an_arm_with_latents_is_added(experiment, folder):
    shipped, before = load_experiment("bottleneck:tiny"), json.loads((folder / "results.json").read_text())
    arms = experiment.arms | {"latents": shipped.arms["latents"]}
    both = dataclasses.replace(experiment, arms=arms, generators={"latents": shipped.generators["latents"]})
    results = experiments.run_experiment(both, folder)
    assert results["arms"]["only"] == before["arms"]["only"]
    of_codes = {"usage", "unigram", "cross_entropy", "gain", "order_gap"}
    assert of_codes < results["arms"]["only"].keys()
    assert results["arms"]["latents"].keys() == results["arms"]["only"].keys() - of_codes
    rows = (folder / "results.md").read_text().splitlines()
    assert [row.endswith("| – |") for row in rows if row.startswith(("| PSNR", "| CE", "| Samples"))] == [0, 1, 0]
    assert not (folder / "latents" / "seed-0" / "generator_permuted").exists()
    manifests = [json.loads((folder / path / "manifest.json").read_text()) for path in LATENTS]
    whole, train, test = (manifest["mean"] for manifest in manifests)
    np.testing.assert_allclose(train, whole, rtol=1e-4)  # of what float16 left of them
    assert np.abs(np.subtract(test, whole)).max() > 1e-3  # those of its own rows


def test_an_arm_starts_from_an_earlier_one_of_the_same_seed(tmp_path):
    first, generator = experiment_recipes("tiny")
    decoder, _ = experiment_recipes("tiny")
    decoder.init_from, decoder.trained = "first", "decoder"
    longer, _ = experiment_recipes("tiny")
    longer.init_from = "first"
    experiment = make_experiment("?", {"first": first, "decoder": decoder, "longer": longer}, generator)
    source = tmp_path / "first" / "seed-3"
    for arm, with_its_codes in (("first", "first"), ("decoder", "first"), ("longer", "longer")):
        recipe, made = experiments._recipe(experiment, arm, 3, tmp_path / arm / "seed-3")
        assert recipe.seed == 3 and made == tmp_path / with_its_codes / "seed-3"
        assert recipe.init_from == ("" if arm == "first" else str(source / "tokenizer"))
    assert not experiments._is_made(source)
    (source / "cell.json").write_text("{}")
    assert experiments._is_made(source)
    with pytest.raises(InputError, match="arm decoder has init_from='first'; give the name of an earlier arm"):
        make_experiment("?", {"decoder": decoder, "first": first}, generator)


def test_a_run_of_a_moved_experiment_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "train", lambda recipe, workdir: None)
    recipe, generator = tiny().arms["first"], tiny().generator

    def started(root, arm="first"):
        return dataclasses.replace(recipe, init_from=f"{root}/{arm}/seed-0/tokenizer")

    def on_codes(root):
        codes = dataclasses.replace(generator.data, train=f"tokens:{root}/longer/seed-0/codes/train")
        return dataclasses.replace(generator, data=codes)

    for before, now, same in (
        (started("/old"), started(tmp_path), True),
        (started("/old", "other"), started(tmp_path), False),
        (on_codes("/old"), on_codes(tmp_path), True),
        (recipe, recipe, True),
        (recipe, dataclasses.replace(recipe, seed=1), False),
    ):
        workdir = tmp_path / "longer" / "seed-0" / "run"
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, to_dict(before))
        experiments._train(now, workdir)
        changed = differences(completed(read_config(workdir)), to_dict(now))
        assert (not changed) == same, changed


def test_an_arm_needs_a_generator_of_what_it_has(tmp_path):
    shipped = load_experiment("bottleneck:tiny")
    for generators in ({}, {"latents": shipped.generator}):
        with pytest.raises(InputError, match="arm latents has latents, and its generator samples codes"):
            dataclasses.replace(shipped, generators=generators)
    with pytest.raises(InputError, match="a generator is given for arm 'other', which does not exist"):
        dataclasses.replace(shipped, generators=shipped.generators | {"other": shipped.generator})
    with pytest.raises(InputError, match="arm latents trains a decoder only"):
        decoder = dataclasses.replace(shipped.arms["latents"], init_from="codes", trained="decoder")
        dataclasses.replace(shipped, arms=shipped.arms | {"latents": decoder})
    experiments._check_settings(shipped, tmp_path)
    changed = dataclasses.replace(shipped.generators["latents"], steps=13)
    with pytest.raises(InputError, match="holds an experiment with other settings"):
        experiments._check_settings(dataclasses.replace(shipped, generators={"latents": changed}), tmp_path)


def test_missing_weights_are_reported_before_any_arm_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LARP_LPIPS", str(tmp_path / "absent"))
    run = ["experiment", "semantic:tiny", "--workdir", str(tmp_path / "run")]
    assert cli.main(run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "arm alignment: loss.alignment=vgg16: no weights of lpips at" in error and "import --kind lpips" in error
    assert not list((tmp_path / "run").iterdir())
    for seed in range(3):  # what is complete needs no weights
        (tmp_path / "run" / "alignment" / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / "run" / "alignment" / f"seed-{seed}" / "cell.json").write_text("{}")
    experiments._check_networks(load_experiment("semantic:tiny"), tmp_path / "run")


def test_every_shipped_experiment_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["experiment", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in SHIPPED)


def test_arms_may_be_added_and_old_settings_are_those_of_now(tmp_path):
    two, path = tiny(), tmp_path / "experiment.json"
    one = dataclasses.replace(two, arms={"first": two.arms["first"]})
    experiments._check_settings(one, tmp_path)
    settings = json.loads(path.read_text())
    del settings["arms"]["first"]["corruption"]  # as in an earlier version
    del settings["generator"]["context_noise"]
    path.write_text(json.dumps(settings))
    experiments._check_settings(two, tmp_path)
    assert list(json.loads(path.read_text())["arms"]) == ["first", "same"]
    changed = dataclasses.replace(two.arms["first"], steps=13)
    for other in (one, dataclasses.replace(two, arms={"first": changed, "same": two.arms["same"]})):
        with pytest.raises(InputError, match="holds an experiment with other settings"):
            experiments._check_settings(other, tmp_path)


def cells(psnr, ordered=0.0, permuted=0.0):
    values = {"psnr": psnr, "cross_entropy": np.full(4, ordered), "cross_entropy_permuted": np.full(4, permuted)}
    return Cell({name: np.asarray(value, np.float64) for name, value in values.items()})


def test_differences_are_paired_by_seed_and_clip():
    noise = np.random.default_rng(0).normal(size=(2, 50))
    found = {("first", seed): cells(20 + 5 * noise[seed]) for seed in range(2)}
    found |= {("same", seed): cells(21 + 5 * noise[seed]) for seed in range(2)}
    summary = summarize(tiny(seeds=2), found)
    assert summary["same"]["psnr"]["difference"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert summary["same"]["psnr"]["high"] - summary["same"]["psnr"]["low"] > 1.0


def test_order_gap_is_the_loss_by_permuting():
    summary = summarize(tiny(), {("first", 0): cells(np.zeros(4), ordered=2.0, permuted=2.5)})
    assert summary["first"]["order_gap"]["mean"] == pytest.approx(0.5)
    assert "gain" not in summary["first"]  # the unigram was not measured


def test_bootstrap_covers_the_mean_of_new_seeds():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        seeds = rng.normal(size=8)  # the true mean is 0
        mean, low, high = bootstrap([seed + rng.normal(size=20) for seed in seeds])
        assert low < mean < high
        inside += low <= 0.0 <= high
    assert 48 <= inside <= 60


def test_table_names_arms_measures_and_what_is_missing():
    experiment = tiny(seeds=2)
    found = summarize(experiment, {("first", 0): cells([20.0, 22.0, 21.0, 21.0])})
    text = table({"question": "Q?", "complete": 1, "cells": 4, "arms": found, "classifier": {}})
    assert text.startswith("Q? 1 of 4 runs complete.")
    row = next(line for line in text.splitlines() if line.startswith("| PSNR (dB)"))
    assert "21.0 [" in row and row.endswith("| – |")
    assert all(measure.definition for measure in MEASURES.values())


def test_codes_are_copied_with_their_positions_permuted(tmp_path):
    from larp_jax.data.codes import new_manifest, read_manifest, read_shard, write_manifest, write_shard

    codes = np.arange(12, dtype=np.int32).reshape(4, 3)
    (tmp_path / "from").mkdir()
    write_shard(tmp_path / "from" / "codes-00000-of-00001.npz", {"codes": codes})
    rows = [{"source": f"{i}", "start": 0, "frames": 8, "fps": 0, "label": i} for i in range(4)]
    manifest = new_manifest(fingerprint="f", step=1, K=12, N=3, clip=(8, 32, 32, 3), sizes=[4], rows=rows)
    write_manifest(tmp_path / "from", manifest)
    experiments._copy_codes(tmp_path / "from", tmp_path / "to", slice(2, None), np.array([2, 0, 1]))
    copied = read_manifest(tmp_path / "to")
    np.testing.assert_array_equal(read_shard(tmp_path / "to", copied, 0)["codes"], codes[2:][:, [2, 0, 1]])
    assert [row["label"] for row in copied["rows"]] == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": 0}, "seeds must be positive"),
        ({"arms": {"a b": 0}}, "may contain only letters"),
        ({"arms": {"long": {"frames": 16}}}, "other clips or data"),
    ],
)
def test_wrong_experiments_are_refused(change, message):
    good = tiny()
    if "arms" in change:
        first = good.arms["first"]
        arms = {}
        for name, changes in change["arms"].items():
            model = dataclasses.replace(first.model, **changes) if changes else first.model
            arms |= {"first": first, name: dataclasses.replace(first, model=model)}
        change = {"arms": arms}
    with pytest.raises(InputError, match=message):
        Experiment(**{field.name: getattr(good, field.name) for field in dataclasses.fields(good)} | change)


def test_unknown_names_list_the_experiments(tmp_path, capsys):
    assert cli.main(["experiment", "nothing", "--workdir", str(tmp_path / "x")]) == 2
    assert "patchwise, prior, prior_size" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    assert cli.main(["experiment", "prior:tiny", "--workdir", str(tmp_path / "full")]) == 2
    assert "is not empty and holds no experiment" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
