"""Import of released weights: only exact matches are accepted, and every error is one line that names the problem."""

import importlib.util
import json
import pathlib
import pickle
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from larp_jax import config as cfg
from larp_jax.config import GeneratorConfig, PriorConfig, TokenizerConfig, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.models.generator import Generator
from larp_jax.models.prior import Prior
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.weights import released, released_config
from larp_jax.weights.importing import import_huggingface

FOLDERS = ["tokenizer", "ar_class", "ar_frame_prediction"]
OPTIONS = [f"tokenizer_{name}" for name in ("rounds", "base_100", "frame_patches", "kl", "vq_l2", "ln_d", "ln_nd")]
FOLDED = ["tokenizer_bn_bn", "tokenizer_learned_temperature"]  # constants are folded in the import
WIDTH = dict(width=16, depth=2, heads=2)
MODEL = dict(frames=4, resolution=16, patch_frames=2, patch_size=4, num_tokens=6)
MODEL |= dict(encoder=cfg.TransformerConfig(**WIDTH), decoder=cfg.TransformerConfig(width=24, depth=1, heads=3))
MODEL |= dict(quantizer=cfg.QuantizerConfig(codebook_size=20, code_dim=4))
TABLES = ("encoder_patch", "encoder_latent_query", "decoder_latent", "decoder_patch_query")
LEARNED = ("encoder_patch_pe", "encoder_latent_query_embed", "decoder_latent_pe", "decoder_patch_query_embed")
EVERYTHING = {f"learned_{name}": True for name in LEARNED} | {f"use_{name}_token_type_embed": True for name in TABLES}
NOTHING = {name: False for name in EVERYTHING}


def shapes_of(make, name) -> dict:
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    leaves, _ = jax.tree_util.tree_flatten_with_path({name: params})
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def shapes_of_items(items) -> dict:
    """Shapes of the parameters that the table of tensors leads to."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in released.expected_shapes(items).items()}
    leaves, _ = jax.tree_util.tree_flatten_with_path(released.params_from_released(items, zeros))
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("options", [{}, EVERYTHING, NOTHING, dict(patch_frames=1, decoder_patch_frames=1)])
@pytest.mark.parametrize("bottleneck", [{}, dict(kind="kl", norm="ln_nd"), dict(norm="ln_d")])
def test_the_map_covers_every_parameter_of_the_tokenizer(options, bottleneck):
    quantizer = cfg.QuantizerConfig(codebook_size=20, code_dim=4, **bottleneck)
    config = TokenizerConfig(**MODEL | options | {"quantizer": quantizer})
    recipe = TokenizerRecipe(model=config, loss=cfg.LossConfig(prior_weight=0.0))
    expected = shapes_of(lambda: Tokenizer(config, rngs=nnx.Rngs(0)), "tokenizer")
    assert shapes_of_items(released.model_tensors(recipe)) == expected


def test_fixed_tables_are_those_of_the_models():
    config = TokenizerConfig(**MODEL | NOTHING | dict(latent_position_base=500.0))
    model = Tokenizer(config, rngs=nnx.Rngs(0))
    ours = {
        "encoder_patch_pe": model.encoder.patch_positions(),
        "encoder_latent_query_embed": model.encoder.queries(),
        "decoder_latent_pe": model.decoder.latent_positions(),
        "decoder_patch_query_embed": model.decoder.patch_queries(),
    }
    tables = {t.name: t for t in released.tokenizer_tensors(config) if isinstance(t, released.Table)}
    assert tables.keys() == ours.keys()
    for name, table in tables.items():
        np.testing.assert_array_equal(table.compute().reshape(ours[name].shape), ours[name])

    config = GeneratorConfig(**WIDTH | dict(codebook_size=10, num_tokens=5, fixed_positions=True))
    (table,) = (t for t in released.generator_tensors(config) if isinstance(t, released.Table))
    np.testing.assert_array_equal(table.compute()[0], Generator(config, rngs=nnx.Rngs(0)).position_table())


@pytest.mark.parametrize("options", [{}, {"positions": 40}])
def test_the_map_covers_every_parameter_of_the_prior(options):
    prior = PriorConfig(**WIDTH, **options)
    recipe = TokenizerRecipe(model=TokenizerConfig(**MODEL), prior=prior)
    items = [item for item in released.model_tensors(recipe) if getattr(item, "path", "").startswith("prior/")]
    assert shapes_of_items(items) == shapes_of(lambda: Prior(prior, 6, 4, rngs=nnx.Rngs(0)), "prior")


@pytest.mark.parametrize(
    "options",
    [{}, {"frame_prediction": True}, {"fixed_positions": True}, {"kv_heads": 1}, {"class_dropout": 0.0}]
    + [{"mlp_multiplier": 1.5, "mlp_multiple": 8}],
)
def test_the_map_covers_every_parameter_of_the_generator(options):
    config = GeneratorConfig(**WIDTH | dict(codebook_size=10, num_tokens=5) | options)
    expected = shapes_of(lambda: Generator(config, rngs=nnx.Rngs(0)), "generator")
    assert shapes_of_items(released.model_tensors(config)) == expected


def test_import_of_the_reference(reference_dir):
    kind, recipe, params = import_huggingface(reference_dir / "tokenizer")
    assert kind == "tokenizer" and set(params) == {"tokenizer", "prior"}
    assert recipe.model.quantizer.kind == "svq" and recipe.model.clip_shape == (8, 32, 32, 3)
    assert (recipe.prior.width, recipe.prior.depth, recipe.prior.heads) == (32, 2, 4)
    assert all(x.dtype == np.float32 and type(x) is np.ndarray for x in jax.tree.leaves(params))
    kind, config, params = import_huggingface(reference_dir / "ar_frame_prediction")
    assert kind == "generator" and set(params) == {"generator"}
    assert config.frame_prediction and config.condition_tokens == 13


@pytest.fixture
def copy(reference_dir, tmp_path):
    """A copy of a reference model that tests can damage: its folder, and methods to change config and tensors."""

    class Copy:
        path = tmp_path / "model"

        def take(self, name="tokenizer"):
            shutil.copytree(reference_dir / name, self.path)
            return self

        def config(self, path, value, remove=False):
            values = json.loads((self.path / "config.json").read_text())
            *parents, leaf = path.split(".")
            node = values
            for part in parents:
                node = node[part]
            if remove:
                del node[leaf]
            else:
                node[leaf] = value
            (self.path / "config.json").write_text(json.dumps(values))

        def tensors(self, change):
            tensors = load_file(self.path / "model.safetensors")
            change(tensors)
            save_file(tensors, self.path / "model.safetensors")

    return Copy()


def refusal(source, **options) -> str:
    """The error message, which is one line."""
    with pytest.raises(InputError) as info:
        import_huggingface(source, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("transformer_name", "transformer_encoder_fused"),
        ("encoder_name", "resnet"),
        ("decoder_name", 3),
        ("bottleneck.name", "other"),
        ("bottleneck.args.norm", "bn_b"),
        ("bottleneck.args.norm", "bn_bn"),
        ("bottleneck.args.norm", ""),
        ("bottleneck.args.norm", 1),
        ("bottleneck.args.bottleneck_dim", -1),
        ("bottleneck.args.regularizer.name", "lfq"),
        ("bottleneck.args.regularizer.name", None),
        ("bottleneck.args.regularizer.args.codebook_size", 1),
        ("bottleneck.args.regularizer.args.l2_normalized", False),
        ("bottleneck.args.regularizer.args.l2_normalized", 1),
        ("decoder_temporal_patch_size", 2),
        ("decoder_patch_size", 4),
        ("bottleneck.args.regularizer.args.stochastic", "yes"),
        ("bottleneck.args.regularizer.args.stochastic_temperature", -1.0),
        ("bottleneck.args.regularizer.args.invented", 1),
        ("prior_model.no_grad_before_last_round", True),
        ("prior_model.avg_loss_over_rounds", False),
        ("prior_model.args.l2_normalized", False),
        ("prior_model.args.attn_pdrop", 0.3),
        ("prior_model.args.max_seq_len", 4),
        ("prior_model.name", "other-S"),
        ("prior_model.n_rounds", 0),
        ("prior_model.latent_ce_temperature", 0),
        ("prior_model.mix_ss_peak_steps_ratio", -0.1),
        ("prior_model.mix_ss_max_ratio", 1.5),
        ("prior_model", "gptc-S"),
        ("invented", {"by": "someone"}),
        ("encoder_hidden_size", "48"),
        ("encoder_hidden_size", None),
        ("encoder_depth", {}),
        ("encoder_depth", {"of": 2}),
        ("encoder_num_heads", 5),
        ("frame_num", 7),
        ("latent_pe_scale_factor", 0),
        ("encoder_depth", 10**12),
        ("bottleneck_token_num", 10**400),
    ],
)
def test_unsupported_values_are_refused_by_name(copy, path, value):
    copy.take().config(path, value)
    message = refusal(copy.path)
    words = {"encoder_depth": "tensors"} if value == 10**12 else {}
    name = path.removeprefix("prior_model.")
    assert words.get(path, name) in message, message
    assert "config.json" in message
    # not the names of this package, which users of the file do not know
    assert not re.search(r"\b(model|quantizer|prior|encoder|decoder)\.\w+=", message), message


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [("n_head", 5, "n_head=5"), ("n_kv_head", 3, "n_kv_head=3"), ("dim", 6, "dim=6"), ("multiple_of", 0, "multiple_of")]
    + [("class_dropout_prob", 2, "class_dropout_prob"), ("norm_eps", 0, "norm_eps"), ("vocab_size", 1, "vocab_size")],
)
def test_refusals_of_a_generator_name_its_fields(copy, path, value, name):
    copy.take("ar_class").config(path, value)
    message = refusal(copy.path)
    assert name in message and "model." not in message.replace("model.safetensors", ""), message


def test_names_of_options_in_any_case(copy):
    copy.take().config("bottleneck.args.norm", "None")
    copy.config("encoder_name", "NULL")
    assert import_huggingface(copy.path)[1].model.quantizer.norm == "none"
    copy.config("bottleneck.args.norm", "LN_D_NA")  # the released forward pass ignores it
    assert import_huggingface(copy.path)[1].model.quantizer.norm == "none"


def test_settings_that_only_sampling_uses(copy):
    """The released code ignores the temperature of deterministic codes and an entropy weight below 0."""
    arguments = "bottleneck.args.regularizer.args"
    copy.take().config(f"{arguments}.stochastic", False)
    copy.config(f"{arguments}.stochastic_temperature", -1.0)
    copy.config(f"{arguments}.entropy_loss_weight", -0.5)
    quantizer = import_huggingface(copy.path)[1].model.quantizer
    assert (quantizer.kind, quantizer.temperature, quantizer.entropy_weight) == ("vq", 0.03, 0.0)


def test_a_gaussian_bottleneck_keeps_no_prior(copy):
    copy.take().config("bottleneck.args.regularizer.name", "skl")
    assert "prior_model" in refusal(copy.path)
    copy.config("prior_model", {"name": "none"})  # settings of codes are ignored
    copy.config("bottleneck.args.regularizer.args.stochastic_temperature", -1.0)
    message = refusal(copy.path)
    assert "bottleneck.in_linear.weight [8, 48] for [16, 48]" in message


def test_a_learned_temperature_becomes_a_setting(copy):
    name = "bottleneck.regularizer.stochastic_temperature_inv"
    copy.take("tokenizer_learned_temperature").tensors(lambda t: t.update({name: np.array(16, np.float32)}))
    assert import_huggingface(copy.path)[1].model.quantizer.temperature == 1 / 16
    for wrong in (0.0, -2.0, np.nan, [1.0, 1.0]):
        copy.tensors(lambda t, wrong=wrong: t.update({name: np.array(wrong, np.float32)}))
        assert "stochastic_temperature=-1.0" in refusal(copy.path)
    copy.config("bottleneck.args.regularizer.args.stochastic_temperature", 0.03)
    assert f"not expected {name}" in refusal(copy.path)


def test_batch_norm_needs_its_statistics(copy):
    def change(name, value):
        copy.tensors(lambda t: t.update({f"bottleneck.norm_layer.{name}": np.asarray(value, np.float32)}))

    copy.take("tokenizer_bn_bn")
    change("running_var", [1, 1, -1, 1])
    assert "running_var" in refusal(copy.path)
    change("running_var", [1, 1, np.nan, 1])
    assert "running_var" in refusal(copy.path)
    change("running_var", np.ones(4))
    change("weight", np.full(4, 3e38))
    assert "not finite in bottleneck.in_linear" in refusal(copy.path)
    change("running_var", np.ones(3))
    assert "running_var [3] for [4]" in refusal(copy.path)
    copy.tensors(lambda t: t.pop("bottleneck.in_linear.weight"))
    assert "bottleneck.in_linear.weight" in refusal(copy.path)
    copy.config("bottleneck.args.norm", "none")
    assert "not expected bottleneck.norm_layer.bias" in refusal(copy.path)


@pytest.mark.parametrize(
    ("path", "value"),
    [("model_type", "t2i"), ("cls_token_num", 2), ("n_kv_head", 3), ("vocab_size", 64.0), ("norm_eps", 0), ("x", 1)]
    + [("ffn_dim_multiplier", 1e308), ("class_dropout_prob", 2)],
)
def test_unsupported_values_of_a_generator_are_refused(copy, path, value):
    copy.take("ar_class").config(path, value)
    assert "config.json" in refusal(copy.path)


@pytest.mark.parametrize("path", ["bottleneck.name", "bottleneck.args.bottleneck_dim", "prior_model.n_rounds"])
def test_missing_fields_are_named(copy, path):
    copy.take().config(path, None, remove=True)
    assert path.split(".")[-1] in refusal(copy.path)


def test_missing_fields_have_the_defaults_of_the_released_code(copy):
    copy.take().config("in_channels", None, remove=True)
    copy.config("bottleneck.args.regularizer.args.stochastic", None, remove=True)
    _, recipe, _ = import_huggingface(copy.path)
    assert recipe.model.channels == 3 and recipe.model.quantizer.kind == "vq"


def test_training_options_of_the_prior(copy):
    copy.take().config("prior_model.no_dropout", True)
    copy.config("prior_model.use_mix_ss", False)
    _, recipe, _ = import_huggingface(copy.path)
    assert (recipe.prior.dropout, recipe.prior.mix_max, recipe.prior.mix_ramp) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("none", [{"name": "None"}, {"name": None, "n_rounds": 2}, {}, None])
def test_a_tokenizer_without_prior(copy, none):
    copy.take().config("prior_model", none)
    assert "not expected prior_model." in refusal(copy.path)
    copy.tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("prior_model")])
    _, recipe, params = import_huggingface(copy.path)
    assert set(params) == {"tokenizer"} and recipe.loss.prior_weight == 0


def test_missing_extra_and_misshaped_tensors_are_listed(copy):
    def spoil(tensors):
        tensors["surplus.weight"] = tensors.pop("decoder.blocks.1.norm1.weight")
        tensors["x_embedder.proj.bias"] = tensors["x_embedder.proj.bias"][:5]

    copy.take().tensors(spoil)
    message = refusal(copy.path)
    assert "missing decoder.blocks.1.norm1.weight" in message
    assert "not expected surplus.weight" in message
    assert "x_embedder.proj.bias [5] for [48]" in message


def test_long_lists_are_shortened(copy):
    copy.take().tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("encoder.blocks")])
    message = refusal(copy.path)
    assert "and 17 more" in message and len(message) < 600


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(copy, reference_dir, dtype):
    copy.take()
    header, data = {}, b""
    for name, x in load_file(copy.path / "model.safetensors").items():
        content = x.astype(dtype).tobytes()
        kind = "F16" if dtype is np.float16 else "BF16"
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    (copy.path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    params = import_huggingface(copy.path)[2]
    original = import_huggingface(reference_dir / "tokenizer")[2]
    for half, full in zip(jax.tree.leaves(params), jax.tree.leaves(original), strict=True):
        assert half.dtype == np.float32
        np.testing.assert_array_equal(half, full.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.bool_])
def test_other_dtypes_are_refused(copy, dtype):
    copy.take().tensors(lambda t: t.update({"x_embedder.proj.bias": t["x_embedder.proj.bias"].astype(dtype)}))
    assert "x_embedder.proj.bias" in refusal(copy.path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_values_are_refused(copy, value):
    def spoil(tensors):
        tensors["final_layer.linear.bias"][3] = value

    copy.take().tensors(spoil)
    assert "final_layer.linear.bias" in refusal(copy.path)


@pytest.mark.parametrize("name", ["encoder_patch_pe", "decoder_latent_pe", "decoder_patch_query_embed"])
def test_fixed_tables_must_be_ours(copy, name):
    def spoil(tensors):
        tensors[name][0, 3] += 0.01

    copy.take().tensors(spoil)
    assert name in refusal(copy.path)


def test_a_prior_made_for_more_tokens_keeps_its_positions(copy):
    """`gptc-*` has 1024 positions by default, for any number of tokens."""
    copy.take().config("prior_model.name", "gptc-XXS")
    (copy.path / "prior.json").unlink()
    prior = PriorConfig(size="XXS", positions=1024)
    rng = np.random.default_rng(0)

    def replace(tensors):
        for name in [name for name in tensors if name.startswith("prior_model")]:
            del tensors[name]
        shapes = released.expected_shapes(released.prior_tensors(prior, 12, 8))
        tensors.update({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})

    copy.tensors(replace)
    _, recipe, params = import_huggingface(copy.path)
    assert recipe.prior == prior
    assert params["prior"]["positions"].shape == (1024, 256)


def test_a_prior_of_unknown_size(copy):
    copy.take()
    (copy.path / "prior.json").unlink()
    assert "prior.json" in refusal(copy.path)
    shapes = {"prior_model.pos_emb": (1, 12, 384), "prior_model.blocks.0.x": (), "prior_model.blocks.1.x": ()}
    values = json.loads((copy.path / "config.json").read_text())
    recipe = released_config.config_from_released(values, shapes, where="config.json")
    assert (recipe.prior.width, recipe.prior.depth, recipe.prior.heads) == (384, 2, 6)
    for wrong in ("[]", '{"prior": 3}', '{"prior": {"n_layer": true}}', "{"):
        (copy.path / "prior.json").write_text(wrong)
        assert "prior.json" in refusal(copy.path)


def test_sources_that_are_not_models(tmp_path, copy, monkeypatch):
    assert "neither" in refusal(tmp_path / "nowhere")
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors is missing" in refusal(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert "neither a LARP tokenizer" in refusal(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "huggingface_hub" in refusal("someone/something")
    assert "no EMA" in refusal(copy.take().path, ema=True)


@pytest.mark.parametrize("text", ["[1]", "{", "", "\xff\xfe", '{"a": NaN}', "[" * 10**5, '{"encoder_depth": 1e999}'])
def test_broken_config(copy, text):
    copy.take()
    (copy.path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(copy.path)


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1])
def test_truncated_weights(copy, keep):
    weights = copy.take().path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors" in refusal(copy.path)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_weights(copy, tmp_path):
    (copy.take().path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    assert "model.safetensors" in refusal(copy.path)
    assert not (tmp_path / "burst").exists()


JSON_VALUES = st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=4)
JSON_VALUES |= st.builds(list) | st.builds(dict)


def leaves(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("name", [*FOLDERS, "tokenizer_bn_bn"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_config_imports_or_is_refused(reference_dir, tmp_path, name, data):
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(reference_dir / name, folder)
    values = json.loads((reference_dir / name / "config.json").read_text())
    for path in data.draw(st.lists(st.sampled_from(list(leaves(values))), min_size=1, max_size=2, unique=True)):
        node = values
        for part in path[:-1]:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            if data.draw(st.integers(0, 5)) == 0:
                node.pop(path[-1], None)
            else:
                node[path[-1]] = data.draw(JSON_VALUES)
    (folder / "config.json").write_text(json.dumps(values))
    try:
        import_huggingface(folder)
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_header_imports_or_is_refused(reference_dir, tmp_path, data):
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(reference_dir / "ar_frame_prediction", folder)
    content = bytearray((reference_dir / "ar_frame_prediction" / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.one_of(st.integers(0, 8), st.integers(8, header - 1)))
        content[where] = data.draw(st.one_of(st.sampled_from(list(b'0123456789[]{},":')), st.integers(0, 255)))
    content = content[: data.draw(st.sampled_from([len(content)] * 3 + [header, len(content) - 1]))]
    (folder / "model.safetensors").write_bytes(content)
    try:
        import_huggingface(folder)
    except InputError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------- checkpoints of the released trainer

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def test_a_checkpoint_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "last.pth").write_bytes(b"anything")
    assert "PyTorch" in refusal(tmp_path / "last.pth")


def checkpoint_of(folder, name, scale=1.0) -> dict:
    import torch

    values = json.loads((folder / "config.json").read_text())
    weights = {key: torch.from_numpy(x) for key, x in load_file(folder / "model.safetensors").items()}
    average = {key: x * scale if "norm1" in key else x for key, x in weights.items()}
    model = {"name": name, "args": values, "sd": weights, "ema_sd": {0.99: weights, 0.999: average}}
    return {"model": model, "epoch": 3, "rng_states_per_rank": {0: {"numpy_rng_state": np.random.get_state()}}}


@needs_torch
def test_a_checkpoint_of_the_trainer(reference_dir, tmp_path):
    import torch

    folder = reference_dir / "ar_class"
    checkpoint = checkpoint_of(folder, "llama-abs-S")
    torch.save(checkpoint, tmp_path / "last.pth")
    # the name of the model is the size of the generator, not the one in its arguments
    assert "wrong shape" in refusal(tmp_path / "last.pth")

    config = GeneratorConfig(size="S", codebook_size=8, num_tokens=4, num_classes=2)
    shapes = released.expected_shapes(released.model_tensors(config))
    weights = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    args = {"vocab_size": 8, "max_seq_len": 4, "num_classes": 2}
    torch.save({"model": {"name": "llama-abs-S", "args": args, "sd": weights}}, tmp_path / "last.pth")
    kind, imported, params = import_huggingface(tmp_path / "last.pth")
    assert kind == "generator" and imported == config
    assert params["generator"]["head"]["kernel"].dtype == np.float32


@needs_torch
def test_settings_that_are_easy_dictionaries(reference_dir, tmp_path, monkeypatch):
    """The released trainer stores settings as `easydict.EasyDict`, which the safe loader rejects by default."""
    import sys
    import types

    import torch

    module = types.ModuleType("easydict")
    exec("class EasyDict(dict):\n    pass", module.__dict__)
    module.EasyDict.__module__ = "easydict"
    checkpoint = checkpoint_of(reference_dir / "tokenizer", "larp_tokenizer", scale=2.0)
    checkpoint["model"]["args"]["prior_model"]["name"] = "none"
    for weights in (checkpoint["model"]["sd"], *checkpoint["model"]["ema_sd"].values()):
        for key in [key for key in weights if key.startswith("prior_model")]:
            weights.pop(key, None)
    args = checkpoint["model"]["args"]
    args["bottleneck"] = module.EasyDict(args["bottleneck"])
    args["bottleneck"].note = {"an": "attribute"}
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "easydict", module)
        torch.save(checkpoint, tmp_path / "last.pth")
    _, recipe, raw = import_huggingface(tmp_path / "last.pth")
    _, _, average = import_huggingface(tmp_path / "last.pth", ema=True)
    assert recipe.model.num_tokens == 12
    scales = [params["tokenizer"]["encoder"]["transformer"]["blocks"]["norm1"]["scale"] for params in (raw, average)]
    np.testing.assert_array_equal(2 * scales[0], scales[1])


@needs_torch
@pytest.mark.parametrize("protocol", [True, False])
def test_a_malicious_checkpoint(tmp_path, protocol):
    import torch

    bomb = {"model": {"name": "larp_tokenizer", "args": Bomb(tmp_path / "burst"), "sd": {}}}
    torch.save(bomb, tmp_path / "last.pth", _use_new_zipfile_serialization=protocol)
    assert "safely" in refusal(tmp_path / "last.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(bomb))
    assert "safely" in refusal(tmp_path / "plain.pth")
    assert not (tmp_path / "burst").exists()


@needs_torch
@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"PK\x03\x04 broken", [1, 2], {"state_dict": {}}, {"model": {"name": "larp_tokenizer"}}]
    + [{"model": {"name": "larp_tokenizer", "args": {}, "sd": {}}}]
    + [{"model": {"name": "llama-abs-Q", "args": {}, "sd": {}}}, {"model": {"name": "x", "args": {}, "sd": {"a": 1}}}],
)
def test_files_that_are_not_checkpoints(tmp_path, content):
    import torch

    if isinstance(content, bytes):
        (tmp_path / "last.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "last.pth")
    assert "last.pth" in refusal(tmp_path / "last.pth")
