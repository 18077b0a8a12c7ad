import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from larp_jax import cli, files
from larp_jax.data import ClipSpec, listing, open_source, prepare as prepare_module, train_batches, video
from larp_jax.data.prepare import Settings, prepare
from larp_jax.data.sources import labels, same_videos
from larp_jax.errors import InputError
from larp_jax.tools.benchmark import benchmark_data

SIZE = 32
CLIP = ClipSpec(8, SIZE)


def ignore(text):
    pass


def waves(count, seed):
    """uint8 [count, 48, 64, 3]: waves that move over a background of one color, as smooth as real footage."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(count), np.arange(48) / 48, np.arange(64) / 48, indexing="ij")
    light = np.full(t.shape, 0.5)
    for _ in range(4):
        across, down, phase = rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(0, 6)
        light += 0.12 * np.sin(across * x + down * y + 0.1 * t + phase)
    return np.clip(light[..., None] * rng.uniform(150, 255, 3), 0, 255).astype(np.uint8)


def write(path, frames, seed, fps=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write_video(path, waves(frames, seed), fps)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """10 videos of 20, 23, ... frames in train and 3 in val, in 2 classes; 2 other files; 2 duplicates."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(13):
        write(folder / ("train" if i < 10 else "val") / ("walk", "run")[i % 2] / f"{i}.mp4", 20 + 3 * i, seed=i)
    (folder / "train" / "run" / "broken.mp4").write_bytes(b"no video")
    (folder / "train" / "notes.txt").write_text("no video either")
    shutil.copy(folder / "train" / "walk" / "2.mp4", folder / "val" / "walk" / "twin.mp4")
    again = video.VideoFile(folder / "train" / "run" / "3.mp4").read(0, 29, (40, 40))
    video.write_video(folder / "val" / "run" / "smaller.mp4", again, 10)
    return folder


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    """The folder `videos`, prepared as raw frames."""
    output = tmp_path_factory.mktemp("prepared") / "raw"
    prepare([str(videos)], output, Settings(SIZE, "raw"), workers=1, progress=ignore)
    return output


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_clips_are_those_of_the_files(videos, prepared):
    source, original = open_source(f"tfds:{prepared}:validation"), open_source(f"folder:{videos / 'val'}")
    assert len(source) == 5 and source.label_names == original.label_names == ("run", "walk")
    assert [source.name(i) for i in range(5)] == [f"val/{original.name(i)}" for i in range(5)]
    rng = np.random.default_rng(0)
    for index in range(5):
        assert source.frames(index) == original.frames(index) and source.fps(index) == 10
        last = source.frames(index) - 8
        for start in (0, 12, last):
            (clip, label), (expected, same) = (one.read_clip(index, start, CLIP) for one in (source, original))
            assert label == same
            np.testing.assert_array_equal(clip, expected)
        assert source.read_clip(index, rng, CLIP)[0].shape == CLIP.shape
        assert source.read_clip(index, 0, ClipSpec(99, SIZE))[0].shape[0] == 99
        with pytest.raises(InputError, match="ends after"):
            source.read_clip(index, last + 1, CLIP)


@pytest.mark.parametrize(("storage", "least"), [("jpeg", 35), ("h264", 35)])
def test_compressed_frames_are_close_and_deterministic(videos, prepared, tmp_path, storage, least):
    for name in "ab":
        prepare([str(videos)], tmp_path / name, Settings(SIZE, storage), workers=1, progress=ignore)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    source, exact = open_source(f"tfds:{tmp_path / 'a'}"), open_source(f"tfds:{prepared}")
    for index in (0, 9):
        clips = [one.read_clip(index, 11, CLIP)[0].astype(float) for one in (source, exact)]
        assert 10 * np.log10(255**2 / np.mean((clips[0] - clips[1]) ** 2)) > least
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "a", prepared)]
    sizes = [report["splits"]["train"]["bytes"] for report in reports]
    assert sizes[0] < sizes[1]


def test_tfds_itself_reads_it(prepared, tmp_path, videos):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    assert builder.info.features["label"].names == ["run", "walk"]
    rows = builder.as_data_source(split="validation")
    assert [row["start"] for row in rows][:4] == [0, 16, 32, 48]
    assert rows[1]["video"].shape == (16, SIZE, SIZE, 3) and rows[0]["source"] == b"val/run/11.mp4"
    expected = open_source(f"tfds:{prepared}:validation").read_clip(0, 16, ClipSpec(16, SIZE))[0]
    np.testing.assert_array_equal(rows[1]["video"], expected)
    pytest.importorskip("PIL")
    prepare([str(videos / "val")], tmp_path / "jpeg", Settings(SIZE, "jpeg"), workers=1, progress=ignore)
    row = tfds.builder_from_directory(tmp_path / "jpeg").as_data_source(split="train")[1]
    assert np.abs(np.stack(list(row["video"])).astype(int) - expected.astype(int)).mean() < 3


def test_parts_of_a_split_contain_whole_videos(prepared):
    everything = open_source(f"tfds:{prepared}:train")
    halves = [open_source(f"tfds:{prepared}:train{part}") for part in ("[:50%]", "[50%:]")]
    names = [[one.name(i) for i in range(len(one))] for one in (everything, *halves)]
    assert names[0] == names[1] + names[2] and names[1] and names[2]
    for i in range(len(halves[0])):
        last = halves[0].frames(i) - 8
        np.testing.assert_array_equal(halves[0].read_clip(i, last, CLIP)[0], everything.read_clip(i, last, CLIP)[0])
    both = open_source(f"tfds:{prepared}:train+validation")
    assert len(both) == 15


def test_report(prepared, capsys):
    report = json.loads((prepared / "report.json").read_text())
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["videos"], validation["videos"]) == (10, 5)
    assert train["frames"] == sum(range(20, 50, 3)) and train["classes"] == {"run": 5, "walk": 5}
    assert train["seconds"] == pytest.approx(train["frames"] / 10)
    assert train["durations"]["2-5 s"] == 10 and sum(train["durations"].values()) == 10
    assert report["skipped"] == [
        ["train", "train/run/broken.mp4", "cannot be read as video (Invalid data found when processing input)"]
    ]
    assert report["other_files"] == {".txt": 1}
    duplicates = report["duplicates"]
    assert duplicates["between_splits"] == [
        ["looks alike", "train", "train/run/3.mp4", "validation", "val/run/smaller.mp4"],
        ["same file", "train", "train/walk/2.mp4", "validation", "val/walk/twin.mp4"],
    ]
    assert duplicates["within_splits"] == [] and duplicates["between_splits_count"] == 2


def test_workers_change_nothing_and_a_second_run_does_nothing(videos, prepared, tmp_path, capsys):
    command = ["prepare", "--input", str(videos), "--output", str(tmp_path / "a"), "--size", str(SIZE)]
    assert cli.main([*command, "--storage", "raw", "--workers", "2"]) == 0
    assert "estimate: 15 videos" in (text := capsys.readouterr().out) and "duplicates between splits 2" in text
    assert contents(tmp_path / "a") == contents(prepared)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert cli.main([*command, "--storage", "raw"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before
    assert cli.main(command) == 2
    assert "other videos or settings" in capsys.readouterr().err


def test_killed_runs_finish_equal(videos, prepared, tmp_path):
    command = [sys.executable, "-m", "larp_jax", "prepare", "--input", str(videos), "--size", str(SIZE)]
    command += ["--storage", "raw", "--workers", "1", "--output", str(tmp_path / "a")]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(cli.__file__).parents[2])}
    for shards in (1, 4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "a" / ".prepare").glob("*-*.json"))) < shards and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    said = []
    prepare([str(videos)], tmp_path / "a", Settings(SIZE, "raw"), workers=1, progress=said.append)
    assert said[0].startswith("continuing: ")
    assert contents(tmp_path / "a") == contents(prepared)


@pytest.mark.parametrize("victim", ["_write_tfds", "make_report"])
def test_a_second_call_completes_a_failed_one(videos, prepared, tmp_path, monkeypatch, victim):
    def fail(*_):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, victim, fail)
        with pytest.raises(OSError, match="no"):
            prepare([str(videos)], tmp_path / "a", Settings(SIZE, "raw"), workers=1, progress=ignore)
    prepare([str(videos)], tmp_path / "a", Settings(SIZE, "raw"), workers=1, progress=ignore)
    assert contents(tmp_path / "a") == contents(prepared)


@pytest.mark.parametrize("finished", [True, False])
def test_emptied_and_missing_shards_are_written_again(videos, prepared, tmp_path, monkeypatch, finished):
    folder = tmp_path / "a"
    if finished:
        shutil.copytree(prepared, folder)
    else:

        def fail(*_):
            raise OSError("no")

        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "_write_tfds", fail)
            with pytest.raises(OSError, match="no"):
                prepare([str(videos)], folder, Settings(SIZE, "raw"), workers=1, progress=ignore)
    first, second, *_ = sorted(folder.glob("*.array_record*"))
    first.write_bytes(b"")
    second.unlink()
    said = []
    prepare([str(videos)], folder, Settings(SIZE, "raw"), workers=1, progress=said.append)
    assert ("is missing or damaged" if finished else "continuing: ") in said[0]
    assert contents(folder) == contents(prepared)


def test_files_that_vanish_after_the_plan_are_reported(videos, tmp_path, monkeypatch):
    shutil.copytree(videos / "val", tmp_path / "in")
    estimate = prepare_module._estimate

    def estimate_and_remove(*arguments):
        (tmp_path / "in" / "run" / "11.mp4").unlink()
        return estimate(*arguments)

    monkeypatch.setattr(prepare_module, "_estimate", estimate_and_remove)
    report = prepare([str(tmp_path / "in")], tmp_path / "out", Settings(SIZE), workers=1, progress=ignore)
    assert report["videos"] == 4 and [row[1] for row in report["skipped"]] == ["run/11.mp4"]
    source = open_source(f"tfds:{tmp_path / 'out'}")
    assert len(source) == 4 and source.read_clip(3, 0, CLIP)[0].shape == CLIP.shape


def test_refusals(videos, tmp_path, monkeypatch):
    for change, says in (
        ({"storage": "webp"}, "choose from raw, jpeg, h264"),
        ({"quality": 40}, r"--quality of jpeg is 1 \(best\) to 31, got 40"),
        ({"storage": "raw", "quality": 3}, "does not apply to raw"),
        ({"size": 33}, "even number"),
    ):
        with pytest.raises(InputError, match=says):
            Settings(**change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        prepare([str(videos)], tmp_path / "full", Settings(SIZE), progress=ignore)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"has 1 KB free, the data set needs about"):
        prepare([str(videos)], tmp_path / "new", Settings(SIZE), progress=ignore)
    said = []
    assert prepare([str(videos)], tmp_path / "newer", Settings(SIZE), estimate_only=True, progress=said.append) is None
    assert said[0].startswith("estimate: 15 videos") and not (tmp_path / "newer").exists()


def test_two_at_once_are_refused(videos, tmp_path):
    with files.claim(tmp_path / "a" / ".prepare"):
        with pytest.raises(InputError, match="another process is writing"):
            prepare([str(videos)], tmp_path / "a", Settings(SIZE), progress=ignore)


def listed(inputs, root=None):
    found = listing.list_videos([str(path) for path in inputs], root and str(root))
    return [(i.split, i.source, found.label_names[i.label] if i.label >= 0 else None) for i in found.items], found


def test_csv_lists(videos, tmp_path):
    plain = tmp_path / "my_train.csv"
    plain.write_text("path,label\ntrain/walk/2.mp4,b\ntrain/run/1.mp4,a\n\ngone.mp4,a\n")
    test = tmp_path / "test.csv"
    test.write_text(f"\ufeffPath , Label\nval/run/11.mp4,a\n{videos}/train/../val/walk/10.mp4,\n", encoding="utf-8")
    rows, found = listed([plain, test], videos)
    assert rows == [
        ("train", "train/walk/2.mp4", "b"),
        ("train", "train/run/1.mp4", "a"),
        ("test", "val/run/11.mp4", "a"),
        ("test", "val/walk/10.mp4", None),
    ]
    assert found.missing == [("train", "gone.mp4", f"not in {videos.name}")]
    plain.write_text("id,path,action,label\n7,train/run/1.mp4,Run,2\n8,train/walk/2.mp4,Walk,0\n")
    rows, found = listed([plain], videos)
    assert [row[2] for row in rows] == ["Run", "Walk"] and found.label_names == ("Walk", "1", "Run")
    assert [item.label for item in found.items] == [2, 0]
    plain.write_text("train/run/1.mp4,11\ntrain/walk/2.mp4,2\n")
    assert [item.label for item in listed([plain], videos)[1].items] == [11, 2]


ROWS = [("train/run/1.mp4", "0"), ("train/walk/2.mp4", "2"), ("val/run/11.mp4", "10")]
CRLF = "\ufeffpath,label\r\n" + "".join(f'{path}, "walk, ""slow"" {n}"\r\n' for path, n in ROWS)
NUMBERS = ["0", "2", "10"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        *((f"{header}\n" + "".join(f"{p},{n}\n" for p, n in ROWS), NUMBERS) for header in (
            "path,label", "video,label", "Video Path,Label", "file name,class", "Datei,Klasse", "name,target"
        )),
        ("".join(f"{p},{n}\n" for p, n in ROWS), NUMBERS),
        ("".join(f"{n},{p}\n" for p, n in ROWS), NUMBERS),
        ("label,video\n" + "".join(f"{n},{p}\n" for p, n in ROWS), NUMBERS),
        (",video,category,fps\n" + "".join(f"{i},{p},{n},25\n" for i, (p, n) in enumerate(ROWS)), NUMBERS),
        ("video,label\n" + "".join(f"{p},{n}.0\n" for p, n in ROWS), NUMBERS),
        ("video,label\n" + "".join(f"{p},{int(n):03}\n" for p, n in ROWS), NUMBERS),
        ("video,label\n" + "".join(f"{p},{int(n) or -1}\n" for p, n in ROWS), [None, "2", "10"]),
        ("video,label\n" + "".join(f"{p},{10**7 * int(n)}\n" for p, n in ROWS), ["0", "20000000", "100000000"]),
        (CRLF, [f'walk, "slow" {n}' for n in NUMBERS]),
        ("video\n" + "".join(f"{p}\n" for p, _ in ROWS), [None] * 3),
        ("video,action\n" + "".join(f"{p},a{n}\n" for p, n in ROWS), ["a0", "a2", "a10"]),
    ],
)  # fmt: skip
def test_headers_and_labels(videos, tmp_path, text, labels):
    (tmp_path / "list.csv").write_bytes(text.encode())
    rows, found = listed([tmp_path / "list.csv"], videos)
    assert [(row[1], row[2]) for row in rows] == [(path, label) for (path, _), label in zip(ROWS, labels, strict=True)]
    if labels == NUMBERS:
        assert [item.label for item in found.items] == [0, 2, 10] and len(found.label_names) == 11
    else:
        assert set(found.label_names) - set(map(str, range(11))) == set(labels) - {None, *map(str, range(11))}
    if "00000" in text:
        assert found.label_names == tuple(labels)  # by number


def test_a_missing_first_video_is_not_a_header(videos, tmp_path):
    (tmp_path / "list.csv").write_text("gone.mp4,a\ntrain/run/1.mp4,b\n")
    rows, found = listed([tmp_path / "list.csv"], videos)
    assert rows == [("train", "train/run/1.mp4", "b")] and found.missing[0][1] == "gone.mp4"


def test_a_list_without_the_column_of_classes_says_so(videos, tmp_path, caplog):
    (tmp_path / "list.csv").write_text("video,sport,fps\ntrain/run/1.mp4,run,25\n")
    assert listed([tmp_path / "list.csv"], videos)[0] == [("train", "train/run/1.mp4", None)]
    assert "no column is called label" in caplog.text


def test_official_lists(videos, tmp_path):
    kinetics = tmp_path / "kinetics" / "train" / "dance"
    kinetics.mkdir(parents=True)
    for name in ("abcdefghijk_000007_000017.mp4", "lmnopqrstuv.mp4"):
        shutil.copy(videos / "train" / "run" / "1.mp4", kinetics / name)
    csv = tmp_path / "kinetics.csv"
    csv.write_text(
        "label,youtube_id,time_start,time_end,split\ndance,abcdefghijk,7,17,train\nsing,lmnopqrstuv,0,10,validate\n"
        "sing,missing_one,0,10,train\n"
    )
    rows, found = listed([csv], tmp_path / "kinetics")
    assert rows == [
        ("train", "train/dance/abcdefghijk_000007_000017.mp4", "dance"),
        ("validation", "train/dance/lmnopqrstuv.mp4", "sing"),
    ]
    assert [row[1] for row in found.missing] == ["missing_one_000000_000010"]
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 YoYo\r\n")
    for name in ("YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_a_g01_c01.avi"):
        write(tmp_path / "UCF-101" / name, 8, 0)
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 2\r\n")
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_a_g01_c01.avi\r\n")
    expected = [("train", "YoYo/v_YoYo_g08_c01.avi", "YoYo")]
    expected += [("test", "ApplyEyeMakeup/v_a_g01_c01.avi", "ApplyEyeMakeup")]
    assert listed([lists])[0] == expected
    assert [item.label for item in listed([lists])[1].items] == [1, 0]
    assert listed([lists / "testlist01.txt"])[0] == expected[1:]


@pytest.mark.parametrize("path", ["../secret.mp4", "/etc/passwd", "train/../../x.mp4", ".", "a\0b.mp4"])
@pytest.mark.parametrize("name", ["list.csv", "trainlist01.txt"])
def test_lists_cannot_leave_their_folder(videos, tmp_path, path, name):
    (tmp_path / "classInd.txt").write_text("1 train\n")
    (tmp_path / name).write_text(f"path,label\n{path},1\n" if name == "list.csv" else f"{path}\n")
    with pytest.raises(InputError, match=r"line \d: path .* leads out of|cannot be read as CSV"):
        listing.list_videos([str(tmp_path / name)], str(videos))


def test_lists_that_cannot_be_understood(videos, tmp_path):
    for text, says in (
        (b"a,b,c\n1,2,3\n", "has no column path"),
        (b"path,label\n,3\n", "has no path"),
        (b"path,label\ntrain/run/1.mp4,walk, slow\n", "line 2: has 3 cells, but the first line has 2"),
        (b"1,train/run/1.mp4,run\n", "is not a header with a column path; write a header"),
        (b"video,label\n", "has no column path"),
        (b"\n", "is empty"),
        (b"path,label\nnowhere.mp4,3\n", "none of the 1 listed videos is in"),
        (b"path,action,label\nx,a,1\ny,b,1\n", "not one number per action"),
        (b"path,split\nx,../a\n", "not a valid name of a split"),
        (b"\xff\xfe\x00", "cannot be read as CSV"),
    ):
        (tmp_path / "list.csv").write_bytes(text)
        with pytest.raises(InputError, match=says) as error:
            listing.list_videos([str(tmp_path / "list.csv")], str(videos))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip.mp4", "is not a list of videos (.csv, .txt); .* is a single video: give its folder"),
        ("list.tsv", "is not a list of videos (.csv, .txt); .* is neither a video"),
        ("list.txt", "is not one of UCF101's lists (classInd.txt is not next to it); write your own list as .csv"),
    ],
)
def test_files_that_are_not_lists(tmp_path, name, says):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=says.replace("(", r"\(").replace(")", r"\)")):
        listing.list_videos([str(tmp_path / name)])


def test_labels_are_those_of_videos(videos, prepared):
    """Most of these videos have several records, so the indices of records and videos differ."""
    source, folder = open_source(f"tfds:{prepared}:train"), open_source(f"folder:{videos}")
    assert len(source) == len(folder) == 10
    assert labels(source).tolist() == [source.read_clip(i, 0, CLIP)[1] for i in range(10)] == [0] * 5 + [1] * 5
    names = [source.name(i) for i in range(10)]
    assert [folder.name(i) for i in range(10)] == names and labels(folder).tolist() == labels(source).tolist()


def test_tfds_data_sets_are_input_too(prepared, tmp_path, monkeypatch):
    report = prepare([f"tfds:{prepared}"], tmp_path / "half", Settings(16, "raw"), workers=1, progress=ignore)
    assert {split: totals["videos"] for split, totals in report["splits"].items()} == {"train": 10, "validation": 5}
    source, original = open_source(f"tfds:{tmp_path / 'half'}:train"), open_source(f"tfds:{prepared}:train")
    assert source.label_names == original.label_names and source.name(3) == "train#3"
    (clip, label), (expected, same) = (one.read_clip(3, 20, ClipSpec(8, 16)) for one in (source, original))
    np.testing.assert_array_equal(clip, expected)
    assert label == same == 0
    monkeypatch.chdir(tmp_path)
    assert len(open_source("tfds:half:validation")) == 5


def test_duplicates_are_found_in_prepared_data(videos, prepared):
    both = open_source(f"tfds:{prepared}:train"), open_source(f"folder:{videos / 'val'}")
    assert {both[0].name(i) for i in same_videos(*both)} == {"train/walk/2.mp4"}
    assert {both[1].name(i) for i in same_videos(*both[::-1])} == {"walk/twin.mp4"}


def test_mixtures(videos, prepared, tmp_path):
    write(tmp_path / "more" / "swim" / "a.mp4", 12, 50)
    write(tmp_path / "more" / "run" / "b.mp4", 12, 51)
    spec = f"folder:{tmp_path / 'more'}+tfds:{prepared}:train"
    source = open_source(spec)
    assert len(source) == 12 and source.label_names == ("run", "swim", "walk")
    assert [source.name(i) for i in (0, 1, 2)] == ["run/b.mp4", "swim/a.mp4", "train/run/1.mp4"]
    assert [source.read_clip(i, 0, CLIP)[1] for i in (0, 1, 2, 11)] == [0, 1, 0, 2]
    assert labels(source).tolist() == [0, 1] + [0] * 5 + [2] * 5
    for text, share in ((spec, 2 / 12), (f"0.75*{spec.replace('+tfds', '+0.25*tfds')}", 0.75)):
        with train_batches(text, CLIP, batch_size=24, seed=0) as batches:
            first = [next(batches) for _ in range(4)]
        swimming = np.concatenate([batch["label"] for batch in first]) == 1
        assert swimming.mean() == pytest.approx(share / 2, abs=0.02)
        with train_batches(text, CLIP, batch_size=24, seed=0, start_step=3) as batches:
            np.testing.assert_array_equal(next(batches)["video"], first[3]["video"])


def test_benchmark_names_the_bottleneck(videos, prepared):
    for spec, bottleneck in ((f"folder:{videos / 'train'}", "decode"), (f"tfds:{prepared}", None)):
        result = benchmark_data(spec, CLIP, batch_size=4, seconds=0.2, model_rate=1e-3)
        stages = {name: result[f"{name}_ms"] for name in ("read", "decode", "resize", "copy")}
        assert result["bottleneck"] == max(stages, key=stages.get) and stages["read"] > 0
        assert result["feeds_model"] is True
        assert (stages["decode"] == 0) == (bottleneck is None)


def test_real_footage(videos_dir, tmp_path):
    report = prepare([str(videos_dir / "odd")], tmp_path / "odd", Settings(16), workers=1, progress=ignore)
    assert report["videos"] + len(report["skipped"]) == 47
    source = open_source(f"tfds:{tmp_path / 'odd'}")
    for index in range(len(source)):
        clip, _ = source.read_clip(index, np.random.default_rng(index), ClipSpec(16, 16))
        assert clip.shape == (16, 16, 16, 3)


def test_beam_writes_the_same(videos, prepared, tmp_path):
    pytest.importorskip("apache_beam")
    options = "--runner=DirectRunner --direct_running_mode=in_memory"
    prepare([str(videos)], tmp_path / "a", Settings(SIZE, "raw"), beam_options=options, progress=ignore)
    assert contents(tmp_path / "a") == contents(prepared)
