import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import moving_frames

from larp_jax.data import ClipSpec, open_source, video
from larp_jax.data.source import Source
from larp_jax.data.sources import FolderSource, MixtureSource, SampledSource
from larp_jax.data.tfds import PreparedSource, TfdsSource
from larp_jax.errors import InputError

CLIP = ClipSpec(8, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of two videos of 20 + i frames, and files that are not videos."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(["walk/b.mp4", "walk/deep/a.MP4", "run/c.mkv.mp4", "run/d.mov"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        video.write_video(path, moving_frames(20 + i, seed=i), 10)
    (folder / "walk" / "broken.mp4").write_bytes(b"no video")
    (folder / "walk" / "notes.txt").write_text("no video either")
    (folder / "walk" / "._b.mp4").write_bytes(b"what macOS leaves behind")
    return folder


def test_folders_give_names_labels_and_clips(folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder)
    assert [source.name(i) for i in range(len(source))] == [
        "run/c.mkv.mp4",
        "run/d.mov",
        "walk/b.mp4",
        "walk/deep/a.MP4",
    ]
    assert source.label_names == ("run", "walk")
    assert [source.frames(i) for i in range(4)] == [22, 23, 20, 21]
    assert source.fps(0) == 10.0
    (skipped,) = source.skipped
    assert skipped[0].endswith("broken.mp4") and "cannot be read" in skipped[1]
    (record,) = caplog.records
    assert "skipped 1 of 5 files" in record.getMessage() and "walk/broken.mp4" in record.getMessage()
    clip, label = source.read_clip(2, 3, CLIP)
    assert (clip.shape, clip.dtype, label) == (CLIP.shape, np.uint8, 1)
    np.testing.assert_array_equal(clip, video.VideoFile(folder / "walk" / "b.mp4").read(3, 8, (32, 32)))


def test_random_starts_cover_all_that_fit(folder):
    source, rng = FolderSource(folder), np.random.default_rng(0)
    whole = video.VideoFile(folder / "walk" / "b.mp4").read(0, 20, (32, 32))
    starts = set()
    for _ in range(100):
        clip, _ = source.read_clip(2, rng, CLIP)
        starts.add(next(i for i in range(13) if np.array_equal(whole[i : i + 8], clip)))
    assert starts == set(range(13))


def test_linked_folders_are_followed_once(folder, tmp_path):
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "run_again").mkdir()
    (tmp_path / "run_again" / "circle").symlink_to(tmp_path)
    assert [FolderSource(tmp_path).name(i) for i in range(2)] == ["run/c.mkv.mp4", "run/d.mov"]


@pytest.mark.parametrize("missing", ["label", "origin", "__len__"])
def test_a_source_without_a_method_cannot_be_created(folder, missing):
    for kind in (FolderSource, TfdsSource, PreparedSource, MixtureSource):
        assert issubclass(kind, Source) and missing in vars(kind)  # defined by the class itself
    incomplete = type("Incomplete", (FolderSource,), {missing: vars(Source)[missing]})
    with pytest.raises(TypeError, match=missing):
        incomplete(folder)


def test_folders_without_videos(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(f"folder:{tmp_path}/none")
    with pytest.raises(InputError, match="contains no video file"):
        open_source(f"folder:{tmp_path}")
    for name in ("a.mp4", "b.avi"):
        (tmp_path / name).write_bytes(b"no video")
    with pytest.raises(InputError, match=r"none of its 2 videos can be read; the first error: .*a\.mp4") as error:
        open_source(f"folder:{tmp_path}")
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_of_odd_files(videos_dir, caplog):
    source = FolderSource(videos_dir / "odd")
    assert len(source) + len(source.skipped) == 47  # the files with the extension of a video
    assert len(caplog.records) == 1
    rng = np.random.default_rng(0)
    for index in range(len(source)):
        clip, _ = source.read_clip(index, rng, ClipSpec(16, 16))
        assert clip.shape == (16, 16, 16, 3)


def test_importing_needs_no_decoder_and_no_jax():
    heavy = ("av", "grain", "tensorflow_datasets", "jax")
    code = f"import sys, larp_jax.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("module, spec", [("tensorflow_datasets", "moving_shapes"), ("av", "folder:.")])
def test_missing_packages_are_named(module, spec, monkeypatch, tmp_path):
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="pip install"):
        open_source(spec)


# A data set as TFDS writes it without TensorFlow. `images` has the layout of tfds.features.Video, which is a Sequence
# of encoded Image under another name. A data set that TFDS wrote with Video itself was read in the same way.
SETS = ("none", "bytes", "zlib", "images", "gray")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data folder with one config per way of storing videos; 6 videos in train, 2 in test."""
    import tensorflow_datasets as tfds

    class TinyVideos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SETS]

        def _info(self):
            name = self.builder_config.name
            if name == "images":
                clip = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="png"))
            elif name == "gray":
                clip = tfds.features.Tensor(shape=(None, 48, 64, 1), dtype=np.uint8, encoding="bytes")
            else:
                clip = tfds.features.Tensor(shape=(10, 48, 64, 3), dtype=np.uint8, encoding=name)
            label = {} if name == "gray" else {"label": tfds.features.ClassLabel(names=["x", "y", "z"])}
            features = tfds.features.FeaturesDict({"clip": clip, "id": tfds.features.Text(), **label})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            name = self.builder_config.name
            for i in range(count):
                frames = stored(name, i)
                if name == "images":
                    frames = [io.BytesIO(video.encode_png(frame)) for frame in frames]
                yield i, {"clip": frames, "id": str(i), **({} if name == "gray" else {"label": i % 3})}

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for name in SETS:
        TinyVideos(config=name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def stored(name, i):
    frames = moving_frames(10 + i if name == "images" else 10, seed=i)
    return frames[..., :1] if name == "gray" else frames


@pytest.mark.parametrize("name", SETS)
def test_tfds_videos(tfds_dir, name, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    source = open_source(f"tfds:tiny_videos/{name}:train[1:]")
    assert len(source) == 5
    assert source.label_names == (() if name == "gray" else ("x", "y", "z"))
    for index in range(5):
        frames = stored(name, index + 1)
        assert source.frames(index) == len(frames)
        clip, label = source.read_clip(index, 2, ClipSpec(6, 48))
        assert label == source.label(index) == (-1 if name == "gray" else (index + 1) % 3)
        np.testing.assert_array_equal(clip, np.broadcast_to(frames, (*frames.shape[:3], 3))[2:8, :, 8:56])
    assert source.read_clip(0, np.random.default_rng(0), CLIP)[0].shape == CLIP.shape
    longer, _ = source.read_clip(0, 0, ClipSpec(20, 48))
    np.testing.assert_array_equal(longer[len(stored(name, 1)) :], np.repeat(longer[-1:], 20 - len(stored(name, 1)), 0))
    with pytest.raises(InputError, match="ends after"):
        source.read_clip(0, 5, CLIP)


def test_the_video_feature_needs_no_tensorflow(tfds_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tfds_dir / "tiny_videos" / "images" / "1.0.0", folder)
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["clip"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["-1", "-1", "-1", "3"]}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    source = TfdsSource(folder, "test")
    np.testing.assert_array_equal(source.read_clip(1, 0, ClipSpec(6, 48))[0], stored("images", 1)[:6, :, 8:56])


def test_tfds_errors_say_how_to_fix_them(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with pytest.raises(InputError, match="run: tfds build ucf101 --file_format=array_record"):
        open_source("tfds:ucf101")
    with pytest.raises(InputError, match="has no split 'validation'; it has"):
        open_source("tfds:tiny_videos/none:validation")
    with pytest.raises(InputError, match="is empty"):
        open_source("tfds:tiny_videos/none:train[:0]")
    for change, says in (
        (("dataset_info.json", '"array_record"', '"tfrecord"'), "tfds convert_format"),
        (("features.json", '"uint8"', '"int32"'), "has no video: none of clip, id, label"),
    ):
        folder = tmp_path / change[0]
        shutil.copytree(tfds_dir / "tiny_videos" / "none" / "1.0.0", folder)
        text = (folder / change[0]).read_text()
        assert change[1] in text
        (folder / change[0]).write_text(text.replace(*change[1:]))
        with pytest.raises(InputError, match=says):
            open_source(f"tfds:{folder}")


def test_configs_must_be_named_where_there_are_several(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with pytest.raises(InputError, match="has configs bytes, gray, images, none, zlib; name one"):
        open_source("tfds:tiny_videos")
    shutil.copytree(tfds_dir / "tiny_videos" / "none", tmp_path / "tiny_videos" / "none")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(open_source("tfds:tiny_videos")) == 6


@pytest.mark.parametrize("sampling", [{"fps": 4.0}, {"stride": 2}], ids=str)
def test_sampled_data_sets(sampling):
    """Videos of a constant rate of 8: every second frame."""
    class Numbers(Source):
        def __len__(self):
            return 1

        def fps(self, index):
            return 8.0

        def frames(self, index):
            return 11

        def read_clip(self, index, start, clip):
            return np.arange(start, start + clip.frames)[:, None, None, None].astype(np.uint8), 5

        name = label = size = digest = origin = None

    source = SampledSource(Numbers(), ClipSpec(3, 8, **sampling))
    assert source.frames(0) == 6 and source.fps(0) == 4.0
    clip = ClipSpec(3, 8, **sampling)
    frames, label = source.read_clip(0, 2, clip)
    assert frames.ravel().tolist() == [4, 6, 8] and label == 5
    starts = {source.read_clip(0, np.random.default_rng(seed), clip)[0].ravel()[0] for seed in range(40)}
    assert starts == {0, 2, 4, 6}
    long = dataclasses.replace(clip, frames=8)
    assert source.read_clip(0, 0, long)[0].ravel().tolist() == [0, 2, 4, 6, 8, 10, 10, 10]
    Numbers.fps = lambda self, index: 0.0
    with pytest.raises(InputError, match="has no fps: set data.stride"):
        SampledSource(Numbers(), ClipSpec(3, 8, fps=4.0))
    with pytest.raises(InputError, match="not both"):
        ClipSpec(3, 8, fps=4.0, stride=2)
