"""Sampling: agrees with the released code, does not depend on batch and mesh, and is one compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import build, sampling_deviations
from flax import nnx

from larp_jax.api import LoadedGenerator, load_generator
from larp_jax.config import GeneratorConfig, MeshConfig
from larp_jax.errors import InputError
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator
from larp_jax.models.int8 import quantize_kernels, quantize_layers
from larp_jax.models.layers import Linear, block_kernels
from larp_jax.models.pixels import hold_last_frame
from larp_jax.models.sampling import SamplingOptions, cache_parts, filter_logits
from larp_jax.runtime.sharding import make_mesh
from larp_jax.weights.importing import import_huggingface

KEY = jax.random.key(5)
GUIDED = dict(cfg_scale=3.0, temperature=1.5)


@pytest.fixture(scope="module", params=["ar_class", "ar_frame_prediction"])
def folder(request, reference_dir):
    return reference_dir / request.param


@pytest.fixture(scope="module")
def generator(reference_dir):
    """Class-conditional, with 5 classes and 12 tokens from 64 codes."""
    return load_generator(reference_dir / "ar_class")


@pytest.fixture(scope="module")
def eight(generator):
    """Samples 0 to 7."""
    return generator.sample(CLASSES, key=KEY, **GUIDED)


CLASSES = np.array([0, 1, 2, 3, 4, 0, -1, 2])


def test_every_sequence_of_the_reference(folder):
    deviations = sampling_deviations(folder)
    assert len(deviations) == (8 if folder.name == "ar_class" else 1)
    assert not [d for d in deviations if not d.within]


def test_cached_sampling_agrees_with_uncached_decoding(folder):
    """Runs the whole network again for each code; also with grouped heads and fixed positions."""
    _, config, params = import_huggingface(folder)
    io = np.load(folder / "io.npz")
    network = build(lambda: Generator(config, rngs=nnx.Rngs(0)), params["generator"])
    given = io["cond"][:, :-1] if config.has_frames else io["cond"]  # without the separator
    condition = Condition.of_batch(config, {"label": given, "condition": given})
    forward = jax.jit(lambda tokens: network(condition, tokens))
    tokens = np.zeros((3, config.num_tokens - 1), np.int32)
    codes = []
    for i in range(config.num_tokens):
        codes.append(np.argmax(forward(tokens)[:, i], axis=-1))
        tokens[:, i : i + 1] = codes[-1][:, None]
    cached = load_generator(folder).sample(condition.classes, frames=condition.frames, key=KEY, top_k=1)
    np.testing.assert_array_equal(cached, np.stack(codes, axis=1))


def make(seed=0, **options) -> LoadedGenerator:
    """A small generator with weights large enough for codes to differ."""
    sizes = dict(width=32, depth=2, heads=4, codebook_size=16, num_tokens=6, num_classes=3, mlp_multiple=16)
    config = GeneratorConfig(**sizes | {"init_std": 0.5} | options)
    rngs = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: params_of(config))
    params = jax.tree.map(lambda x: rngs.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)
    return LoadedGenerator(config, params)


def params_of(config):
    return nnx.to_pure_dict(nnx.state(Generator(config, rngs=nnx.Rngs(0)), nnx.Param))


@pytest.mark.parametrize("options", [{"kv_heads": 2, "width": 64}, {"fixed_positions": True}], ids=str)
def test_options_of_the_network(monkeypatch, options):
    """Each code is the most likely one given the codes before it, by the network without cache; also of one sample."""
    monkeypatch.setattr("larp_jax.models.layers.LARGE_KERNEL", 1)
    generator = make(**options)
    codes = np.asarray(generator.sample([0, 1, 2], key=KEY, top_k=1))
    network = build(lambda: Generator(generator.config, rngs=nnx.Rngs(0)), generator._params)
    logits = network(Condition(np.arange(3)), codes[:, :-1])
    np.testing.assert_array_equal(codes, np.argmax(logits, axis=-1))
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(generator.sample([1], key=KEY, top_k=1), codes[1:2])


def test_kernels_in_blocks():
    """Products of few rows, and of more than the blocks are for."""
    layer, x = Linear(256, 512, rngs=nnx.Rngs(0)), np.random.default_rng(0).normal(size=(3, 3, 256)).astype(np.float32)
    exact = layer(x)
    block_kernels(5, layer)
    assert layer.kernel.shape == (256, 512)
    block_kernels(4, layer)
    assert layer.kernel.shape == (8, 256, 64)
    for rows in (1, 3):
        np.testing.assert_allclose(layer(x[:rows]), exact[:rows], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer(x[:rows, 0]), exact[:rows, 0], rtol=1e-4, atol=1e-6)
    for shape in ((256, 544), (256, 256)):  # no whole blocks, and too small
        other = Linear(*shape, rngs=nnx.Rngs(0))
        block_kernels(4, other)
        assert other.kernel.shape == shape


def test_a_sample_does_not_depend_on_its_batch(generator, eight):
    for rows in ([3], [6, 1]):
        codes = generator.sample(CLASSES[rows], indices=rows, key=KEY, **GUIDED)
        np.testing.assert_array_equal(codes, eight[np.array(rows)])
    again = generator.sample(CLASSES, indices=np.arange(8, 16), key=KEY, **GUIDED)
    assert np.mean(np.asarray(again) != eight) > 0.5
    other = generator.sample(CLASSES, key=jax.random.key(6), **GUIDED)
    assert np.mean(np.asarray(other) != eight) > 0.5


def test_keys_of_another_implementation(generator):
    """JAX_DEFAULT_PRNG_IMPL=rbg must not make samples depend on their batch."""
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        key = jax.random.key(5)
        codes = generator.sample(CLASSES, key=key, **GUIDED)
        some = generator.sample(CLASSES[[6, 1]], indices=[6, 1], key=key, **GUIDED)
        np.testing.assert_array_equal(generator.sample(CLASSES, key=jax.random.key(5, impl="threefry2x32"), **GUIDED),
                                      generator.sample(CLASSES, key=KEY, **GUIDED))  # fmt: skip
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(some, codes[np.array([6, 1])])
    np.testing.assert_array_equal(generator.sample(CLASSES, key=key, **GUIDED), codes)
    with pytest.raises(ValueError, match="key must be one random key, such as jax.random.key"):
        generator.sample(CLASSES, key=5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_sample_does_not_depend_on_the_mesh(reference_dir, eight, shape):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "model"), shape, strict=True))))
    generator = load_generator(reference_dir / "ar_class", mesh=mesh)
    codes = generator.sample(CLASSES, key=KEY, **GUIDED)
    np.testing.assert_array_equal(codes, eight)
    if shape == (8, 1, 1):
        text = generator.compile(8, cfg_scale=3.0, cfg_interval=4).as_text()
        found = re.findall(r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", loops(text))
        assert not found, "devices talk to each other at every code"
        for cache in ("f32[2,4,6,12]", "f32[1,4,12,12]"):  # of one sample: 6 guided codes, then the others
            assert cache in text
        with pytest.raises(InputError, match="does not split over data x fsdp = 8"):
            generator.sample([0, 1, 2], key=KEY)


def loops(text: str) -> str:
    """The computations in the text of a compiled program that its loops run, directly or indirectly."""
    bodies = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    todo, seen = re.findall(r"body=%?([\w.-]+)", text), set()
    while todo:
        name = todo.pop()
        if name in bodies and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.-]+)", bodies[name])
    assert seen
    return "\n".join(bodies[name] for name in seen)


def test_sampling_is_one_program_on_the_device(generator, eight):
    """Other values or classes do not compile again, and no loop transfers data to the host or copies a cache."""
    fresh = make()
    for scale, temperature, classes in ((1.5, 1.0, [0, 1]), (3.0, 0.5, [2, -1])):
        fresh.sample(classes, key=KEY, cfg_scale=scale, temperature=temperature)
    assert fresh._sample._cache_size() == 1
    for k, p in ((2, 0.9), (5, 0.5)):
        fresh.sample([0, 1], key=KEY, top_k=k, top_p=p)
    assert fresh._sample._cache_size() == 2

    for rows, options, cache in ((8, GUIDED, r"f32\[16,4,12,12\]"), (1, {}, r"f32\[(?:1,)?4,12,12\]")):
        text = loops(generator.compile(rows, **options).as_text())
        assert "dot(" in text or "fusion(" in text
        assert not re.findall(r"\b(infeed|outfeed|send|recv)(?:-start|-done)?\(|callback", text)
        assert re.search(cache, text)
        assert not re.findall(rf"= {cache}\S* copy\(", text)


WINDOWS = [
    ({}, 4, dict(cfg_scale=1.5, cfg_interval=3, temperature=0.8, top_k=9), 100, 10),
    ({"condition": "frames", "kv_heads": 2}, 3, dict(top_p=0.9), 4, 4),
    ({"condition": "class+frames"}, 100, dict(cfg_scale=2.0), 4, 4),
]


@pytest.mark.parametrize("options, window, drawn, rows, seeds", WINDOWS, ids=lambda x: str(x) if x else "")
def test_codes_of_windows_are_those_of_sampling_in_turn(monkeypatch, options, window, drawn, rows, seeds):
    monkeypatch.setattr("larp_jax.models.sampling.SHORTEST_PART", 5)
    generator = make(**{"num_tokens": 12} | options)
    given = {"indices": np.arange(rows)}
    if generator.config.has_classes:
        given["classes"] = np.arange(rows) % 3
    if generator.config.has_frames:
        given["frames"] = np.random.default_rng(0).integers(0, 16, (rows, 12))
    passes = []
    for seed in range(seeds):
        codes, _, turns = generator.sample_counted(**given, key=jax.random.key(seed), **drawn)
        found, _, used = generator.sample_counted(**given, key=jax.random.key(seed), window=window, **drawn)
        np.testing.assert_array_equal(found, codes)
        assert turns == 11
        passes.append(int(used))
    assert max(passes) <= 11


def test_windows_need_few_passes_where_codes_do_not_depend_on_each_other():
    generator = make(num_tokens=12)
    params = jax.tree.map(np.zeros_like, generator._params)  # all codes are equally likely
    generator = LoadedGenerator(generator.config, params)
    codes, _, passes = generator.sample_counted([0, 1, 2], key=KEY, window=11)
    assert passes == 2  # one draws the drafts, one finds them exact
    np.testing.assert_array_equal(codes, generator.sample([0, 1, 2], key=KEY))


def test_top_k_and_top_p_filter_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.06, 0.04]]))
    kept = lambda k, p: np.isfinite(filter_logits(logits, k, p))[0].tolist()  # noqa: E731
    assert kept(1, None) == [True, False, False, False, False]
    assert kept(2, None) == [True, True, True, False, False]  # the tie stays
    assert kept(None, 0.4) == [True, False, False, False, False]
    assert kept(None, 0.6) == [True, True, True, False, False]
    assert kept(None, 0.95) == [True, True, True, True, False]
    assert kept(3, 0.54) == [True, False, False, False, False]  # 0.5 / 0.9 after top-k
    assert kept(None, 1e-9) == [True, False, False, False, False]
    assert kept(9, 1.0) == [True] * 5


def test_samples_follow_the_distribution():
    """The first code of many samples, against the softmax of its logits."""
    generator = make(num_tokens=1)
    network = build(lambda: Generator(generator.config, rngs=nnx.Rngs(0)), generator._params)
    probs = np.asarray(jax.nn.softmax(network(Condition(np.array([1])), np.zeros((1, 0), int))[0, 0] / 2.0))
    codes = np.asarray(generator.sample(np.ones(4000, int), key=KEY, temperature=2.0))[:, 0]
    share = np.bincount(codes, minlength=16) / 4000
    assert np.all(np.abs(share - probs) < 5 * np.sqrt(probs * (1 - probs) / 4000) + 1e-3)
    best = np.argsort(-probs)[:3]
    codes = np.asarray(generator.sample(np.ones(400, int), key=KEY, temperature=2.0, top_k=3))[:, 0]
    assert set(codes) == set(best)


def test_cache_parts_cover_every_code_once():
    for num_tokens in (1, 2, 63, 64, 65, 256, 1024):
        for guided in (0, 2, 70, num_tokens):
            parts = cache_parts(num_tokens, min(guided, num_tokens))
            assert [i for part in parts for i in range(*part)] == list(range(1, num_tokens))
            assert all(start >= guided or stop <= guided for start, stop in parts)


def test_several_cache_parts_agree_with_one(monkeypatch, generator, eight):
    monkeypatch.setattr("larp_jax.models.sampling.SHORTEST_PART", 3)
    split = LoadedGenerator(generator.config, generator._params)
    np.testing.assert_array_equal(split.sample(CLASSES, key=KEY, **GUIDED), eight)


def test_bfloat16(reference_dir, eight):
    generator = load_generator(reference_dir / "ar_class", precision="bfloat16")
    codes = generator.sample(CLASSES, key=KEY, **GUIDED)
    assert codes.dtype == jnp.int32
    assert np.mean(np.asarray(codes)[:, 0] == np.asarray(eight)[:, 0]) >= 0.75
    assert "bf16[16,4,12,12]" in generator.compile(8, **GUIDED).as_text()


def test_int8():
    """Close to float32, from a quarter of the bytes; the first code by the logits of the rounded weights."""
    exact = make(width=64, num_tokens=12)
    rounded = LoadedGenerator(exact.config, exact._params, precision="int8")
    size, whole = (sum(x.nbytes for x in jax.tree.leaves(g._params["blocks"])) for g in (rounded, exact))
    assert size < 0.3 * whole
    classes = np.arange(6) % 3
    codes = rounded.sample(classes, key=KEY, top_k=1)
    logits, changed = (np.asarray(g.logits(codes, classes)) for g in (exact, rounded))
    assert 1e-4 < np.std(changed - logits) / np.std(logits) < 0.05
    np.testing.assert_array_equal(codes, changed.argmax(axis=-1))
    np.testing.assert_array_equal(rounded.sample(classes, key=KEY, top_k=1, window=4), codes)
    assert exact.fingerprint != rounded.fingerprint


@pytest.mark.parametrize("inputs", [8, 300, 521])
def test_a_layer_in_int8(inputs):
    """521 is prime: its rows are converted one by one."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 1, (inputs, 7)).astype(np.float32)
    kernel[:, 2] = 0.0
    layer = nnx.eval_shape(lambda: Linear(inputs, 7, rngs=nnx.Rngs(0)))
    quantize_layers(layer)
    params = quantize_kernels({"kernel": kernel, "bias": np.arange(7, dtype=np.float32)})
    assert params["kernel"].dtype == np.int8 and np.abs(params["kernel"]).max() == 127
    restored = params["kernel"] * params["scale"]
    assert np.all(np.abs(restored - kernel) <= params["scale"] / 2 + 1e-6)
    layer = nnx.merge(nnx.graphdef(layer), params)
    x = rng.normal(0, 1, (3, 2, inputs)).astype(np.float32)
    np.testing.assert_allclose(layer(x), x @ restored + params["bias"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(classes=[5]), r"classes must be \[B\] of integers in \[-1, 5\), got values from 5 to 5"),
        (dict(classes=[[1]]), r"got shape \[1, 1\]"),
        (dict(classes=[]), r"got shape \[0\]"),
        (dict(classes=[0.5]), "got float64"),
        (dict(classes=None), "has the condition 'class': give classes"),
        (dict(classes=[0], frames=np.zeros((1, 12), int)), "leave out frames"),
        (dict(classes=[0], indices=[1, 2]), r"one row of each argument; got \[1\] classes, \[2\] indices"),
        (dict(classes=[0], indices=[-1]), "got values from -1"),
        (dict(classes=[0], cfg_scale=0.5), "cfg_scale must be at least 1"),
        (dict(classes=[0], cfg_interval=-2), "cfg_interval must be -1"),
        (dict(classes=[0], temperature=0.0), "temperature must be above 0; for greedy sampling use top_k 1"),
        (dict(classes=[0], temperature=float("nan")), "temperature must be above 0"),
        (dict(classes=[0], top_k=-1), "top_k must be"),
        (dict(classes=[0], top_p=0.0), "top_p must be above 0"),
        (dict(classes=[0], top_p=1.1), "top_p must be"),
        (dict(classes=[0], window=0), "window must be at least 1"),
    ],
)
def test_arguments_that_are_wrong(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator.sample(**arguments, key=KEY)


def test_arguments_that_do_not_match_the_generator(reference_dir):
    predictor = load_generator(reference_dir / "ar_frame_prediction")
    codes = np.zeros((2, 12), np.int32)
    for arguments, message in (
        (dict(classes=[0]), "has the condition 'frames': leave out classes"),
        (dict(frames=codes[:, :-1]), r"frames must be \[B, 12\] of integers in \[0, 64\), got shape \[2, 11\]"),
        (dict(frames=codes + 64), "got values from 64 to 64"),
        (dict(frames=codes, cfg_scale=2.0), "cfg_scale must be 1 for .* without a null class; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.sample(**arguments, key=KEY)
    without_null = make(class_dropout=0.0)
    with pytest.raises(ValueError, match="without a null class; got 2"):
        without_null.sample([0], key=KEY, cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"in \[0, 3\)"):
        without_null.sample([-1], key=KEY)
    with pytest.raises(InputError, match="precision='float16' is not known"):
        load_generator(reference_dir / "ar_class", precision="float16")
    with pytest.raises(InputError, match="holds a tokenizer; give a generator"):
        load_generator(reference_dir / "tokenizer")


def test_sampling_with_both_conditions_and_with_none():
    frames = np.random.default_rng(0).integers(0, 16, (2, 6))
    both = make(condition="class+frames")
    codes = both.sample([0, 1], frames=frames, key=KEY, cfg_scale=1.5, top_k=1)
    network = build(lambda: Generator(both.config, rngs=nnx.Rngs(0)), both._params)
    condition = Condition(np.array([0, 1]), frames)
    given, null = (network(x, codes[:, :-1]) for x in (condition, condition.without_class()))
    np.testing.assert_array_equal(codes, np.argmax(null + 1.5 * (given - null), axis=-1))
    with pytest.raises(ValueError, match=r"got \[1\] classes, \[2\] frames"):
        both.sample([0], frames=frames, key=KEY)
    with pytest.raises(ValueError, match="give frames"):
        both.sample([0], key=KEY)
    with pytest.raises(ValueError, match="frames_scale must be 1 .* without frames_dropout; got 2"):
        both.sample([0], frames=frames[:1], key=KEY, frames_scale=2.0)
    none = make(condition="none")
    codes = np.asarray(none.sample(key=KEY, indices=[4, 7, 4]))
    np.testing.assert_array_equal(codes[0], codes[2])
    assert np.any(codes[0] != codes[1])
    assert none.compile(2).as_text()
    with pytest.raises(ValueError, match="got none; give indices"):
        none.sample(key=KEY)


def test_guidance_by_class_and_frames_and_either_left_out():
    frames = np.random.default_rng(0).integers(0, 16, (2, 6))
    generator = make(condition="class+frames", frames_dropout=0.1)
    network = build(lambda: Generator(generator.config, rngs=nnx.Rngs(0)), generator._params)
    codes = generator.sample([0, 1], frames=frames, key=KEY, cfg_scale=3.0, frames_scale=2.0, top_k=1)
    both = Condition(np.array([0, 1]), frames)
    given, still = both, both.without_class()
    logits = [network(x, codes[:, :-1]) for x in (given, still, still.without_frames())]
    expected = logits[2] + 2.0 * (logits[1] - logits[2]) + 3.0 * (logits[0] - logits[1])
    np.testing.assert_array_equal(codes, np.argmax(expected, axis=-1))
    for given, condition in (
        (dict(classes=[0, 1]), both.without_frames()),
        (dict(frames=frames), both.without_class()),
    ):
        codes = generator.sample(**given, key=KEY, top_k=1)
        np.testing.assert_array_equal(codes, np.argmax(network(condition, codes[:, :-1]), axis=-1))
    with pytest.raises(ValueError, match="'class\\+frames': give classes"):
        generator.sample(key=KEY)


def test_hold_last_frame():
    video = np.arange(8).reshape(1, 8, 1)
    assert hold_last_frame(video, 3).ravel().tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    for frames in (0, 8):
        with pytest.raises(ValueError, match="fewer than the clip's 8"):
            hold_last_frame(video, frames)


def test_plans():
    assert SamplingOptions(cfg_scale=1.25, cfg_interval=4).plan(12).guided == 6
    assert SamplingOptions(cfg_scale=1.25, cfg_interval=40).plan(12).guided == 12
    assert SamplingOptions(cfg_interval=4).plan(12).guided == 0
    assert not SamplingOptions(top_k=1, top_p=0.5).plan(12).top_p
    assert SamplingOptions(window=40).plan(12).window == 11  # all codes after the first
