import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import psnr_ssim_deviations

from larp_jax import metrics
from larp_jax.errors import InputError


@pytest.fixture(scope="module")
def pair(reference_dir):
    """The reference's arrays, channels last: video, reconstruction, psnr [B], ssim [B]."""
    io = np.load(reference_dir / "psnr_ssim" / "io.npz")
    video, reconstruction = (np.moveaxis(io[name], 1, -1) for name in ("video", "reconstruction"))
    return video, reconstruction, io["psnr"], io["ssim"]


def test_psnr_and_ssim_agree_with_the_reference(pair):
    video, reconstruction, psnr, ssim = pair
    np.testing.assert_allclose(jax.jit(metrics.psnr)(video, reconstruction), psnr, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(metrics.ssim)(video, reconstruction), ssim, atol=1e-5)


def test_the_lines_of_the_fidelity_table(reference_dir):
    deviations = psnr_ssim_deviations(reference_dir / "psnr_ssim")
    assert len(deviations) == 2
    assert not [d for d in deviations if not d.within]


def test_ssim_is_the_definition_written_out():
    rng = np.random.default_rng(0)
    x = rng.random((1, 1, 13, 16, 3))
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for row in range(3):
        for column in range(6):
            for channel in range(3):
                a = x[0, 0, row : row + 11, column : column + 11, channel]
                b = y[0, 0, row : row + 11, column : column + 11, channel]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 1e-4)
                    * (2 * covariance + 9e-4)
                    / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
                )
    np.testing.assert_allclose(metrics.ssim(x, y)[0], np.mean(values), atol=1e-5)


def test_identical_clips_are_finite():
    video = np.full((2, 1, 11, 11, 3), 0.5, np.float32)
    np.testing.assert_allclose(metrics.psnr(video, video), 100.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.ssim(video, video), 1.0, rtol=1e-6)


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="11x11.*10x32"):
        metrics.ssim(np.zeros((1, 1, 10, 32, 3)), np.zeros((1, 1, 10, 32, 3)))
    with pytest.raises(InputError, match="of the same shape"):
        metrics.psnr(np.zeros((1, 2, 8, 8, 3)), np.zeros((1, 1, 8, 8, 3)))  # would broadcast


def test_ssim_keeps_the_batch_sharded(pair):
    video, reconstruction, _, ssim = pair
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    jitted = jax.jit(metrics.ssim, in_shardings=sharding, out_shardings=sharding)
    compiled = jitted.lower(video, reconstruction).compile()
    assert "all-gather" not in compiled.as_text()
    placed = jax.device_put((video, reconstruction), sharding)
    np.testing.assert_allclose(compiled(*placed), ssim, atol=1e-5)


def test_mean_ignores_padding_and_merges_by_weight():
    first = metrics.Mean.of(jnp.array([1.0, 2.0, 3.0]))
    last = metrics.Mean.of(jnp.array([10.0, jnp.nan, jnp.nan]), jnp.array([1, 0, 0]))
    merged = metrics.Mean.empty().merge(first).merge(last)
    assert merged.compute() == 4.0  # a mean of means would be 6
    assert np.isnan(metrics.Mean.empty().compute())


def test_mean_does_not_lose_small_values_to_large_sums():
    merged = metrics.Mean(np.float64(2**24), np.float64(2**24)).merge(metrics.Mean.of(jnp.ones(1)))
    assert merged.count == merged.total == 2**24 + 1


def test_mean_passes_through_jit():
    out = jax.jit(lambda m, v: {"psnr": metrics.Mean.of(v, m)})(jnp.array([True, False]), jnp.array([3.0, 5.0]))
    assert out["psnr"].compute() == 3.0


def test_statistics_of_known_histograms():
    uniform, single, half = np.array([3, 3, 3, 3]), np.array([0, 7, 0, 0]), np.array([5, 5, 0, 0])
    for convert in (np.asarray, jnp.asarray):
        u, s, h = convert(uniform), convert(single), convert(half)
        np.testing.assert_allclose([metrics.codebook_usage(c) for c in (u, s, h)], [1, 0.25, 0.5])
        np.testing.assert_allclose([metrics.perplexity(c) for c in (u, s, h)], [4, 1, 2], rtol=1e-6)
        np.testing.assert_allclose(
            [metrics.kl_from_uniform(c) for c in (u, s, h)], [0, np.log(4), np.log(2)], atol=1e-6
        )
    assert metrics.entropy(np.zeros(4, np.int64)) == 0.0


@hypothesis.given(hnp.arrays(np.int32, (3, 6), elements=st.integers(0, 4)))  # one shape: compiled once
@hypothesis.settings(max_examples=25, deadline=None)
def test_counts_on_device_and_host_agree(indices):
    per_clip = np.asarray(metrics.code_counts(jnp.asarray(indices), 5))
    assert per_clip.shape == (3, 5)
    statistics = metrics.CodeStatistics.of(indices, 5)
    np.testing.assert_array_equal(per_clip.sum(0), statistics.counts.sum(0))
    np.testing.assert_array_equal(np.asarray(metrics.code_counts(jnp.asarray(indices.T), 5)), statistics.counts)


def test_code_statistics_merge_batches_and_leave_out_padding():
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 8, (6, 4))
    whole = metrics.CodeStatistics.of(indices, 8)
    padded = np.concatenate([indices[4:], np.zeros((2, 4), int)])
    parts = metrics.CodeStatistics.empty(4, 8).merge(metrics.CodeStatistics.of(indices[:4], 8))
    parts = parts.merge(metrics.CodeStatistics.of(padded, 8, np.array([1, 1, 0, 0])))
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.compute() == whole.compute()
    per_device = metrics.code_counts(jnp.asarray(padded), 8, jnp.array([1, 1, 0, 0])[:, None])
    assert per_device.sum() == 8


def test_position_entropy_sees_codes_bound_to_positions():
    indices = np.tile(np.arange(4), (10, 1))  # position i always has code i
    computed = metrics.CodeStatistics.of(indices, 4).compute()
    assert computed["perplexity"] == pytest.approx(4)
    assert computed["position_entropy"] == pytest.approx(0, abs=1e-12)
