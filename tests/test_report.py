"""The page of a run: complete without network or other files; text of the run is never markup."""

import base64
import html.parser
import json
import os
import re
import shutil

import numpy as np
import pytest

from larp_jax import cli
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.tools import charts, drift
from larp_jax.tools.report import report
from larp_jax.weights import checkpoint

HOSTILE = "<script>alert('x')</script>\"'&{{ 7*7 }}</style><img src=http://example.com/x>"
VOID = {"meta", "input", "img", "link", "br"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each section; fails if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.section = [], {}, [], "top"
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.section = attributes.get("id", "notes")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts[self.section] = self.texts.get(self.section, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(workdir):
    text = report(workdir).read_text(encoding="utf-8")
    page = Page(text)
    addresses = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\(", text)
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1  # those of the report
    return page


def charts_of(page):
    """Points by (title, name of the series)."""
    found = {}
    for attributes in page.all("svg"):
        for name, points in json.loads(attributes["data-chart"])["series"]:
            found[attributes["aria-label"], name] = points
    return found


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """The workdir of the trained tokenizer, evaluated and analyzed."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("report") / "run")
    of_it = ["--checkpoint", str(workdir), "--data", "moving_shapes:test", "--max-clips=8"]
    assert cli.main(["evaluate", *of_it, "--output", str(workdir / "evaluation.json")]) == 0
    assert cli.main(["analyze", *of_it, "--ablated-clips=4", "--output", str(workdir / "analysis")]) == 0
    return workdir


def test_the_page_contains_everything_of_a_run(workdir, capsys):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert cli.main(["report", "--workdir", str(workdir)]) == 0
    assert f"{workdir / 'report.html'}: " in capsys.readouterr().out
    page = page_of(workdir)
    assert all(path.read_bytes() == content for path, content in before.items())

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    drawn = charts_of(page)
    assert drawn["PSNR", "training"] == [[row["step"], row["train/psnr"]] for row in rows]
    assert drawn["PSNR", "evaluation"] == [[row["step"], row["eval/psnr"]] for row in rows if "eval/psnr" in row]
    for title in ("Loss", "Learning rate", "Throughput", "Codes in use", "Logits of the discriminator"):
        assert any(name == title for name, _ in drawn), title
    assert len(drawn["Throughput", ""]) == len(rows) - 1
    assert "6 of 6" in page.texts["top"] and "finished" in page.texts["top"]

    videos = {attributes["data-step"]: attributes["src"] for attributes in page.all("video")}
    assert set(videos) == {"3", "6"}
    media = (workdir / "media" / "00000006_reconstruction.mp4").read_bytes()
    assert base64.b64decode(videos["6"].removeprefix("data:video/mp4;base64,")) == media

    counts = np.array(checkpoint.read_metadata(workdir)["code_counts"])
    assert f"{(counts > 0).mean():.1%}" in page.texts["codebook"]
    assert sum(share for _, share in drawn["Frequency of the codes", "codes by rank"]) == pytest.approx(1.0)

    result = json.loads((workdir / "analysis" / "analysis.json").read_text())
    assert [y for _, y in drawn["PSNR with some of the codes kept", "first"]] == result["kept"]["psnr"]["first"]
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")

    scores = json.loads((workdir / "evaluation.json").read_text())
    assert charts.short(scores["metrics"]["psnr"]) in page.texts["metrics"]
    assert scores["protocol"]["definitions"]["psnr"] in page.texts["metrics"]
    assert scores["protocol"]["fingerprint"] in page.texts["metrics"]
    differing, everything = page.texts["configuration"].split("All ")
    assert "model.quantizer.codebook_size32 8192" in differing and "data.flip" not in differing
    assert "model.quantizer.codebook_size32" in everything and "data.flipFalse" in everything
    assert "notes" not in page.texts


def test_text_is_never_markup(workdir, tmp_path):
    hostile = tmp_path / "a&b<i>"
    shutil.copytree(workdir, hostile)
    config = json.loads((hostile / "config.json").read_text())
    config |= {"stage": HOSTILE, "steps": HOSTILE, HOSTILE: HOSTILE, "tokenizer": HOSTILE}
    (hostile / "config.json").write_text(json.dumps(config))
    with (hostile / "metrics.jsonl").open("a") as file:
        row = {"step": 7, "wall_time": 1e300, f"train/{HOSTILE}": 1.0, "train/loss": HOSTILE, "train/psnr": None}
        file.write(json.dumps(row) + "\n")
    evaluation = json.loads((hostile / "evaluation.json").read_text())
    evaluation["metrics"] |= {HOSTILE: 1.0, "text": HOSTILE, "list": [HOSTILE], "huge": 10**400}
    evaluation["protocol"] |= {HOSTILE: {HOSTILE: [HOSTILE]}}
    (hostile / "evaluation.json").write_text(json.dumps(evaluation))
    (hostile / f"{'<b>'}.json").write_text("{")
    page = page_of(hostile)
    assert HOSTILE in page.texts["top"] and HOSTILE in page.texts["metrics"] and HOSTILE in page.texts["configuration"]
    assert (f"train/{HOSTILE}", "") in charts_of(page)
    assert "<b>.json cannot be read" in page.texts["notes"]


def test_a_run_that_has_just_begun(trained, tmp_path):
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    page = page_of(tmp_path)
    for section, text in (
        ("curves", "No metrics yet"),
        ("videos", "No videos yet"),
        ("codebook", "No code counts yet"),
        ("tokens", "larp-jax analyze"),
        ("metrics", "larp-jax evaluate"),
    ):
        assert text in page.texts[section]
    assert "0 of 6" in page.texts["top"] and "not finished" in page.texts["top"]


def test_a_generator(tmp_path):
    rows = [{"step": n, "wall_time": 10.0 * n, "train/loss": 6.0 / n, "train/top1": 0.1} for n in (1, 2, 3)]
    rows[-1] |= {"eval/cross_entropy": 2.5, "eval/top1": 0.25}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "tra')  # incomplete
    (tmp_path / "config.json").write_text('{"stage": "generator", "steps": 5, "data": {"batch_size": 4}}')
    (tmp_path / "media").mkdir()
    frames = np.zeros((4, 16, 128, 3), np.uint8)
    for step in range(30):
        write_video(tmp_path / "media" / f"{step:08d}_samples.mp4", frames, 8)
    page = page_of(tmp_path)
    drawn = charts_of(page)
    assert drawn["Loss", "evaluation"] == [[3, 2.5]]
    assert drawn["Accuracy of the next code", "top 1, evaluation"] == [[3, 0.25]]
    assert drawn["Throughput", ""] == [[2, 0.4], [3, 0.4]]  # 4 clips in 10 seconds
    steps = [int(attributes["data-step"]) for attributes in page.all("video")]
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 29
    assert "25.0%" in page.texts["top"]


def test_the_drift_of_streams(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "generator"}')
    page = page_of(tmp_path)
    assert "drift" not in page.texts and "#drift" not in [a["href"] for a in page.all("a")]
    numbers = {"mean": 0.5, "variance": 0.05, "distance": 2.0, "accuracy": 0.75}
    stream = [{"start": 8 * i, **numbers, "mean": 0.5 - 0.1 * i} for i in range(3)]
    anchored = [window | {"mean": 0.5} for window in stream]
    real = numbers | {"distance": None}
    held = {"frames": 8, "videos": 4, "data": HOSTILE, "real": real, "stream": stream, "anchored": anchored}
    for folder in ("drift", "odd"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "drift.json").write_text(json.dumps(held))
        held |= {"stream": [{"start": 0}]}
    page = page_of(tmp_path)
    drawn = charts_of(page)
    assert drawn["mean color", "stream"] == [[0, 0.5], [8, 0.4], [16, 0.3]]
    assert drawn["mean color", "anchored"] == drawn["mean color", "real clips"] == [[0, 0.5], [8, 0.5], [16, 0.5]]
    assert {title for title, name in drawn if name == "stream"} == set(drift.MEASURES.values())
    assert ("Frechet distance to real clips", "real clips") not in drawn
    assert "Windows of 8 frames" in page.texts["drift"] and HOSTILE in page.texts["drift"]
    assert "#drift" in [a["href"] for a in page.all("a")]
    assert "odd/drift.json does not have the format that larp-jax writes (KeyError: 'mean')" in page.texts["notes"]


def test_damage_is_reported(workdir, tmp_path):
    damaged = shutil.copytree(workdir, tmp_path / "run")
    for path in (damaged / "checkpoints").glob("*/metadata/metadata"):
        path.write_text("{")
    broken = json.loads((damaged / "analysis" / "analysis.json").read_text())
    del broken["kept"]
    (damaged / "analysis" / "analysis.json").write_text(json.dumps(broken))
    page = page_of(damaged)
    assert "checkpoints/6 is damaged (metadata/metadata differs from its checksum)" in page.texts["notes"]
    assert "analysis/analysis.json does not have the format that larp-jax writes" in page.texts["notes"]


def test_folders_that_are_not_runs(tmp_path):
    with pytest.raises(InputError, match="contains no run .neither config.json nor metrics.jsonl"):
        report(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a recipe .it contains a list"):
        report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be written"):
        report(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 1' + "0" * 400 + ', "train/loss": 1}',
        '{"step": true, "train/loss": 1}',
        '{"step": "NaN", "train/loss": 1}',
        '{"step": 3, "train/loss": "NaN", "train/psnr": [], "eval/psnr": {"a": 1}, "train/x": true}',
        '{"step": 3, "train/loss": 1' + "0" * 400 + ', "wall_time": 1' + "0" * 299 + "}",
        '{"step": 3, "train/loss": 1e299, "wall_time": 5e-324}',
        '{"step": 3, "train/loss": NaN, "wall_time": Infinity}',
        '{"step": 9007199254740991, "train/loss": 1, "train/\\ud800": 1}',
        '{"step": 3, "train/loss": ' + "[" * 100_000,
        '{"step": 3, "train/loss": ' + "[" * 900 + "]" * 900 + "}",
    ],
)
def test_odd_metrics(tmp_path, row):
    first = [{"step": n, "wall_time": float(n), "train/loss": 1.0 / n} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, first), row]) + "\n")
    (tmp_path / "config.json").write_text('{"steps": 1' + "0" * 299 + ', "data": {"batch_size": 1' + "0" * 299 + "}}")
    drawn = charts_of(page_of(tmp_path))
    assert drawn["Loss", ""][:2] == [[1, 1.0], [2, 0.5]]


def test_odd_results(workdir, tmp_path):
    odd = shutil.copytree(workdir, tmp_path / "run")
    analysis = json.loads((odd / "analysis" / "analysis.json").read_text())
    analysis["kept"]["tokens"] = [10**400, *analysis["kept"]["tokens"][1:]]
    (odd / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    deep = '{"protocol": {"a": ' * 200 + "1" + "}}" * 200
    (odd / "deep.json").write_text(deep)
    (odd / "deeper.json").write_text("[" * 100_000)
    (odd / "half.json").write_text('{"metrics": {"a\\ud800": "\\ud800"}, "protocol": {}}')
    (odd / "list.json").write_text('{"metrics": {"a": [[1]]}, "protocol": {"definitions": 3}}')
    os.mkfifo(odd / "pipe.json")
    os.mkfifo(odd / "media" / "00000009_samples.mp4")
    (odd / "media" / "²_samples.mp4").write_bytes(b"")
    directory = odd / "checkpoints" / "6"
    metadata = json.loads((directory / "metadata" / "metadata").read_text())
    (directory / "metadata" / "metadata").write_text(json.dumps(metadata | {"code_counts": [10**30, -1]}))
    checkpoint.write_digests(directory)
    notes = page_of(odd).texts["notes"]
    for text in (
        "deep.json cannot be read (it is nested too deeply)",
        "deeper.json cannot be read (it is nested too deeply)",
        "list.json does not have the format that larp-jax writes (TypeError",
        "pipe.json cannot be read",
    ):
        assert text in notes
    assert "too big" in notes or "too large" in notes  # the counts
    (odd / "config.json").write_text('{"a": ' * 200 + "1" + "}" * 200)
    with pytest.raises(InputError, match="is not a recipe .it is nested too deeply"):
        report(odd)
