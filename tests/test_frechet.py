"""Frechet distances and the statistics they are computed from."""

import dataclasses

import numpy as np
import pytest
from fidelity import frechet_deviations

from larp_jax.errors import InputError
from larp_jax.evaluation.frechet import FeatureStatistics, frechet_distance


def draw(count, dimension=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimension)) @ rng.standard_normal((dimension, dimension)) + seed


def of(*features):
    return [FeatureStatistics.of(x) for x in features]


def by_factors(x, y):
    """The distance directly from the features, without covariances and their roots."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z)) for z in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * overlap


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_distances_of_the_reference(reference_dir):
    deviations = frechet_deviations(reference_dir / "frechet")
    assert len(deviations) == 4
    assert not [d for d in deviations if not d.within]


def test_known_gaussians():
    a = FeatureStatistics(10, np.zeros(2), 10 * np.diag([4.0, 9.0]))
    b = FeatureStatistics(5, np.array([3.0, 4.0]), 5 * np.diag([1.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 1) ** 2, abs=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(50, 60), (4, 50), (4, 3), (2, 2), (1, 50), (1, 1)])
def test_singular_covariances_give_the_right_number(n, m):
    x, y = draw(n, 40, seed=1), draw(m, 40, seed=2)
    assert frechet_distance(*of(x, y)) == pytest.approx(by_factors(x, y), rel=1e-12)
    assert frechet_distance(*of(x, x)) <= 1e-8


def test_one_clip_has_no_sample_covariance():
    one, many = of(draw(1), draw(20))
    assert frechet_distance(one, many) > 0.0
    assert "at least 2" in refusal(frechet_distance, one, many, covariance="sample")


def test_no_clips_have_no_distance():
    assert "at least one" in refusal(frechet_distance, FeatureStatistics.empty(6), *of(draw(3)))


def test_features_that_are_not_finite():
    features = draw(8)
    features[2, 3], features[5, 0] = np.nan, np.inf
    assert "2 of 8 clips are NaN or infinite" in refusal(FeatureStatistics.of, features)
    mask = np.ones(8)
    mask[[2, 5]] = 0
    assert FeatureStatistics.of(features, mask).count == 6


def test_other_mistakes():
    a, b = of(draw(3, 6), draw(3, 5))
    assert "features of dimensions 6 and 5" in refusal(frechet_distance, a, b)
    assert "features of dimensions 6 and 5" in refusal(a.merge, b)
    assert "population or sample" in refusal(frechet_distance, a, a, covariance="unbiased")


def test_merging_is_accurate_far_from_zero():
    features = draw(101) + 1e6
    (whole,) = of(features)
    merged = FeatureStatistics.empty(6)
    for part in np.split(features, [1, 40, 41, 41, 90]):
        merged = merged.merge(FeatureStatistics.of(part))
    assert merged.count == 101
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.scatter, 101 * np.cov(features.T, bias=True), rtol=1e-6)
    np.testing.assert_allclose(merged.covariance("sample"), np.cov(features.T), rtol=1e-6)
    assert frechet_distance(merged, whole) < 1e-8


def test_save_and_load(tmp_path):
    (statistics,) = of(draw(9))
    path = tmp_path / "new" / "statistics.npz"
    statistics.save(path, {"network": "i3d"})
    again, metadata = FeatureStatistics.load(path)
    assert metadata == {"network": "i3d"}
    for field in dataclasses.fields(FeatureStatistics):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(statistics, field.name))
    assert [p.name for p in path.parent.iterdir()] == ["statistics.npz"]
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-200] + bytes(200)):
        path.write_bytes(damaged)
        assert "delete it" in refusal(FeatureStatistics.load, path)
    assert "delete it" in refusal(FeatureStatistics.load, tmp_path / "absent.npz")
