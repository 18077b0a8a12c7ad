"""The page of `larp-jax demo`: a local Gradio app around `larp_jax.tools.demo`.

Everything that the page shows comes from this process: pictures and clips are data URIs, fonts are those of the system.
"""

import contextlib
import errno
import functools
import html
import importlib.util
import logging
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from larp_jax.data.inputs import playable_fps
from larp_jax.data.video import encode_png, frame_grid, write_video
from larp_jax.errors import InputError, reason
from larp_jax.tools import charts
from larp_jax.tools.demo import FILL, MOST_FRAMES, SAMPLES, Clip, Demo, Maps, read_positions

logger = logging.getLogger(__name__)

SIDE = 256  # clips on the page have at least about so many pixels a side, or compression would smear small ones
FIRST_PORT, PORTS = 7860, 100
EMPTY = '<p class="quiet">{}</p>'

# A click on a code marks it and tells Python its position.
CLICK = """
element.addEventListener("click", (event) => {
  const code = event.target.closest("[data-position]");
  if (!code) return;
  for (const other of element.querySelectorAll(".chosen")) other.classList.remove("chosen");
  code.classList.add("chosen");
  trigger("select", {position: Number(code.dataset.position)});
});
"""


# ---------------------------------------------------------------------------------------------------------- fragments


def shown(content: str) -> str:
    """A fragment of the page."""
    return f'<div class="page">{content}</div>'


def problem(error: Exception) -> str:
    """What the page says about an error, in one line."""
    expected = isinstance(error, (ValueError, OSError))  # `InputError` is a ValueError
    said = reason(error) if expected else f"{type(error).__name__}: {reason(error)}"
    return shown(f'<p class="problem">{html.escape(said)}</p>')


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels with their values."""
    rows = (f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>" for label, value in pairs)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def video_uri(frames: np.ndarray, fps: float) -> str:
    """uint8 [T, H, W, 3] as a video that browsers play; small frames are enlarged, each pixel to a square."""
    times = max(1, SIDE // frames.shape[1])
    frames = frames.repeat(times, axis=1).repeat(times, axis=2)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        write_video(path, frames, fps)
        return charts.data_uri("video/mp4", path.read_bytes())


def image_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a PNG."""
    return charts.data_uri("image/png", encode_png(image))


def clips(named: Sequence[tuple[str, np.ndarray]], fps: float) -> str:
    """Clips beside each other, which play together, each uint8 [T, H, W, 3] with the text below it."""
    players = (
        (name, f'<video src="{video_uri(frames, fps)}" muted playsinline preload="auto"></video>')
        for name, frames in named
    )
    return figures(list(players), named[0][1].shape[1:3])


def figures(named: Sequence[tuple[str, str]], size: tuple[int, int]) -> str:
    """Images or players of one size (height, width) beside each other, each with the text below it."""
    cells = (f"<figure>{item}<figcaption>{html.escape(name)}</figcaption></figure>" for name, item in named)
    many = " many" if len(named) > 3 else ""
    style = f"--clips: {len(named)}; --ratio: {size[1]} / {size[0]}"
    return f'<div class="clips{many}" style="{style}">{"".join(cells)}</div>'


def beside(left: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Facts to the right of a fragment, or below it on a narrow screen."""
    return f'<div class="beside"><div>{left}</div>{facts(pairs)}</div>'


def reconstruction(clip: Clip, codebook_size: int) -> str:
    """A clip beside its reconstruction; a codebook of 0 codes is none."""
    count = len(clip.codes)
    numbers = [("PSNR", f"{clip.psnr:.2f} dB"), ("codes" if codebook_size else "latents", str(count))]
    if clip.lengths is not None:
        numbers.append(("by block of frames", ", ".join(map(str, clip.lengths))))
    if codebook_size:
        bits = count * np.log2(codebook_size)
        numbers += [("bits", f"{bits:,.0f}"), ("compression", f"{clip.video.nbytes * 8 / bits:,.0f} : 1")]
    else:
        numbers.append(("floats", f"{clip.codes.size:,}"))
    pair = [("original", clip.video), ("reconstruction", clip.reconstruction)]
    said = f"{clip.name}, clip {clip.number + 1} of {clip.count}" if clip.count > 1 else clip.name
    return shown(f'<p class="quiet">{html.escape(said)}</p>' + beside(clips(pair, clip.fps), numbers))


def code_grid(clip: Clip, maps: Maps | None = None, chosen: int = -1) -> str:
    """The codes of a clip, or the positions of its latents, as buttons, each with a small map if there are maps."""
    cells, count = [], len(clip.codes)
    style = ""
    if maps is not None:
        tiles = maps.tiles()
        sprite = image_uri(np.concatenate(list(tiles), axis=1))
        height, width = tiles.shape[1:3]
        style = f".codes i{{background-image:url({sprite});background-size:{100 * count}% 100%;"
        style += f"aspect-ratio:{width} / {height}}}"
    for position in range(count):
        tile, code = "", code_at(clip, position)
        if maps is not None:
            tile = f'<i style="background-position:{100 * position / max(1, count - 1):.4f}% 0"></i>'
        mark = ' class="chosen"' if position == chosen else ""
        label, number = (f", code {code}", f"<b>{code}</b>") if code else ("", "")
        cells.append(
            f'<button data-position="{position}"{mark} aria-label="position {position}{label}">{tile}'
            f"<small>{position}</small>{number}</button>"
        )
    return shown(f'<style>{style}</style><div class="codes">{"".join(cells)}</div>')


def code_at(clip: Clip, position: int) -> str:
    """The code of a position; empty for latents."""
    return str(clip.codes[position]) if clip.codes.ndim == 1 else ""


def position_map(clip: Clip, maps: Maps, position: int) -> str:
    """Where one code or latent acts: its map over the reconstruction, as a clip and frame by frame."""
    over, found = maps.over(clip.reconstruction, position), maps.facts(position)
    if found["change"] > 0:
        numbers = [("of the frame", f"{found['space']:.0%}"), ("of the frames", f"{found['time']:.0%}")]
    else:
        numbers = [("change", "none")]
    code = code_at(clip, position)
    numbers = [("position", str(position)), *([("code", code)] if code else []), *numbers]
    strip = frame_grid([over], columns=8, gap=1).repeat(2, axis=0).repeat(2, axis=1)
    strip = f'<img class="strip" alt="the map from the first frame to the last" src="{image_uri(strip)}">'
    pair = [("reconstruction", clip.reconstruction), (f"where position {position} acts", over)]
    return shown(beside(clips(pair, clip.fps) + strip, numbers))


# --------------------------------------------------------------------------------------------------------------- page


class Page:
    """The app: cards for reconstruction, codes, swapping and, with a generator, samples.

    Args:
      gradio: the module.
      demo: what the page computes with.

    Attributes:
      app: a `gradio.Blocks`, not yet launched.
    """

    def __init__(self, gradio: Any, demo: Demo):
        self._gr, self._demo = gradio, demo
        quantizer = demo.tokenizer.config.quantizer
        self._size, self._name = quantizer.codes, quantizer.tokens.removesuffix("s")
        with gradio.Blocks(title="larp_jax demo", analytics_enabled=False) as self.app:
            gradio.HTML(self._head(), apply_default_css=False)
            clip, maps = gradio.State(), gradio.State()
            read = self._video_card(clip)
            grid, picture = self._codes_card(clip, maps)
            read(lambda clip: (code_grid(clip) if clip else "", "", None), [clip], [grid, picture, maps])
            self._swap_card(clip)
            if demo.generator is not None:
                self._sample_card()

    def _head(self) -> str:
        config, step = self._demo.tokenizer.config, self._demo.tokenizer.step
        frames, height, width, _ = config.clip_shape
        numbers = [
            ("clip", f"{frames} × {height} × {width}"),
            (f"{self._name}s", f"up to {config.num_tokens}" if config.adaptive else str(config.num_tokens)),
            ("codebook", f"{self._size:,}") if self._size else ("channels", str(config.quantizer.code_dim)),
        ]
        numbers += [("step", f"{step:,}")] if step else []
        return shown(
            f'<p class="kind">larp_jax demo</p><h1>Videos as {self._name}s</h1>'
            '<p class="quiet">Videos stay on the computer that runs this page.</p>' + facts(numbers)
        )

    def _title(self, title: str, text: str) -> None:
        self._gr.HTML(shown(f'<h2>{title}</h2><p class="quiet">{text}</p>'), apply_default_css=False)

    def _output(self, name: str, text: str = "", **options: Any) -> Any:
        content = shown(EMPTY.format(text)) if text else ""
        return self._gr.HTML(content, elem_id=name, apply_default_css=False, **options)

    def _video_card(self, clip) -> Callable:
        """The card of the video, which writes the state `clip`; returns what registers steps after a new clip."""
        gr, demo = self._gr, self._demo
        with gr.Column(elem_classes="card"):
            text = f"The video is encoded to {self._name}s, and decoded from the {self._name}s alone."
            self._title("Reconstruct", text)
            file = gr.File(label="Drop a video or a picture", elem_id="video", height=120)
            with gr.Row():
                number = gr.Slider(1, 2, value=1, step=1, label="Clip of the video", visible=False, elem_id="number")
                budget = gr.Dropdown(
                    demo.budgets or [""],
                    value=demo.budgets[-1] if demo.budgets else "",
                    label="Budget: number of codes",
                    info=f"or that of each block, such as {','.join(map(str, demo.smallest))}; or greedy:30 for 30 dB",
                    allow_custom_value=True,
                    visible=bool(demo.budgets),
                    elem_id="budget",
                )
            output = self._output("reconstruction", "The video appears here, beside its reconstruction.")

        def read(path, number, budget):
            if path is None:
                return None, "", gr.Slider(visible=False)
            found = demo.read(path, int(number) - 1, budget)
            slider = gr.Slider(maximum=max(2, found.count), value=int(number), visible=found.count > 1)
            return found, reconstruction(found, self._size), slider

        def failed(error):
            return None, problem(error), gr.skip()

        outputs, options = [clip, output, number], {"show_progress": "minimal"}
        again = tried(read, failed)
        events = [
            file.change(lambda path, budget: again(path, 1, budget), [file, budget], outputs, **options),
            number.input(again, [file, number, budget], outputs, trigger_mode="always_last", **options),
            budget.input(again, [file, number, budget], outputs, **options),
        ]

        def then(function, inputs, outputs):
            for event in events:
                event.then(function, inputs, outputs, show_progress="hidden")

        return then

    def _codes_card(self, clip, maps) -> tuple[Any, Any]:
        gr, demo, name = self._gr, self._demo, self._name
        with gr.Column(elem_classes="card"):
            self._title(
                f"{name.capitalize()}s, and where each acts",
                f"Each has the number of its position. Choose a {name} to see where the clip changes when it is"
                f" replaced. The map is the mean over four {name}s in its place: {FILL}.",
            )  # fmt: skip
            button = gr.Button(f"Show where each {name} acts", elem_id="act")
            grid = self._output("codes", f"The {name}s of the video appear here.", js_on_load=CLICK)
            picture = self._output("map")

        def show(clip, maps, position):
            if clip is None:
                raise InputError("drop a video first")
            if maps is not None:
                return gr.skip(), position_map(clip, maps, position), maps
            maps = demo.maps(clip)
            if position < 0:
                position = int(maps.patches.mean(axis=(1, 2, 3)).argmax())
            return code_grid(clip, maps, position), position_map(clip, maps, position), maps

        def failed(error):
            return gr.skip(), problem(error), None

        attempt = tried(show, failed)

        def choose(clip, maps, event: gr.EventData):
            return attempt(clip, maps, event.position)

        outputs, options = [grid, picture, maps], {"show_progress": "minimal", "show_progress_on": [picture]}
        button.click(lambda clip: attempt(clip, None, -1), [clip], outputs, **options)
        grid.select(choose, [clip, maps], outputs, **options)
        return grid, picture

    def _swap_card(self, clip) -> None:
        gr, demo, name = self._gr, self._demo, self._name
        count, other = demo.tokenizer.config.num_tokens, gr.State()
        with gr.Column(elem_classes="card"):
            self._title(f"Swap {name}s", f"The video above, decoded with some of the {name}s of a second video.")
            file = gr.File(label="Drop the second video", elem_id="second", height=120)
            positions = gr.Textbox(
                f"0-{max(0, count // 2 - 1)}",
                label="Positions to swap",
                info="positions and ranges, such as 0-15, 20",
                elem_id="positions",
            )
            button = gr.Button("Swap", variant="primary", elem_id="swap")
            output = self._output("swapped", f"Both videos appear here, and the first with {name}s of the second.")

        def read(path):
            return None if path is None else demo.read(path), gr.skip()

        def swap(clip, other, text):
            if clip is None or other is None:
                raise InputError(f"drop a video {'above' if clip is None else 'here'} first")
            chosen = read_positions(text, len(clip.codes))
            mixed = demo.swap(clip, other, chosen)
            changed = np.sqrt(np.mean(np.square(mixed / 255.0 - clip.reconstruction / 255.0)))
            named = {"first": clip.reconstruction, "second": other.reconstruction}
            named[f"first, with {name}s of second"] = mixed
            count = f"{len(chosen)} of {len(clip.codes)}"
            numbers = [(f"{name}s of the second", count), ("RMS change", f"{changed:.1%}")]
            return shown(beside(clips(list(named.items()), clip.fps), numbers))

        swapped = tried(swap, problem)
        loaded = file.change(tried(read, lambda error: (None, problem(error))), [file], [other, output])
        inputs = [clip, other, positions]
        loaded.then(lambda *given: swapped(*given) if given[1] else gr.skip(), inputs, [output])
        for event in (button.click, positions.submit):
            event(swapped, inputs, [output], show_progress="minimal")

    def _sample_card(self) -> None:
        gr, demo = self._gr, self._demo
        config = demo.generator.config
        streams, how = demo.streams, "one after the other" if config.has_codes else "at once"
        with gr.Column(elem_classes="card"):
            text = f"{SAMPLES} clips, or a stream: a video of any length, block after block." if streams else \
                f"{SAMPLES} clips whose {self._name}s the generator draws {how}."  # fmt: skip
            self._title("Sample", text)
            with gr.Row():
                label = gr.Dropdown(
                    demo.classes or [("any", -1)],
                    value=demo.classes[0][1] if demo.classes else -1,
                    label="Class",
                    visible=bool(demo.classes),
                    elem_id="class",
                )
                guidance = gr.Slider(
                    1.0, 4.0, value=1.25, step=0.05, label="Guidance; 1 is none", visible=config.has_null_class
                )
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed")
                frames = gr.Slider(
                    16, MOST_FRAMES, value=64, step=16, label="Frames of a stream", visible=streams, elem_id="frames"
                )
            with gr.Row():
                sample = gr.Button(f"Sample {SAMPLES} clips", variant="primary", elem_id="sample", min_width=200)
                stream = gr.Button("Stream", visible=streams, elem_id="stream", min_width=120)
                stop = gr.Button("Stop", visible=streams, elem_id="stop", min_width=120)
            output = self._output("samples", "Samples appear here.")

        def draw(label, guidance, seed):
            found = demo.sample(label, guidance=guidance, seed=int(seed or 0))
            fps = playable_fps(demo.tokenizer.fps)
            return shown(clips([(f"sample {i}", video) for i, video in enumerate(found)], fps))

        sample.click(tried(draw, problem), [label, guidance, seed], [output], show_progress="minimal")
        if streams:
            playing = functools.partial(played, demo)
            going = stream.click(playing, [label, guidance, seed, frames], [output], show_progress="hidden")
            stop.click(None, cancels=[going])


def tried(function: Callable, failed: Callable[[Exception], Any]) -> Callable:
    """The function, or what `failed` makes of its error."""

    def attempt(*arguments):
        try:
            return function(*arguments)
        except Exception as error:  # a page shows one line for any error, as the command line does
            logger.debug("on the page", exc_info=True)
            return failed(error)

    return attempt


def played(demo: Demo, label: int, guidance: float, seed: int, frames: int) -> Iterator[str]:
    """Fragments that show a stream as it is sampled, no faster than it plays, and at the end all of it."""
    fps, found = playable_fps(demo.tokenizer.fps), []
    due = time.monotonic()
    try:
        for block in demo.stream(label, frames=int(frames), guidance=guidance, seed=int(seed or 0)):
            for frame in block:
                found.append(frame)
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic() - 1 / fps) + 1 / fps
                image = f'<img alt="stream" src="{image_uri(frame)}">'
                yield shown(figures([(f"frame {len(found)}", image)], frame.shape[:2]))
        yield shown(clips([(f"{len(found)} frames", np.stack(found))], fps))
    except Exception as error:  # as in `tried`
        logger.debug("on the page", exc_info=True)
        yield problem(error)


# ------------------------------------------------------------------------------------------------------------- server


def check(host: str, port: int | None) -> None:
    """`InputError` if gradio is not installed, or nothing can listen on this address; before any work."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio, which the extra demo brings: pip install 'larp_jax[demo]'")
    free_port(host, port)


def free_port(host: str, port: int | None) -> int:
    """The port, or the first free one from `FIRST_PORT`; `InputError` if it cannot be listened on at this address."""
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server((host, candidate), family=family):
                return candidate
        except (OSError, OverflowError) as error:
            failed = error
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                break
    raise InputError(
        f"cannot serve on {host}, port {candidate} ({reason(failed)}); name another --host or --port"
    ) from failed


@contextlib.contextmanager
def served(demo: Demo, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves the page in other threads while the block runs; uploads are deleted after it.

    Args:
      demo: what the page computes with.
      host: address to listen on.
      port: its port; the first free one from `FIRST_PORT` by default.

    Yields:
      The address of the page.

    Raises:
      InputError: gradio is missing, or the address cannot be used.
    """
    check(host, port)
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="larp_jax_demo") as folder:
        # read when gradio is imported
        settings = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        os.environ.update(settings)
        import gradio

        app = Page(gradio, demo).app
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            **_look(gradio),
        )
        try:
            yield app.local_url
        finally:
            app.close(verbose=False)


def _look(gradio) -> dict[str, Any]:
    """Arguments of `launch` that give the page the colors of `larp-jax report`, and only fonts of the system."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gradio.themes.Base(
        primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    ).set(
        body_background_fill="var(--ground)",
        body_background_fill_dark="var(--ground)",
        block_background_fill="var(--card)",
        block_background_fill_dark="var(--card)",
        block_border_color="var(--line)",
        block_border_color_dark="var(--line)",
        block_radius="10px",
        button_primary_background_fill="var(--accent)",
        button_primary_background_fill_dark="#2f6fde",
        button_primary_text_color="#fff",
    )
    css, script = ((charts.TEMPLATES / name).read_text("utf-8") for name in ("demo.css", "demo.js"))
    return {"theme": theme, "css": css, "head": f"<script>{script}</script>"}


def serve(demo: Demo, *, host: str = "127.0.0.1", port: int | None = None, stopped: Callable[[], bool]) -> None:
    """Serves the page until `stopped` says so, and prints its address; arguments and errors as for `served`."""
    with served(demo, host=host, port=port) as address:
        print(f"{address} shows the page; Ctrl-C ends it", flush=True)
        wait = threading.Event()
        while not stopped():
            wait.wait(0.2)
