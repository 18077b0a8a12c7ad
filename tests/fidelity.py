"""Deviations of our numbers from those of the authors' implementation, quantity by quantity.

As a script, it prints the table of docs/fidelity.md:

    python tests/fidelity.py [FOLDER]

FOLDER has the same contents as tests/reference, which is the default.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from network_weights import write_i3d, write_lpips

from larp_jax import metrics
from larp_jax.api import load_generator
from larp_jax.config import (
    DiscriminatorConfig,
    GeneratorOptimConfig,
    LossConfig,
    OptimConfig,
    QuantizerConfig,
    TokenizerRecipe,
)
from larp_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from larp_jax.models.condition import Condition
from larp_jax.models.discriminator import Discriminator
from larp_jax.models.generator import Generator
from larp_jax.models.next_code import next_code
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import Quantizer, mean_and_log_variance, reparameterize, similarities
from larp_jax.models.sampling import filter_logits
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.state import TrainState
from larp_jax.training import losses, optim
from larp_jax.training.tokenizer import TokenizerStage
from larp_jax.weights import networks, released, released_config
from larp_jax.weights.i3d import import_i3d
from larp_jax.weights.importing import PRIOR_SIZES, compare_shapes, import_huggingface, read_safetensors
from larp_jax.weights.lpips import import_lpips

REFERENCE = pathlib.Path(__file__).parent / "reference"
# Folders of tokenizers without a prior, each with another option.
PLAIN = ("base_100", "frame_patches", "ln_d", "ln_nd", "bn_bn", "vq_l2", "learned_temperature")


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The `largest` deviation of one quantity from the reference, and its `limit`.

    `measure` is `relative` (to the largest magnitude of the quantity), `absolute`, `count` (of elements that differ),
    or `share of its limit` (if every element has its own limit).
    """

    name: str
    largest: float
    limit: float
    measure: str = "relative"

    @property
    def within(self) -> bool:
        return self.largest <= self.limit


def relative(name, value, reference, limit=1e-4) -> Deviation:
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (name, value.shape, reference.shape)
    return Deviation(name, float(np.abs(value - reference).max() / np.abs(reference).max()), limit)


def build(make, params):
    """A module with the given parameters."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.tree.map(jnp.asarray, params))


def tokenizer_deviations(folder: pathlib.Path) -> list[Deviation]:
    _, config, params = import_huggingface(folder)
    io = {name: x if x.shape != () else x[()] for name, x in np.load(folder / "io.npz").items()}
    model, q = config.model, config.model.quantizer

    def modules(params):
        tokenizer = build(lambda: Tokenizer(model, rngs=nnx.Rngs(0)), params["tokenizer"])
        make_prior = lambda: Prior(config.prior, model.num_tokens, q.code_dim, rngs=nnx.Rngs(0))  # noqa: E731
        return tokenizer, build(make_prior, params["prior"])

    def cross_entropy(predicted, codebook):
        targets = io["indices"][:, 1:]
        return next_code(predicted, targets, codebook, temperature=config.prior.temperature).cross_entropy.mean()

    def forward(params, video):
        """The total loss, and every quantity of the reference by its name."""
        tokenizer, prior = modules(params)
        quantizer = tokenizer.quantizer
        projected = quantizer.project(tokenizer.encoder(video))
        quantized = quantizer(projected)
        codebook = quantizer.codebook
        round1 = prior(quantized.z_q[:, :-1])
        mixed = losses.replace_next(
            quantized.z_q[:, :-1], io["prior_mask"][..., 0], io["prior_sampled"], codebook
        )
        round2 = prior(mixed)
        reconstruction = tokenizer.decode_latents(quantized.z_q)
        ce = [cross_entropy(predicted, codebook) for predicted in (round1, round2)]
        total = losses.reconstruction_loss(video, reconstruction, "l1") + 0.1 * quantized.loss + 0.06 * ce[0]
        values = {
            "projected_z": projected,
            "unregularized_z": quantized.z,
            "probs": jax.nn.softmax(similarities(quantized.z, codebook) / q.temperature),
            "indices": quantized.indices,
            "regularized_z": quantized.z_q,
            "encoded": quantizer.expand(quantized.z_q),
            "loss_q": quantized.loss,
            "loss_commit": quantized.terms["commitment"],
            "loss_codebook": quantized.terms["codebook"],
            "reconstruction": reconstruction,
            "reconstruction_from_indices": tokenizer.decode(io["indices"]),
            "prior_round1_logits": similarities(round1, codebook) / config.prior.temperature,
            "prior_round2_logits": similarities(round2, codebook) / config.prior.temperature,
            "prior_ce_both_rounds": sum(ce) / 2,
            "total_loss": total,
        }
        return total, values

    video = jnp.asarray(io["video"].transpose(0, 2, 3, 4, 1))
    grads, values = jax.jit(jax.grad(forward, has_aux=True))(params, video)
    deviations = []
    for name, value in values.items():
        if name == "indices":
            deviations.append(_indices(value, io, values))
        else:
            reference = io[name].transpose(0, 2, 3, 4, 1) if name.startswith("reconstruction") else io[name]
            deviations.append(relative(name, value, reference))
    deviations.append(_gradient_norms(released.params_to_released(released.model_tensors(config), grads), io))
    return deviations


def plain_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Every quantity of the reference of a tokenizer without a prior."""
    tokenizer, params, io, video = _tokenizer(folder)

    def forward(params):
        module = build(tokenizer, params["tokenizer"])
        quantizer = module.quantizer
        projected = quantizer.project(module.encoder(video))
        quantized = quantizer(projected)
        reconstruction = module.decode_latents(quantized.z_q)
        total = losses.reconstruction_loss(video, reconstruction, "l1") + 0.1 * quantized.loss
        values = {
            "projected_z": projected,
            "unregularized_z": quantized.z,
            "indices": quantized.indices,
            "encoded": quantizer.expand(quantized.z_q),
            "loss_q": quantized.loss,
            "reconstruction": reconstruction,
            "reconstruction_from_indices": module.decode(io["indices"]),
            "total_loss": total,
        }
        return total, {name: value for name, value in values.items() if name in io}

    grads, values = jax.jit(jax.grad(forward, has_aux=True))(params)
    deviations = _compare(values, io)
    if "grad_names" in io:
        deviations.append(_gradient_norms(_released_names(folder, grads), io))
    return deviations


def rounds_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The two rounds of the prior with given samples, and gradients through both and through the second alone."""
    tokenizer, params, io, video = _tokenizer(folder)
    _, recipe, _ = import_huggingface(folder)
    config = dataclasses.replace(recipe.prior, dropout=0.0)

    def given(latents, sampled, codebook, *, key, ratio):
        return losses.replace_next(latents, io["prior_mask"], io["prior_sampled"], codebook)

    def forward(params):
        module = build(tokenizer, params["tokenizer"])
        make_prior = lambda: Prior(config, recipe.model.num_tokens, module.quantizer.config.code_dim, rngs=nnx.Rngs(0))  # noqa: E731
        prior = build(make_prior, params["prior"])
        reconstruction, quantized = module(video)
        z_q, indices, codebook = quantized.z_q, quantized.indices, module.quantizer.codebook
        mixed = given(z_q[:, :-1], None, codebook, key=None, ratio=None)
        rounds = [
            next_code(prior(x), indices[:, 1:], codebook, temperature=config.temperature).cross_entropy.mean()
            for x in (z_q[:, :-1], mixed)
        ]
        with mock.patch.object(losses, "mix_sampled", given):
            arguments = {"key": jax.random.key(0), "mix_ratio": 0.5}
            cross_entropy, _ = losses.prior_loss(prior, config, z_q, indices, codebook, **arguments)
        l1 = losses.reconstruction_loss(video, reconstruction, "l1")
        values = {
            "indices": indices,
            "regularized_z": z_q,
            "round2_input": mixed,
            "prior_ce_rounds": jnp.stack(rounds),
            "prior_ce": cross_entropy,
            "loss_q": quantized.loss,
            "l1": l1,
            "total_loss": l1 + 0.1 * quantized.loss + 0.06 * cross_entropy,
        }
        return (values["total_loss"], rounds[1]), values

    _, pullback, values = jax.vjp(forward, params, has_aux=True)
    deviations = _compare(values, io)
    for name, weights in (("grad_norms", (1.0, 0.0)), ("grad_norms_last_round_only", (0.0, 1.0))):
        (grads,) = jax.jit(pullback)(tuple(jnp.float32(weight) for weight in weights))
        reference = {"grad_names": io["grad_names"], "grad_norms": io[name]}
        found = _gradient_norms(_released_names(folder, grads), reference)
        deviations.append(dataclasses.replace(found, name=f"{name} ({len(io['grad_names'])})"))
    return deviations


def kl_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The Gaussian bottleneck, sampled with given noise."""
    tokenizer, params, io, video = _tokenizer(folder)

    def forward(params):
        module = build(tokenizer, params["tokenizer"])
        projected = module.quantizer.project(module.encoder(video))
        mean, log_variance = mean_and_log_variance(projected)
        quantized = module.quantizer(projected)
        with mock.patch.object(jax.random, "normal", lambda key, shape: io["noise"]):
            sampled = module.quantizer(projected, key=jax.random.key(0))
        reconstruction = module.decode_latents(sampled.z_q)
        values = {
            "projected_z": projected,
            "mean": mean,
            "logvar": log_variance,
            "regularized_z": reparameterize(mean, log_variance, io["noise"]),
            "bottleneck_rep": quantized.z_q,
            "loss_kl": sampled.terms["kl"],
            "reconstruction": reconstruction,
            "reconstruction_from_mean": module.decode_latents(quantized.z_q),
        }
        return losses.reconstruction_loss(video, reconstruction, "l1") + 1e-4 * sampled.terms["kl"], values

    grads, values = jax.jit(jax.grad(forward, has_aux=True))(params)
    return [*_compare(values, io), _gradient_norms(_released_names(folder, grads), io)]


def _tokenizer(folder):
    """(function that creates the tokenizer, all parameters, other arrays, video [B, T, H, W, C]) of a reference."""
    _, recipe, params = import_huggingface(folder)
    io = {name: x if x.shape != () else x[()] for name, x in np.load(folder / "io.npz").items()}
    video = jnp.asarray(io["video"].transpose(0, 2, 3, 4, 1))
    return lambda: Tokenizer(recipe.model, rngs=nnx.Rngs(0)), params, io, video


def _compare(values, io) -> list[Deviation]:
    """Deviation of each value from the reference of the same name; for codes, the number that differ."""
    deviations = []
    for name, value in values.items():
        if name == "indices":
            # top2_gap is in similarities or in squared distances, as the reference compares codes
            wrong = (np.asarray(value) != io[name]) & (io["top2_gap"] > 1e-5)
            deviations.append(Deviation(name, float(np.sum(wrong)), 0, "count"))
        else:
            reference = io[name].transpose(0, 2, 3, 4, 1) if name.startswith("reconstruction") else io[name]
            deviations.append(relative(name, value, reference))
    return deviations


def _released_names(folder, grads) -> dict:
    """Gradients under the names of the released tensors."""
    _, recipe, _ = import_huggingface(folder)
    return released.params_to_released(released.model_tensors(recipe), grads)


def entropy_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The entropy term of plain VQ at two temperatures, and its gradients."""
    io = np.load(folder / "io.npz")
    k, d = io["embedding"].shape
    deviations = []
    for i, temperature in enumerate(io["temperatures"]):
        config = QuantizerConfig(
            kind="vq", codebook_size=k, code_dim=d, entropy_weight=0.1, entropy_temperature=float(temperature)
        )
        make = lambda config=config: Quantizer(config, d, d, rngs=nnx.Rngs(0))  # noqa: E731
        fresh = nnx.to_pure_dict(nnx.state(make(), nnx.Param))

        def terms(z, embedding, make=make, fresh=fresh):
            quantized = build(make, fresh | {"embedding": embedding})(z)
            return quantized.terms["entropy"], quantized.loss, quantized.indices

        arrays = io["projected_z"], io["embedding"]
        entropy, loss, indices = terms(*arrays)
        deviations.append(relative(f"loss_entropy, temperature {temperature:g}", entropy, io["loss_entropy"][i]))
        deviations.append(relative(f"loss_q, temperature {temperature:g}", loss, io["loss_q"][i]))
        for j, name in enumerate(("", "loss_q_")):
            grads = jax.grad(lambda z, e, j=j: terms(z, e)[j], argnums=(0, 1))(*arrays)
            for array, value in zip(("z", "embedding"), grads, strict=True):
                key = f"grad_{name}{array}_{temperature:g}"
                deviations.append(relative(key, value, io[key]))
    deviations.append(Deviation("indices", float(np.sum(np.asarray(indices) != io["indices"])), 0, "count"))
    return deviations


def ns_smooth_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The losses with smoothed targets, from given random numbers."""
    io = np.load(folder / "io.npz")
    real, fake = (io[f"logits_{side}"][:, 0] for side in ("real", "fake"))
    noise = np.stack([io[f"randn_{side}"][:, 0] for side in ("real", "fake")])

    def loss(real, fake):
        with mock.patch.object(jax.random, "normal", lambda key, shape: noise):
            return losses.discriminator_loss("ns_smooth", real, fake, jax.random.key(0))

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(real, fake)
    values = {"d_loss": value, "grad_real": grads[0][:, None], "grad_fake": grads[1][:, None]}
    values["g_loss"] = losses.adversarial_loss("ns_smooth", fake)
    return [relative(name, value, io[name]) for name, value in values.items()]


def initialization_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Mean, standard deviation and largest magnitude of every new parameter; each has its own limit.

    Both sides are random. With n numbers, the standard error of the mean is std / sqrt(n), and that of the standard
    deviation is not larger; the limit is five times the standard error of the difference of both sides. The largest
    magnitude, which distinguishes distributions, may differ by half.
    """
    setup, io = json.loads((folder / "setup.json").read_text()), np.load(folder / "io.npz")
    recipe = released_config.config_from_released(setup["tokenizer"], {}, where="setup.json")
    sizes = setup["discriminator"]
    recipe = dataclasses.replace(
        recipe, discriminator=discriminator_config(sizes), loss=LossConfig(perceptual="none", adversarial_weight=0.3)
    )
    params = TokenizerStage(recipe).init(jax.random.key(0)).params
    config = released_config.config_from_released(setup["generator"], {}, where="setup.json")
    generator = nnx.to_pure_dict(nnx.state(Generator(config, rngs=nnx.Rngs(0)), nnx.Param))
    clip = recipe.model.clip_shape
    assert clip == (sizes["frames"], sizes["input_size"], sizes["input_size"], 3)
    fresh = {
        "tokenizer": released.params_to_released(released.model_tensors(recipe), params),
        "discriminator": released.params_to_released(
            released.discriminator_tensors(recipe.discriminator, clip), params["discriminator"]
        ),
        "generator": released.params_to_released(released.generator_tensors(config), generator),
    }
    deviations = []
    for part, tensors in fresh.items():
        names = [str(name) for name in io[f"{part}_names"]]
        assert set(names) == set(tensors), set(names) ^ set(tensors)
        shares = []
        for name, (mean, std, largest) in zip(names, io[f"{part}_mean_std_max"], strict=True):
            x = np.asarray(tensors[name], np.float64)
            away = np.abs([x.mean() - mean, x.std() - std, np.abs(x).max() - largest])
            noise = 5 * std * (2 / x.size) ** 0.5
            shares.append(away / (np.array([noise, noise, largest / 2]) + 1e-7))
        for measure, share in zip(("mean", "standard deviation", "largest"), np.max(shares, axis=0), strict=True):
            deviations.append(Deviation(f"{part}, {measure} ({len(names)})", float(share), 1.0, "share of its limit"))
    return deviations


def _indices(indices, io, values) -> Deviation:
    """Number of codes that differ although their two best similarities are more than 1e-5 apart."""
    probs = np.sort(io["probs"], axis=-1)
    # a difference of similarities is one of log-probabilities times the temperature, 0.03
    clear = 0.03 * np.log(probs[..., -1] / np.maximum(probs[..., -2], 1e-38)) > 1e-5
    return Deviation("indices", float(np.sum((np.asarray(indices) != io["indices"]) & clear)), 0, "count")


def _gradient_norms(grads, io) -> Deviation:
    """Gradient norm of every parameter, by released name; the limit is 1e-3 of the norm plus 1e-8."""
    names = [str(name) for name in io["grad_names"]]
    assert set(names) == set(grads), set(names) ^ set(grads)
    shares = [
        abs(float(np.linalg.norm(grads[name])) - norm) / (1e-3 * norm + 1e-8)
        for name, norm in zip(names, io["grad_norms"], strict=True)
        if not name.endswith("attn.key.bias")  # its true gradient is zero: a constant added to all scores
    ]
    return Deviation(f"gradient norms ({len(names)})", max(shares), 1.0, "share of its limit")


def import_discriminator(path: pathlib.Path, config: DiscriminatorConfig, clip: tuple[int, int, int, int]) -> dict:
    """Parameters from a file with the authors' names, which must contain exactly the expected tensors."""
    items, tensors = list(released.discriminator_tensors(config, clip)), read_safetensors(path)
    compare_shapes(released.expected_shapes(items), {name: x.shape for name, x in tensors.items()}, str(path))
    (table,) = (item for item in items if isinstance(item, released.Table))
    np.testing.assert_allclose(tensors[table.name], table.compute(), atol=1e-6)
    return released.params_from_released(items, tensors)


def discriminator_config(sizes) -> DiscriminatorConfig:
    return DiscriminatorConfig(
        width=sizes["hidden_size"],
        depth=sizes["n_layers"],
        heads=sizes["n_heads"],
        patch_frames=sizes["temporal_patch_size"],
        patch_size=sizes["patch_size"],
    )


def discriminator_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Logits, losses of tokenizer and discriminator, and both regularizers."""
    io = np.load(folder / "io.npz")
    config = discriminator_config(json.loads((folder / "config.json").read_text()))
    real, fake = (io[name].transpose(0, 2, 3, 4, 1) for name in ("real", "fake"))
    clip = real.shape[1:]
    params = import_discriminator(folder / "discriminator.safetensors", config, clip)
    discriminator = build(lambda: Discriminator(config, clip, rngs=nnx.Rngs(0)), params)
    logits_real, logits_fake = jax.jit(discriminator)(real), jax.jit(discriminator)(fake)
    values = {
        "logits_real": logits_real[:, None],
        "logits_fake": logits_fake[:, None],
        "lecam": losses.lecam_loss(logits_real, logits_fake, *io["lecam_ema"]),
        "r1": jax.jit(lambda video: losses.r1_penalty(discriminator, video))(real),
    }
    for kind in ("ns", "hinge"):
        values[f"{kind}_d"] = losses.discriminator_loss(kind, logits_real, logits_fake)
        values[f"{kind}_g"] = losses.adversarial_loss(kind, logits_fake)
    return [relative(name, value, io[name]) for name, value in values.items()]


# Our name of each logged quantity of the training trace, and the factor between the two.
TRACE = {
    "rec_loss": ("loss_reconstruction", 1.0),
    "g_loss": ("loss_adversarial", 1.0),
    "loss_q": ("loss_quantizer", 1.0),
    "loss_latent_ce": ("loss_prior", 1.0),
    "loss": ("loss", 1.0),
    "logits_real": ("logits_real", 1.0),
    "logits_fake": ("logits_fake", 1.0),
    "d_loss": ("loss_discriminator", 1.0),
    "d_lecam_loss": ("loss_lecam", 0.001),
}
TRACE_TIGHT = 15  # number of steps with tight limits; later, Adam has amplified a pixel near the kink of L1


def training_setup(folder: pathlib.Path) -> tuple[TokenizerStage, TrainState, np.ndarray]:
    """Stage of the training trace, its state before the first step, and its videos [steps, B, T, H, W, C]."""
    setup = json.loads((folder / "setup.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder / "tokenizer", scratch, dirs_exist_ok=True)
        pathlib.Path(scratch, PRIOR_SIZES).write_text(json.dumps({"prior": setup["prior"]}))
        _, imported, params = import_huggingface(scratch)
    weights = setup["weights"]
    recipe = dataclasses.replace(
        imported,
        steps=setup["steps"],
        prior=dataclasses.replace(imported.prior, dropout=setup["prior_dropout"], rounds=setup["prior_rounds"]),
        discriminator=discriminator_config(setup["discriminator"]),
        loss=LossConfig(
            quantizer_weight=weights["vq"],
            prior_weight=weights["prior"],
            perceptual="none",
            adversarial="ns",
            adversarial_weight=weights["generator"],
            discriminator_every=setup["d_update_freq"],
            lecam_weight=weights["lecam"],
        ),
        optim=OptimConfig(
            learning_rate=setup["learning_rate"],
            discriminator_learning_rate=setup["discriminator_learning_rate"],
            multipliers={"prior": setup["prior_lr_mult"]},
            floor=1.0,  # constant rates
        ),
    )
    assert recipe.model.quantizer.kind == "vq" and recipe.prior.mix_max == setup["scheduled_sampling_max_ratio"]
    stage = TokenizerStage(recipe)
    clip = recipe.model.clip_shape
    params["discriminator"] = import_discriminator(folder / "discriminator.safetensors", recipe.discriminator, clip)
    state = jax.jit(stage.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, state.params)
    videos = np.random.default_rng(60).random((setup["steps"], 2, 3, 8, 32, 32), dtype=np.float32)
    np.testing.assert_array_equal(videos.ravel()[:16], np.load(folder / "io.npz")["videos_head"])
    return stage, dataclasses.replace(state, params=jax.tree.map(jnp.asarray, params)), np.moveaxis(videos, 2, -1)


def training_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Every loss of a run of the real training step, its codes, the means of LeCam, and the trained weights."""
    io = np.load(folder / "io.npz")
    stage, state, videos = training_setup(folder)
    encode = jax.jit(lambda params, video: stage.module("tokenizer", params).quantize(video).indices.sum())
    step, logs, codes = jax.jit(stage.train_step), [], []
    for video in videos:
        codes.append(float(encode(state.params, video)))
        state, log = step(state, {"video": video}, jax.random.key(0), {})
        logs.append({name: float(value) for name, value in log.items()})
    assert step._cache_size() == 1  # the same program with and without a discriminator update

    deviations = [Deviation("indices_sum", float(np.sum(codes != io["log_indices_sum"])), 0, "count")]
    for name, (ours, factor) in TRACE.items():
        reference = io[f"log_{name}"]
        value = factor * np.array([log[ours] for log in logs])
        deviation = np.abs(value - reference) / np.where(reference == 0, 1.0, np.abs(reference))
        late = 1e-2 if name in ("g_loss", "loss_q") else 1e-3
        for part, limit in ((slice(TRACE_TIGHT), 1e-4), (slice(TRACE_TIGHT, None), late)):
            begin, end, _ = part.indices(len(videos))
            deviations.append(Deviation(f"{name}, steps {begin}-{end - 1}", float(np.nanmax(deviation[part])), limit))
    means = [logs[-1][f"lecam_{side}"] for side in ("real", "fake")]
    deviations.append(relative("lecam_ema", means, io["lecam_ema"], 1e-3))

    items = released.model_tensors(stage.recipe)
    final = released.params_to_released(items, state.params)
    deviations.append(_norms("final norms", final, io["final_names"], io["final_norms"]))
    items = list(released.discriminator_tensors(stage.recipe.discriminator, stage.recipe.model.clip_shape))
    final = released.params_to_released(items, state.params["discriminator"])
    deviations.append(_norms("final norms, discriminator", final, io["final_disc_names"], io["final_disc_norms"]))
    return deviations


def _norms(name, tensors, names, norms) -> Deviation:
    """Relative deviation of the norm of every trained tensor, without fixed tables and key biases of the prior."""
    reference = {str(n): float(norm) for n, norm in zip(names, norms, strict=True) if not n.endswith("attn.key.bias")}
    assert tensors.keys() - reference.keys() <= {n for n in tensors if n.endswith("attn.key.bias")}
    compared = tensors.keys() & reference.keys()
    largest = max(abs(float(np.linalg.norm(tensors[n])) / reference[n] - 1.0) for n in compared)
    return Deviation(f"{name} ({len(compared)})", largest, 1e-3)


def generator_deviations(folder: pathlib.Path) -> list[Deviation]:
    _, config, params = import_huggingface(folder)
    io = np.load(folder / "io.npz")
    generator = build(lambda: Generator(config, rngs=nnx.Rngs(0)), params["generator"])
    tokens, given = io["tokens"], io["cond"]
    if config.has_frames:
        given = given[:, :-1]  # our generator appends the separator itself
    condition = Condition.of_batch(config, {"label": given, "condition": given})
    forward = jax.jit(lambda condition: generator(condition, tokens[:, :-1]))
    logits = forward(condition)
    log_probs = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.mean(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1))
    deviations = [relative("logits", logits, io["logits"]), relative("ce", cross_entropy, io["ce"])]
    if "uncond_logits" in io:
        deviations.append(relative("uncond_logits", forward(condition.without_class()), io["uncond_logits"]))
    return deviations


def sampling_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Codes of greedy sampling that differ, and logits that filtering keeps on one side only."""
    generator, io = load_generator(folder), np.load(folder / "io.npz")
    condition = {"frames": io["cond"][:, :-1]} if generator.config.has_frames else {"classes": io["cond"]}
    deviations = []
    for name in io.files:
        if match := re.fullmatch(r"greedy_cfg([\d.]+)(?:_interval(\d+))?", name):
            options = {"cfg_scale": float(match[1]), "cfg_interval": int(match[2] or -1), "top_k": 1}
            value = generator.sample(**condition, key=jax.random.key(0), **options)
        elif match := re.fullmatch(r"filter_k(\d+)_p([\d.]+)", name):
            value = np.isfinite(filter_logits(io["filter_in"], int(match[1]) or None, float(match[2])))
        else:
            continue
        deviations.append(Deviation(name, float(np.sum(np.asarray(value) != io[name])), 0, "count"))
    return deviations


def lpips_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The distance, and the gradient of its sum."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = write_lpips(pathlib.Path(scratch), folder.parent)
        path = pathlib.Path(scratch, "lpips.safetensors")
        networks.save(path, "lpips", import_lpips(*sources), sources)
        lpips = networks.load_lpips(path)

    @jax.jit
    def both(lpips, x, y):
        distance, gradient = jax.vjp(lambda x: lpips.distance(x, y), x)
        return distance, gradient(jnp.ones_like(distance))[0]

    io = np.load(folder / "io.npz")
    first, second, reference = (
        io[name].transpose(0, 2, 3, 1) for name in ("first", "second", "gradient_wrt_first")
    )
    distance, gradient = both(lpips, first, second)
    return [relative("distance", distance, io["distance"]), relative("gradient", gradient, reference)]


def i3d_deviations(folder: pathlib.Path) -> list[Deviation]:
    with tempfile.TemporaryDirectory() as scratch:
        source = write_i3d(pathlib.Path(scratch), folder.parent)
        path = pathlib.Path(scratch, "i3d.safetensors")
        networks.save(path, "i3d", import_i3d(source), [source])
        i3d = networks.load_i3d(path)
    io = np.load(folder / "io.npz")
    video = np.random.default_rng(64).random((2, 3, 16, 64, 64), dtype=np.float32)
    np.testing.assert_array_equal(video.ravel()[:16], io["video_head"])
    logits = jax.jit(lambda i3d, video: i3d.logits(video))(i3d, video.transpose(0, 2, 3, 4, 1))
    return [relative("logits", logits, io["logits"])]


def frechet_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Distances of a to b, to c (fewer vectors than dimensions, so its covariance is singular) and to itself."""
    io = np.load(folder / "io.npz")
    sets = {name: FeatureStatistics.of(io[name]) for name in "abc"}

    def distance(name):
        _, (first, second), covariance = f"{name}_population".split("_")[:3]
        return frechet_distance(sets[first], sets[second], covariance=covariance)

    names = ("fd_ab_population", "fd_ab_sample", "fd_ac_population")
    deviations = [relative(name, distance(name), io[name]) for name in names]
    return [*deviations, Deviation("fd_aa", distance("fd_aa"), 1e-8, "absolute")]


def schedules_deviations(folder: pathlib.Path) -> list[Deviation]:
    """The schedules of our training step at every step of the released trainer, and the updates of AdamW."""
    setup, io = json.loads((folder / "setup.json").read_text()), np.load(folder / "io.npz")
    epoch, steps = setup["steps_per_epoch"], setup["steps_per_epoch"] * setup["epochs"]
    start, end, epochs = setup["temperature_start_end_epochs"]
    recipe = TokenizerRecipe(steps=steps)
    quantizer = dataclasses.replace(
        recipe.model.quantizer, temperature=end, temperature_start=start, temperature_ramp=epochs / setup["epochs"]
    )
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, quantizer=quantizer),
        prior=dataclasses.replace(
            recipe.prior, mix_max=setup["mix_ss_max_ratio"], mix_ramp=setup["mix_ss_peak_steps_ratio"]
        ),
        optim=dataclasses.replace(
            recipe.optim,
            learning_rate=setup["lr"],
            discriminator_learning_rate=setup["discriminator_lr"],
            warmup_steps=setup["warmup_epochs"] * epoch,
            floor=setup["min_lr_mult"],
        ),
    )
    stage = TokenizerStage(recipe)
    # with a constant gradient, each update of Adam is the learning rate
    rates = _updates(stage.optimizer, {"tokenizer": jnp.ones(()), "prior": jnp.ones(())}, steps)
    every_step = optim.make_discriminator_optimizer(recipe.optim, steps, start=0, every=1)
    turns = _updates(every_step, {"discriminator": jnp.ones(())}, steps)
    values = {
        "tokenizer_lr": rates["tokenizer"],
        "prior_lr": rates["prior"],
        "discriminator_lr": turns["discriminator"],
        "mix_ratio": [stage.mix_ratio(k) for k in io["global_step"]],
        "temperature": [stage.temperature(k) for k in io["global_step"]],
    }
    deviations = [relative(name, value, io[name]) for name, value in values.items()]

    config = GeneratorOptimConfig(weight_decay=setup["adamw"]["weight_decay"])
    assert (config.b1, config.b2) == tuple(setup["adamw"]["betas"])
    rate, decay = lambda i: jnp.asarray(io["adamw_lrs"])[i], optim.decay_kernels(config.weight_decay)
    adamw = optim._chain(config, rate, optim._scale(config), decay)
    params = {"kernel": jnp.asarray(io["adamw_start"])}
    state = adamw.init(params)
    for gradient in io["adamw_gradients"]:
        updates, state = adamw.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    return [*deviations, relative("adamw_end", params["kernel"], io["adamw_end"], 1e-5)]


def _updates(optimizer, gradients: dict, steps: int) -> dict[str, np.ndarray]:
    """Decrease of each parameter at each step, with constant gradients."""

    def step(state, _):
        updates, state = optimizer.update(gradients, state, gradients)
        return state, updates

    _, updates = jax.lax.scan(step, optimizer.init(gradients), length=steps)
    return {name: -np.asarray(x) for name, x in updates.items()}


def psnr_ssim_deviations(folder: pathlib.Path) -> list[Deviation]:
    io = np.load(folder / "io.npz")
    pair = [np.moveaxis(io[name], 1, -1) for name in ("video", "reconstruction")]
    return [relative(name, jax.jit(getattr(metrics, name))(*pair), io[name]) for name in ("psnr", "ssim")]


# Function that compares the quantities of each folder of the reference.
COMPARISONS = {
    "tokenizer": tokenizer_deviations,
    "tokenizer_rounds": rounds_deviations,
    **{f"tokenizer_{option}": plain_deviations for option in PLAIN},
    "tokenizer_kl": kl_deviations,
    "entropy": entropy_deviations,
    "discriminator": discriminator_deviations,
    "ns_smooth": ns_smooth_deviations,
    "training": training_deviations,
    "schedules": schedules_deviations,
    "initialisation": initialization_deviations,
    **{
        name: lambda folder: generator_deviations(folder) + sampling_deviations(folder)
        for name in ("ar_class", "ar_frame_prediction")
    },
    "lpips": lpips_deviations,
    "i3d": i3d_deviations,
    "frechet": frechet_deviations,
    "psnr_ssim": psnr_ssim_deviations,
}


def main():
    reference = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE
    print("| reference | quantity | largest deviation | limit | measure |\n|---|---|---|---|---|")
    for folder, deviations in COMPARISONS.items():
        for d in deviations(reference / folder):
            print(f"| {folder} | {d.name} | {d.largest:.1e} | {d.limit:g} | {d.measure} |")


if __name__ == "__main__":
    main()
