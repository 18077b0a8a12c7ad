"""ViTok's block: against other implementations, and in the tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.config import TOKENIZER_SIZES, QuantizerConfig, TokenizerConfig, TransformerConfig
from larp_jax.errors import InputError
from larp_jax.models.anchored_init import anchored_init
from larp_jax.models.layers import Block
from larp_jax.models.rotary import angles_3d, rotation
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.tools import flops

GRID = (2, 3, 4)
SMALL = TokenizerConfig(
    frames=8,
    resolution=16,
    patch_frames=4,
    patch_size=8,
    num_tokens=8,
    layout="patchwise",
    block="vitok",
    encoder=TransformerConfig(width=32, depth=1, heads=2),
    decoder=TransformerConfig(width=48, depth=2, heads=2),
    quantizer=QuantizerConfig(kind="kl", code_dim=4),
)


@pytest.fixture(scope="module")
def reference(reference_dir):
    return dict(np.load(reference_dir / "vitok" / "io.npz"))


@pytest.mark.parametrize("width", [16, 22, 24])
def test_angles(reference, width):
    angles = angles_3d(GRID, width)
    assert angles.shape == (24, width // 2)
    np.testing.assert_allclose(angles, reference[f"angles_{width}"], atol=1e-6)


def test_block(reference):
    block = Block(48, 3, rngs=nnx.Rngs(0), kind="vitok")
    kernels = {
        "qkv": block.attention.qkv,
        "out": block.attention.out,
        "mlp.gate_proj": block.mlp.gate,
        "mlp.up_proj": block.mlp.up,
        "mlp.down_proj": block.mlp.down,
    }
    for name, linear in kernels.items():
        assert linear.kernel.shape == reference[f"{name}.weight"].T.shape
        linear.kernel[...] = reference[f"{name}.weight"].T
    block.attention.out.bias[...] = reference["out.bias"]
    block.norm1.scale[...], block.norm2.scale[...] = reference["norm1.weight"], reference["norm2.weight"]

    def run(x):
        y = block(x, rotation=rotation(angles_3d(GRID, 16), after=3))
        return (y * reference["dy"]).sum(), y

    (_, y), dx = jax.jit(jax.value_and_grad(run, has_aux=True))(reference["x"])
    np.testing.assert_allclose(y, reference["y"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, reference["dx"], rtol=1e-4, atol=1e-4)
    unrotated = block(jnp.asarray(reference["x"]))
    assert np.abs(unrotated - reference["y"]).max() > 1e-2


def test_what_a_clip_costs():
    assert SMALL.encoded_as == "8 latents of 4 floats, 32 floats in all"
    assert TokenizerConfig().encoded_as == "1,024 codes of 13 bits, 13,312 bits in all"


def test_sizes():
    assert [TOKENIZER_SIZES[f"vitok_{size}"][:2] for size in "sbl"] == [(768, 6), (768, 12), (1152, 24)]
    millions = []
    for size in ("vitok_s", "vitok_b", "vitok_l"):
        config = TokenizerConfig(size=size, block="vitok", layout="patchwise", quantizer=QuantizerConfig(kind="kl"))
        encoder = nnx.eval_shape(lambda config=config: Tokenizer(config, rngs=nnx.Rngs(0))).encoder
        millions.append(sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param))) / 1e6)
    assert np.diff(millions)[0] == pytest.approx(6 * 12 * 768**2 / 1e6, rel=1e-3)  # as many as a plain block has
    assert millions[2] == pytest.approx(24 * 12 * 1152**2 / 1e6, rel=5e-3)


def test_the_place_of_a_patch_is_only_in_the_rotation():
    """Rows of patches that are exchanged exchange their latents only without attention; FLOPs are as the compiler's."""
    tokenizer = Tokenizer(SMALL, rngs=nnx.Rngs(0))
    assert not np.any(tokenizer.encoder.patch_positions())
    video = jax.random.uniform(jax.random.key(0), (1, *SMALL.clip_shape))
    swapped = jnp.roll(video, 8, axis=2)  # the two rows of patches
    graphdef, params = nnx.split(tokenizer)
    encode = jax.jit(lambda params, video: nnx.merge(graphdef, params).quantize(video).z.reshape(2, 2, 2, 4))
    counted = encode.lower(params, video).compile().cost_analysis()["flops"]
    assert flops.codec_as_compiled(SMALL)["encode"] == pytest.approx(counted, rel=0.1)
    latents, other = encode(params, video), encode(params, swapped)[:, ::-1]
    assert np.abs(latents - other).max() > 1e-4
    out = params["encoder"]["transformer"]["blocks"]["attention"]["out"]["kernel"]
    out[...] = jnp.zeros_like(out[...])
    np.testing.assert_allclose(encode(params, video), encode(params, swapped)[:, ::-1], atol=1e-5)


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match=r"heads of even width and at least 6; that of model.decoder is 4"):
        dataclasses.replace(SMALL, decoder=TransformerConfig(width=16, depth=1, heads=4))
    with pytest.raises(InputError, match="start.anchored needs tables of positions"):
        anchored_init(Tokenizer(SMALL, rngs=nnx.Rngs(0)))
