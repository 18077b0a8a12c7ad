import pytest
from hypothesis import given, strategies as st

from larp_jax.data import DataSpec, parse_spec
from larp_jax.errors import InputError

WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
SPLITS = st.one_of(st.just(""), WORDS, st.sampled_from(["train[:10%]", "train[5:]+test", "test[10%:20%]"]))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("tfds:ucf101", DataSpec("tfds", "ucf101")),
        ("tfds:ucf101/ucf101_1:train[:10%]", DataSpec("tfds", "ucf101/ucf101_1", "train[:10%]")),
        ("tfds:/data/my:set/1.0.0:test", DataSpec("tfds", "/data/my:set/1.0.0", "test")),
        ("folder:/data/my:videos", DataSpec("folder", "/data/my:videos")),
        ("folder:-x", DataSpec("folder", "-x")),
        ("moving_shapes", DataSpec("moving_shapes", "")),
        ("moving_shapes:test", DataSpec("moving_shapes", "", "test")),
        ("moving_shapes/64:train[:32]", DataSpec("moving_shapes", "64", "train[:32]")),
        ("tfds:a:train+test", DataSpec("tfds", "a", "train+test")),
        ("folder:/a+b", DataSpec("folder", "/a+b")),
        (
            "0.7*tfds:a:train+test+3*folder:/a+b",
            DataSpec("mixture", "", "", (DataSpec("tfds", "a", "train+test"), DataSpec("folder", "/a+b")), (0.7, 3.0)),
        ),
        (
            "moving_shapes+folder:x",
            DataSpec("mixture", "", "", (DataSpec("moving_shapes", ""), DataSpec("folder", "x"))),
        ),
    ],
)
def test_forms(text, spec):
    assert parse_spec(text) == spec


@given(
    st.one_of(
        st.builds(DataSpec, st.just("tfds"), st.builds("/".join, st.lists(WORDS, min_size=1, max_size=3)), SPLITS),
        st.builds(DataSpec, st.just("moving_shapes"), st.sampled_from(["", "32", "64"]), SPLITS),
        st.builds(DataSpec, st.just("folder"), st.from_regex(r"/[a-zA-Z: .\[\]-]{0,20}[a-z]", fullmatch=True)),
    )
)
def test_text_and_value_are_the_same(spec):
    assert parse_spec(str(spec)) == spec


PARTS = st.builds(DataSpec, st.sampled_from(["tfds", "folder"]), WORDS)


@given(st.lists(st.tuples(PARTS, st.floats(1e-9, 1e9)), min_size=2, max_size=4), st.booleans())
def test_mixtures_too(parts, weighted):
    specs, weights = zip(*parts, strict=True)
    spec = DataSpec("mixture", "", "", specs, weights if weighted else ())
    assert parse_spec(str(spec)) == spec


@given(st.text(max_size=30))
def test_any_text_is_a_spec_or_one_line(text):
    try:
        parse_spec(text)
    except InputError as error:
        # A line break that the user wrote is shown as \n.
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("text", ["2*moving_shapes", "0.7*tfds:a+tfds:b", "0*tfds:a+1*tfds:b", "1.2.3*tfds:a+1*tfds:b"])
def test_weights_are_for_every_part_of_several(text):
    with pytest.raises(InputError, match="weight"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foler:/x", "did you mean 'folder:/x'?"),
        ("tdfs:ucf101", "did you mean 'tfds:ucf101'?"),
        ("moving_shape", "did you mean 'moving_shapes'?"),
        ("moving_shapes:", "did you mean 'moving_shapes'?"),
        ("tfds:/", "write a name after tfds:"),
        ("folder:", "write a name after folder:"),
        ("", "moving_shapes[/CONFIG][:SPLIT]"),
        ("tests", "did you mean 'folder:tests'?"),
        ("tests:train", "did you mean 'folder:tests', or 'folder:tests/train' for a split?"),
        ("ucf101", "did you mean 'tfds:ucf101'?"),
        ("ucf101:test", "did you mean 'tfds:ucf101:test'?"),
        ("Folder:tests", "did you mean 'folder:tests'?"),
        ("list.csv", "there is no file or folder 'list.csv'"),
        ("/data/videos", "there is no file or folder '/data/videos'"),
        ("walk.mp4", "there is no file or folder 'walk.mp4'"),
        ("requirements.txt", "is a list: run larp-jax prepare --input requirements.txt --output DIR, then give tfds:"),
        ("setup.py", "setup.py is neither a video"),
        ("tfds:a+foler:x+tfds:/", "write a name after tfds:"),
    ],
)
def test_errors_name_the_nearest(text, says, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(InputError, match="is not tfds:NAME") as error:
        parse_spec(text)
    assert says in str(error.value)
