import numpy as np
import pytest
from hypothesis import given, strategies as st

from larp_jax.data.clips import ClipSpec, center_crop, last_start, repeat_last, scaled_size, window_starts
from larp_jax.errors import InputError

SIDES = st.integers(1, 2000)
COUNTS = st.integers(1, 200)


@given(SIDES, SIDES, st.integers(1, 256), st.integers(1, 256))
def test_scaled_frames_cover_the_crop_and_keep_their_aspect(width, height, rows, columns):
    scaled = scaled_size(width, height, (rows, columns))
    assert scaled[0] >= columns and scaled[1] >= rows
    assert scaled[0] == columns or scaled[1] == rows
    assert abs(scaled[0] * height - scaled[1] * width) <= max(width, height)
    assert min(scaled_size(width, height, (rows, rows))) == rows  # the shorter side of a square


def test_crop_is_the_center():
    image = np.arange(5 * 9).reshape(5, 9)
    np.testing.assert_array_equal(center_crop(image, (5, 5)), image[:, 2:7])
    np.testing.assert_array_equal(center_crop(image.T, (5, 5)), image.T[2:7])


@given(COUNTS, COUNTS)
def test_windows_are_full_disjoint_and_as_many_as_fit(video_frames, clip_frames):
    starts = window_starts(video_frames, clip_frames)
    assert len(starts) == max(1, video_frames // clip_frames)
    assert list(starts) == [clip_frames * i for i in range(len(starts))]
    if video_frames >= clip_frames:
        assert starts[-1] + clip_frames <= video_frames
        assert last_start(video_frames, clip_frames) + clip_frames == video_frames


@given(st.integers(1, 20), st.integers(1, 20))
def test_short_clips_repeat_their_last_frame(frames, count):
    video = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    filled = repeat_last(video, count)
    assert len(filled) == max(frames, count)
    assert filled.dtype == np.uint8
    np.testing.assert_array_equal(filled.ravel(), np.minimum(np.arange(len(filled)), frames - 1))


@pytest.mark.parametrize("bad", [{"frames": 0}, {"resolution": -1}, {"resolution": (8, 0)}])
def test_clips_have_a_size(bad):
    with pytest.raises(InputError, match="must be positive"):
        ClipSpec(**bad)
