"""How far our numbers are from the authors' implementation's, quantity by quantity.

As a script it prints the table that docs/fidelity.md holds:

    python tests/fidelity.py [FOLDER WITH tokenizer/, ar_class/, ar_frame_prediction/, lpips/, i3d/]
"""

import dataclasses
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from network_weights import write_i3d, write_lpips

from larp_jax import losses, perceptual, released
from larp_jax.api import load_generator
from larp_jax.importing import import_huggingface
from larp_jax.models.generator import Generator
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import similarities
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.sampling import filter_logits

REFERENCE = pathlib.Path(__file__).parent / "reference"


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Of one quantity: `largest` deviation from the reference, and the `limit` for it.

    `measure` says in what: `relative` to the largest magnitude of the quantity, `count` of elements that differ, or
    `share of its limit` where every element has its own.
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
        return losses.next_code(predicted, targets, codebook, temperature=config.prior.temperature).cross_entropy.mean()

    def forward(params, video):
        """Everything the reference holds, by its name."""
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


def _indices(indices, io, values) -> Deviation:
    """Codes that differ although the best two similarities are further apart than 1e-5."""
    probs = np.sort(io["probs"], axis=-1)
    # a gap of similarities is one of log-probabilities times the temperature of 0.03
    clear = 0.03 * np.log(probs[..., -1] / np.maximum(probs[..., -2], 1e-38)) > 1e-5
    return Deviation("indices", float(np.sum((np.asarray(indices) != io["indices"]) & clear)), 0, "count")


def _gradient_norms(grads, io) -> Deviation:
    """Of every parameter under its released name, against 1e-3 of the norm plus 1e-8."""
    names = [str(name) for name in io["grad_names"]]
    assert set(names) == set(grads), set(names) ^ set(grads)
    shares = [
        abs(float(np.linalg.norm(grads[name])) - norm) / (1e-3 * norm + 1e-8)
        for name, norm in zip(names, io["grad_norms"], strict=True)
        if not name.endswith("attn.key.bias")  # its true gradient is zero: a constant added to all scores
    ]
    return Deviation(f"gradient norms ({len(names)})", max(shares), 1.0, "share of its limit")


def generator_deviations(folder: pathlib.Path) -> list[Deviation]:
    _, config, params = import_huggingface(folder)
    io = np.load(folder / "io.npz")
    generator = build(lambda: Generator(config, rngs=nnx.Rngs(0)), params["generator"])
    tokens = io["tokens"]
    forward = jax.jit(lambda condition: generator(condition, tokens[:, :-1]))
    logits = forward(io["cond"])
    log_probs = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.mean(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1))
    deviations = [relative("logits", logits, io["logits"]), relative("ce", cross_entropy, io["ce"])]
    if "uncond_logits" in io:
        deviations.append(relative("uncond_logits", forward(np.full_like(io["cond"], -1)), io["uncond_logits"]))
    return deviations


def sampling_deviations(folder: pathlib.Path) -> list[Deviation]:
    """Codes of greedy sampling, and logits that filtering keeps, that differ."""
    generator, io = load_generator(folder), np.load(folder / "io.npz")
    condition = {"condition": io["cond"][:, :-1]} if generator.config.frame_prediction else {"classes": io["cond"]}
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
    """Of the distance, and of the gradient of its sum."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = write_lpips(pathlib.Path(scratch), folder.parent)
        path = pathlib.Path(scratch, "lpips.safetensors")
        perceptual.save(path, "lpips", perceptual.import_lpips(*sources), sources)
        lpips = perceptual.load_lpips(path)

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
        perceptual.save(path, "i3d", perceptual.import_i3d(source), [source])
        i3d = perceptual.load_i3d(path)
    io = np.load(folder / "io.npz")
    video = np.random.default_rng(64).random((2, 3, 16, 64, 64), dtype=np.float32)
    np.testing.assert_array_equal(video.ravel()[:16], io["video_head"])
    logits = jax.jit(lambda i3d, video: i3d.logits(video))(i3d, video.transpose(0, 2, 3, 4, 1))
    return [relative("logits", logits, io["logits"])]


def all_deviations(reference: pathlib.Path) -> dict[str, list[Deviation]]:
    """Deviations by folder of the reference."""
    return {
        "tokenizer": tokenizer_deviations(reference / "tokenizer"),
        **{
            name: generator_deviations(reference / name) + sampling_deviations(reference / name)
            for name in ("ar_class", "ar_frame_prediction")
        },
        "lpips": lpips_deviations(reference / "lpips"),
        "i3d": i3d_deviations(reference / "i3d"),
    }


def main():
    reference = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE
    print("| reference | quantity | largest deviation | limit | measure |\n|---|---|---|---|---|")
    for folder, deviations in all_deviations(reference).items():
        for d in deviations:
            print(f"| {folder} | {d.name} | {d.largest:.1e} | {d.limit:g} | {d.measure} |")


if __name__ == "__main__":
    main()
