"""Subfolders of a folder of videos are splits, classes or neither; all readers of the folder agree."""

import json
import logging
import shutil

import pytest
from data_helpers import moving_frames

from larp_jax.data import ClipSpec, codes, open_source, rewards
from larp_jax.data.folders import find_videos
from larp_jax.data.inputs import Inputs
from larp_jax.data.listing import list_videos
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.evaluation.protocols import ClipSet

CLIP = ClipSpec(4, 16)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video(path, moving_frames(5, 16, 16), 10)
    return path


@pytest.fixture
def make(video, tmp_path):
    """Creates a folder of videos with these names."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, tmp_path / name)
        return tmp_path

    return make


def seen(folder, split="train"):
    """{name: class} of a split; checks that training, `prepare` and (for all splits) commands agree on it."""
    found = find_videos(folder)
    source, listing, inputs = found.of_split(split), list_videos([str(folder)]), Inputs(str(folder), CLIP)
    opened = open_source(f"folder:{folder}", default_split=split)

    def named(labels):
        return [found.label_names[label] if label >= 0 else None for label in labels]

    ours = dict(zip(map(found.name, source.paths), named(source.labels), strict=True))
    theirs = [item for item in listing.items if item.split == split or not found.splits[0]]
    assert dict(zip((item.source for item in theirs), named(item.label for item in theirs), strict=True)) == ours
    assert {opened.name(i): named([opened.label(i)])[0] for i in range(len(opened))} == ours
    assert [opened.read_clip(i, 0, CLIP)[1] for i in range(len(opened))] == source.labels
    everything = {inputs.videos[w.video].name: named([w.label])[0] for rows, _ in inputs.batches(1) for w in rows}
    assert everything == dict(zip(map(found.name, found.paths), named(found.labels), strict=True))
    assert found.label_names == listing.label_names == inputs.label_names == opened.label_names
    return ours


def test_a_video_outside_the_classes_has_no_class(make, caplog):
    folder = make("a/0.mp4", "b/0.mp4", "intro.mp4")
    with caplog.at_level(logging.WARNING):
        assert seen(folder) == {"a/0.mp4": "a", "b/0.mp4": "b", "intro.mp4": None}
    assert "without a class, because they are in none of the class folders: intro.mp4" in caplog.text


def test_videos_without_folders_have_no_classes(make, caplog):
    assert seen(make("x.mp4", "y.mp4")) == {"x.mp4": None, "y.mp4": None}
    assert not caplog.records


@pytest.mark.parametrize("validation", ["val", "validate", "Validation"])
def test_splits(make, caplog, validation):
    folder = make("train/a/0.mp4", "train/b/0.mp4", "test/b/1.mp4", f"{validation}/c/2.mp4")
    assert find_videos(folder).label_names == ("a", "b", "c")
    assert seen(folder) == {"train/a/0.mp4": "a", "train/b/0.mp4": "b"}
    assert seen(folder, "test") == {"test/b/1.mp4": "b"}
    assert seen(folder, "validation") == {f"{validation}/c/2.mp4": "c"}
    assert not [record for record in caplog.records if "all are read" not in record.getMessage()]
    assert len(open_source(f"folder:{folder}/test")) == 1
    with pytest.raises(InputError, match=r"no split 'train\[:10%\]', only the folders .*test, train.*as in folder:/"):
        open_source(f"folder:{folder}", default_split="train[:10%]")
    inputs = Inputs(f"folder:{folder}", CLIP)
    assert [one.name for one in inputs.videos] == ["test/b/1.mp4"] and inputs.label_names == ("a", "b", "c")


def test_a_missing_split(make):
    folder = make("train/a/0.mp4", "val/a/0.mp4")
    with pytest.raises(InputError, match=f"has no split 'test', only the folders train, val; .*folder:{folder}/train"):
        open_source(f"folder:{folder}", default_split="test")
    with pytest.raises(InputError, match=f"did you mean 'folder:{folder}', or 'folder:{folder}/val' for a split"):
        open_source(f"folder:{folder}:val")


def test_splits_without_classes_and_a_video_outside_them(make, caplog):
    folder = make("train/0.mp4", "test/1.mp4", "intro.mp4")
    with caplog.at_level(logging.WARNING):
        assert seen(folder) == {"train/0.mp4": None}
    assert "left out, because they are in none of the splits test, train: intro.mp4" in caplog.text
    assert list_videos([str(folder)]).missing == [("train", "intro.mp4", "is in none of the folder's splits")]


def test_splits_among_other_folders_are_classes_with_a_warning(make, caplog):
    assert set(seen(make("train/0.mp4", "test/0.mp4", "plane/0.mp4")).values()) == {"plane", "test", "train"}
    assert "test, train are classes and not splits, because there are other subfolders" in caplog.text
    caplog.clear()
    shutil.rmtree(make() / "test")
    assert set(seen(make()).values()) == {"plane", "train"}  # "train" may be a class
    assert not caplog.records


def test_hidden_folders_are_left_out(make):
    folder = make("a/0.mp4", ".cache/1.mp4", "a/.thumbnails/2.mp4")
    (folder / ".cache" / "notes.txt").touch()
    assert seen(folder) == {"a/0.mp4": "a"}
    assert list_videos([str(folder)]).ignored == {}


def test_classes_named_by_numbers_are_sorted_by_number(make):
    folder = make(*(f"{name}/0.mp4" for name in range(12)))
    assert find_videos(folder).label_names == tuple(map(str, range(12)))
    assert seen(folder)["10/0.mp4"] == "10"
    make("x/0.mp4")
    assert find_videos(folder).label_names[:4] == ("0", "1", "10", "11")


def test_damaged_videos_do_not_change_the_classes(make):
    folder = make("a/0.mp4", "b/0.mp4")
    (folder / "a" / "0.mp4").write_bytes(b"broken")
    assert open_source(f"folder:{folder}").label(0) == Inputs(str(folder), CLIP).videos[0].read().__next__()[3] == 1
    assert [item.label for item in list_videos([str(folder)]).items] == [0, 1]


@pytest.mark.parametrize(
    ("file", "given", "says"),
    [
        ("list.csv", "folder:list.csv", "is a list: run larp-jax prepare --input list.csv"),
        ("list.csv", "tfds:list.csv", "is a list: run larp-jax prepare --input list.csv"),
        ("frames/a/0.png", "folder:frames", "two or more pictures whose names differ only in their numbers"),
        ("frames/a/0.png", "folder:frames/a/0.png", "a single picture: give the folder of its video, 'folder:frames"),
        ("videos/one.mp4", "folder:videos/one.mp4", "is a single video: give its folder, 'folder:videos'"),
        ("videos/one.mp4", "tfds:videos", "did you mean 'folder:videos'"),
        ("prepared/features.json", "folder:prepared", "did you mean 'tfds:prepared'"),
        ("prepared/features.json", "folder:prepared:train", "did you mean 'tfds:prepared:train'"),
        ("run/checkpoints/2/x", "folder:run", "contains checkpoints: give videos"),
        ("lists/classInd.txt", "folder:lists", "run larp-jax prepare --input lists"),
        ("x.npz", "folder:x.npz", "is neither a video"),
        ("x", "folder:none", "does not exist; give a folder of videos"),
        ("x", "tfds:/none", "give the path of a data set"),
        ("x", "tfds:moving_shapes/64", "give 'moving_shapes/64' without tfds:, it is generated on first use"),
        ("x", "tfds:ucf101", "run: tfds build ucf101"),
    ],
)
def test_errors_name_what_was_found_and_what_to_do(tmp_path, monkeypatch, file, given, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(InputError) as error:
        open_source(given)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("format", "more", "says"),
    [
        ("codes", {"K": 8}, "made contains codes: did you mean 'tokens:made'?"),
        ("codes", {"d": 4}, "made contains latents: did you mean 'tokens:made'?"),
        ("rewards", {}, "made contains rewards: did you mean 'rewards:made'?"),
        ("features", {}, "made contains features: did you mean 'features:made'?"),
        ("codebook", {}, None),
    ],
)
def test_errors_name_what_a_command_wrote(tmp_path, monkeypatch, format, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "manifest.json").write_text(json.dumps({"format": f"larp_jax.{format}", **more}))
    for given in ("made", "folder:made", "tfds:made"):
        with pytest.raises(InputError) as error:
            open_source(given)
        assert says in str(error.value) if says else "tokens:" not in str(error.value)
    for read, name in ((codes.read_manifest, "codes"), (rewards.read_manifest, "rewards")):
        if format != name:
            kind = f" but of {says.split()[2][:-1]}" if says else ""
            with pytest.raises(InputError, match=f"is not a manifest of {name}{kind}; give a folder written by"):
                read(tmp_path / "made")


def test_data_on_other_machines_is_refused():
    for spec in ("folder:gs://bucket/videos", "tfds:gs://bucket/set"):
        with pytest.raises(InputError, match="read from a disk, not from gs://; mount the bucket"):
            open_source(spec)


def test_evaluations_record_the_split_of_a_folder(make):
    folder = make("train/a/0.mp4", "test/a/1.mp4")
    assert ClipSet(f"folder:{folder}", CLIP).describe()["split"] == "test"
    assert ClipSet(f"folder:{folder / 'train'}", CLIP).describe()["split"] is None
