"""Runs that are killed at random moments lose nothing, on a disk and in a bucket; see chaos.py."""

import functools
import json
import shutil

import chaos
import pytest
from test_faults import flip_a_bit, largest_file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function that makes runs, and the workdir of one that was not killed."""
    folder = tmp_path_factory.mktemp("chaos")
    chaos.make_videos(folder / "videos")
    make = functools.partial(chaos.Training, videos=folder / "videos", steps=8, workers=0, variant="plain")
    return make, chaos.uninterrupted(folder, make)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "kills"), [("disk", 2), ("bucket", 1)])
def test_chaos(runs, place, kills, tmp_path, request):
    said, root = [], request.getfixturevalue("bucket_server").root if place == "bucket" else None
    assert chaos.chaos(tmp_path, *runs, kills=kills, seed=7, progress=said.append, bucket=root) == []
    assert "0 differences" in said[-1] and any("killed at step" in line for line in said)


def test_chaos_sees_differences(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    assert chaos.differences(trained, workdir) == []
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[3]) | {"train/loss": 0.0}
    (workdir / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]))
    (workdir / "left_over.tmp").touch()
    flip_a_bit(largest_file(workdir / "checkpoints" / "6" / "optimizer"))
    found = chaos.differences(trained, workdir)
    assert found[0] == "files: {'left_over.tmp'}" and found[1] == "step 4: train/loss"
    assert "differs from its checksum" in found[2]
