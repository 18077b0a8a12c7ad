"""larp-jax demo: what the page computes, and the page itself in a real browser."""

import shutil
import socket

import jax
import numpy as np
import pytest
from data_helpers import moving_frames, write_as
from test_generate import write_generator

from larp_jax import cli, load_generator, load_tokenizer
from larp_jax.api import LoadedTokenizer
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.metrics import psnr
from larp_jax.models.pixels import to_uint8
from larp_jax.tools import demo as computed, demo_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def tokenizer(untrained):
    """One with random weights whose codes depend on the clip (weak queries, strong attention, centered latents), and
    whose decoder depends on its codes."""
    given = load_tokenizer(untrained)
    params = jax.tree.map(np.array, given.params)
    encoder = params["encoder"]
    encoder["queries"] = jax.tree.map(lambda x: 0.1 * x, encoder["queries"])
    encoder["transformer"]["blocks"]["attention"]["out"]["kernel"] *= 5
    params["quantizer"]["out_linear"]["kernel"] *= 8
    params["decoder"]["transformer"]["blocks"]["attention"]["out"]["kernel"] *= 5
    clips = np.stack([moving_frames(8, 32, 32, seed=seed) for seed in range(4)]) / np.float32(255)

    @jax.jit
    def project(params, clips, lengths):
        module = given.module(params)
        return module.quantizer.project(module.encoder(clips, lengths))

    latents = np.asarray(project(params, clips, np.tile([[4, 4]], (4, 1))))[:, :8]
    params["quantizer"]["in_linear"]["bias"] -= latents.mean(axis=(0, 1))
    return LoadedTokenizer(given.config, params, step=6)


@pytest.fixture(scope="module")
def generator(tokenizer, tmp_path_factory):
    """The path of a generator with random weights."""
    c = tokenizer.config
    sizes = {"num_tokens": c.num_tokens, "blocks": c.blocks, "ladder": c.ladder, "class_dropout": 0.1}
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint, "class_names": ["walk", "<run>"]}
    return write_generator(tmp_path_factory.mktemp("g") / "generator", metadata, num_classes=3, **sizes)


@pytest.fixture(scope="module")
def demo(tokenizer, generator):
    return computed.Demo(tokenizer, load_generator(generator))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Paths of two videos of 19 and of 8 frames, and of a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "first.mp4", moving_frames(19, seed=1), 10.0)
    write_as(folder / "second.gif", moving_frames(8, seed=2), "gif", "rgb8", {})
    (folder / "<b>bad.mp4").write_bytes(b"nothing of the kind")
    return [folder / name for name in ("first.mp4", "second.gif", "<b>bad.mp4")]


def test_clips_are_read_encoded_and_decoded(demo, tokenizer, videos):
    clip = demo.read(videos[0])
    assert (clip.name, clip.fps, clip.number, clip.count, clip.lengths) == ("first.mp4", 10.0, 0, 3, (4, 4))
    assert clip.video.shape == (8, 32, 32, 3) and clip.codes.shape == (8,)
    codes, lengths = tokenizer.encode(clip.video[None])
    np.testing.assert_array_equal(clip.codes, codes[0, :8])
    decoded = np.asarray(tokenizer.decode(codes, lengths))
    np.testing.assert_array_equal(clip.reconstruction, to_uint8(decoded[0]))
    np.testing.assert_allclose(clip.psnr, psnr(decoded, clip.video[None] / np.float32(255))[0], atol=1e-4)
    last = demo.read(videos[0], 2, "8,2")
    assert last.lengths == (8, 2) and len(last.codes) == 10
    np.testing.assert_array_equal(last.video[3:], last.video[[2] * 5])  # held still after frame 19
    assert demo.budgets == ["4", "8"] and demo.smallest == (2, 2)


def test_files_that_are_no_video_get_one_line(demo, videos):
    for arguments, message in (
        ((videos[2],), r"^<b>bad\.mp4: cannot be read as video"),
        ((videos[0], 3), r"^first\.mp4 ends before its clip 4; choose"),
        ((videos[0], 0, "5"), "5"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            demo.read(*arguments)
        assert "\n" not in str(raised.value)
    assert "&lt;b&gt;bad.mp4" in demo_page.problem(InputError("<b>bad.mp4"))


def test_swapped_codes_change_the_frames_that_they_belong_to(demo, videos):
    first, second = demo.read(videos[0]), demo.read(videos[1])
    everything = demo.swap(first, second, range(8))
    np.testing.assert_array_equal(everything, second.reconstruction)
    later = demo.swap(first, second, range(4, 8))  # the codes of the second block of four frames
    np.testing.assert_array_equal(later[:4], first.reconstruction[:4])
    assert (later[4:] != first.reconstruction[4:]).any()
    few = demo.read(videos[1], 0, "4")  # encoded again with the numbers of the first
    np.testing.assert_array_equal(demo.swap(first, few, range(8)), everything)


def test_maps_measured_by_hand(demo, tokenizer, videos):
    clip = demo.read(videos[0])
    maps = demo.maps(clip)
    whole = np.asarray(tokenizer.decode(np.pad(clip.codes, (0, 4))[None], np.array([clip.lengths])), np.float64)
    video = clip.video
    strength = maps.patches.mean(axis=(1, 2, 3))
    early, late = strength[:4].argmax(), 4 + strength[4:].argmax()
    for position in (early, late):
        change = 0.0
        for form in (video[:, :, ::-1], video[:, ::-1], video[::-1], 255 - video):
            codes = np.pad(clip.codes, (0, 4))
            codes[position] = demo.encode(form, clip.lengths)[0][position]
            decoded = tokenizer.decode(codes[None], np.array([clip.lengths]))
            change = change + np.square(decoded - whole).mean(axis=-1)[0] / 4
        pt, ph, pw = tokenizer.config.decoder_patch
        by_patch = change.reshape(8 // pt, pt, 32 // ph, ph, 32 // pw, pw).mean(axis=(1, 3, 5))
        np.testing.assert_allclose(maps.patches[position], by_patch, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(maps.frames[position], change.mean(axis=(1, 2)), rtol=1e-3, atol=1e-9)
        assert change.max() > 0
    assert maps.patches.shape == (8, 8 // pt, 32 // ph, 32 // pw) and maps.patches[late][0].max() == 0
    assert maps.facts(late)["time"] <= 0.5 and 0 < maps.facts(late)["space"] <= 1
    over = maps.over(clip.reconstruction, late)
    assert over.shape == clip.video.shape and over.dtype == np.uint8
    assert (np.ptp(over[:4].astype(int), axis=-1) == 0).all() and np.ptp(over[4:].astype(int), axis=-1).max() > 50


def test_positions():
    assert computed.read_positions(" 0-2, 5,2 – 3,", 8) == [0, 1, 2, 3, 5]
    for text in ("", "a", "3-1", "0-8", "1.5", "-1", "1-2-3"):
        with pytest.raises(InputError):
            computed.read_positions(text, 8)


def test_clips_that_are_not_square_keep_their_proportions():
    wide = np.zeros((2, 16, 24, 3), np.uint8)
    assert "--ratio: 24 / 16" in demo_page.clips([("a", wide), ("b", wide)], 8.0)
    stream = type("Streaming", (), {"stream": lambda *_, **__: [wide], "tokenizer": type("T", (), {"fps": 8.0})})()
    assert all("--ratio: 24 / 16" in shown for shown in demo_page.played(stream, 0, 1.0, 0, 2))
    clip = computed.Clip("a", 8.0, 0, 1, wide, np.arange(3), None, wide, 20.0)
    maps = computed.Maps(np.ones((3, 2, 4, 6)), np.ones((3, 2)))
    assert "aspect-ratio:6 / 4" in demo_page.code_grid(clip, maps)
    assert "var(--ratio" in (demo_page.charts.TEMPLATES / "demo.css").read_text("utf-8")


def test_samples_and_streams(demo):
    assert demo.classes == [("any class", -1), ("0 walk", 0), ("1 <run>", 1), ("2", 2)]
    samples = demo.sample(1, guidance=1.5, seed=3)
    assert samples.shape == (4, 8, 32, 32, 3) and samples.dtype == np.uint8
    blocks = list(demo.stream(1, frames=10, seed=3))
    assert [block.shape for block in blocks] == [(4, 32, 32, 3), (4, 32, 32, 3), (2, 32, 32, 3)]
    shown = list(demo_page.played(demo, 1, 1.0, 3, 5))
    assert len(shown) == 6 and "frame 5<" in shown[4] and "video/mp4" in shown[5] and "5 frames" in shown[5]


def test_what_cannot_be_shown_or_served(capsys, monkeypatch):
    run = ["demo", "--checkpoint", "nowhere"]
    monkeypatch.setattr(demo_page.importlib.util, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main([*run, "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(demo_page.importlib.util, "find_spec", lambda name: None)
    assert cli.main(run) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'larp_jax[demo]'")


PIXELS = """
(place) => {
  const canvas = document.createElement("canvas"), video = document.querySelectorAll(place[0] + " video")[place[1]];
  canvas.width = canvas.height = 32;
  canvas.getContext("2d").drawImage(video, 0, 0, 32, 32);
  return Array.from(canvas.getContext("2d").getImageData(0, 0, 32, 32).data);
}
"""


@pytest.mark.slow
def test_the_page_in_a_browser(demo, videos):
    """A file is dropped, its reconstruction plays, a code is chosen and swapped; nothing comes from elsewhere."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt install chromium")
    first, second = map(str, videos[:2])
    bad = videos[2].with_name("bad.mp4")
    bad.write_bytes(b"nothing of the kind")
    clips = demo.read(first), demo.read(second)
    swapped = np.stack([demo.swap(*clips, [i]) for i in range(8)])[:, 0].astype(int)  # the first frame
    change = np.abs(swapped - clips[0].reconstruction[0]).max(axis=(1, 2, 3))
    position = change.argmax()
    assert change[position] > 20
    with demo_page.served(demo) as address, sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        requests, broken = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))

        def pixels(place, number=0):
            return np.asarray(page.evaluate(PIXELS, [place, number]), int)

        def drop(place, path):
            page.set_input_files(f"{place} input[type=file]", path)

        page.goto(address)
        page.wait_for_selector("#video input[type=file]", state="attached")
        drop("#video", str(bad))
        line = page.wait_for_selector("#reconstruction .problem").inner_text()
        assert line.startswith("bad.mp4: cannot be read as video") and "\n" not in line
        page.click("#video [aria-label=Clear]")
        page.wait_for_selector("#video input[type=file]", state="attached")

        drop("#video", first)
        page.wait_for_function("document.querySelectorAll('#reconstruction video')[1]?.readyState >= 2")
        before = pixels("#reconstruction", 1)
        page.wait_for_function("document.querySelectorAll('#reconstruction video')[1].currentTime > 0.45")
        assert np.abs(pixels("#reconstruction", 1) - before).max() > 20  # it moves
        assert "first.mp4, clip 1 of 3" in page.inner_text("#reconstruction")

        assert page.locator("#codes [data-position]").count() == 8
        page.click("#codes [data-position='6']")
        page.wait_for_function("document.querySelectorAll('#map video')[1]?.readyState >= 2")
        assert page.locator("#codes .chosen").get_attribute("data-position") == "6"
        page.click("#codes [data-position='2']")
        page.wait_for_function("document.querySelector('#map').innerText.includes('position 2 acts')")

        drop("#second", second)
        page.wait_for_function("document.querySelectorAll('#swapped video')[2]?.readyState >= 2")
        page.fill("#positions textarea, #positions input", str(position))
        page.click("#swap")
        page.wait_for_function("document.querySelector('#swapped').innerText.includes('1 of 8')")
        page.wait_for_function("document.querySelectorAll('#swapped video')[2]?.readyState >= 2")
        page.evaluate("for (const video of document.querySelectorAll('#swapped video')) video.pause()")
        page.evaluate("for (const video of document.querySelectorAll('#swapped video')) video.currentTime = 0.05")
        page.wait_for_function("[...document.querySelectorAll('#swapped video')].every((video) => !video.seeking)")
        assert np.abs(pixels("#swapped", 2) - pixels("#swapped", 0)).max() > 10  # the picture changed

        page.fill("#number input[type=number]", "2")
        page.press("#number input[type=number]", "Enter")
        page.wait_for_function("document.querySelector('#reconstruction').innerText.includes('clip 2 of 3')")

        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not broken
        assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        browser.close()
