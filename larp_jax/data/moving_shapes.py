"""The embedded data set: a textured shape that moves over a textured background, generated on first use through TFDS.

The 16 classes are 4 shapes x 4 motions, so neither a single frame nor the motion alone determines a label. A clip is a
function of (split, number): the same scene on every machine and at every resolution.

The plain variant has no textures, larger shapes and one period for all clips: class, colors, size and phase determine a
clip. Models that train for minutes can learn its shapes and motions.

The busy variant has clips in which nothing moves and clips in which much does: its label is the number of small shapes
that move, each along its own path, over one that does not.
"""

import contextlib
import functools
import io
import itertools
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from larp_jax.data.tfds import tfds_root
from larp_jax.errors import InputError, reason

SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("horizontal", "vertical", "diagonal", "orbit")
LABELS = tuple(f"{shape}_{motion}" for shape, motion in itertools.product(SHAPES, MOTIONS))
RESOLUTIONS = (32, 64, 128)
PLAIN, BUSY = "plain", "busy"
CONFIGS = tuple(f"{variant}{size}" for variant in ("", PLAIN, BUSY) for size in RESOLUTIONS)
MOST_MOVING = 6
BUSY_LABELS = tuple(f"{count}_moving" for count in range(MOST_MOVING + 1))
FRAMES = 24  # 1.5 times the usual clip, so that clips differ in their start
SPLITS = {"train": 2048, "test": 256}
PLAIN_PERIOD, PLAIN_REACH = 16, 0.22  # frames, and share of the frame
SHARD_CLIPS = 64  # per file; TFDS keeps one file in memory, 75 MB at 128


def prepare(config: str, resolution: int) -> str:
    """Generates the data set in $TFDS_DATA_DIR if it does not exist, in seconds (a minute at 128).

    Several processes may call it at once.

    Args:
      config: one of `CONFIGS`. Empty or a variant alone: the smallest size of at least `resolution`, or the largest.
      resolution: the longer side of the clips.

    Returns:
      NAME/CONFIG/VERSION for `TfdsSource`.

    Raises:
      InputError: the config does not exist, or the folder cannot be written.
    """
    if config in ("", PLAIN, BUSY):
        config += str(next((size for size in RESOLUTIONS if size >= resolution), RESOLUTIONS[-1]))
    if config not in CONFIGS:
        raise InputError(f"moving_shapes/{config} does not exist; choose one of {', '.join(CONFIGS)}")
    root = tfds_root()
    name = f"moving_shapes/{config}/{MovingShapes.VERSION}"
    prepared = root / name / "features.json"
    if not prepared.exists():
        try:
            _generate(config, root)
        except (OSError, RuntimeError) as error:
            # Another process may have been faster: its folder blocks ours, and is identical.
            if not prepared.exists():
                raise InputError(
                    f"cannot write moving_shapes to {root} ({reason(error)}); set TFDS_DATA_DIR to a folder with enough"
                    " space"
                ) from error
    return name


def _generate(config: str, root: pathlib.Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    # TFDS announces a download on standard output, and shows two progress bars per split.
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        try:
            MovingShapes(config=config, data_dir=os.fspath(root), file_format="array_record").download_and_prepare()
        finally:
            tfds.enable_progress_bar()


class MovingShapes(tfds.core.ShardBasedBuilder):
    """TFDS builder: `video` uint8 [24, S, S, 3], `label` one of 16 (or 7); the config is S, plainS or busyS.

    It writes shard by shard. A `GeneratorBasedBuilder` would keep a whole split in memory, or, above 1 GiB (888 clips
    at 128), in temporary files that need TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CONFIGS]
    # Nothing is downloaded, so there are no checksums next to the code. To search for them, TFDS 4.9.10 would need
    # importlib_resources, which it does not install.
    code_path = None

    def _info(self):
        variant, size = _variant(self.builder_config.name)
        # Without encoding="bytes", TFDS stores uint8 tensors as lists of varints, which take 4 ms to parse.
        video = tfds.features.Tensor(shape=(FRAMES, size, size, 3), dtype=np.uint8, encoding="bytes")
        names = BUSY_LABELS if variant == BUSY else LABELS
        features = {"video": video, "label": tfds.features.ClassLabel(names=names)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _shard_iterators_per_split(self, dl_manager):
        return {
            split: [functools.partial(self._clips, split, start) for start in range(0, count, SHARD_CLIPS)]
            for split, count in SPLITS.items()
        }

    def _clips(self, split, start):
        config, count = self.builder_config.name, SPLITS[split]
        variant, size = _variant(config)
        draw = {"": render, PLAIN: render_plain, BUSY: render_busy}[variant]
        numbers = range(start, min(start + SHARD_CLIPS, count))
        what = f"generating moving_shapes/{config} {split}"
        with tqdm(numbers, desc=what, total=count, initial=start, unit="clip", leave=numbers.stop == count) as progress:
            for number in progress:
                video, label = draw(split, number, size)
                yield number, {"video": video, "label": label}


def _variant(config: str) -> tuple[str, int]:
    """The variant and the size of a config."""
    variant = config.rstrip("0123456789")
    return variant, int(config.removeprefix(variant))


def render(split: str, number: int, size: int) -> tuple[np.ndarray, int]:
    """Renders a clip.

    Args:
      split: "train" or "test".
      number: index of the clip; its label is number % 16.
      size: H = W.

    Returns:
      uint8 [24, size, size, 3] and the label.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), number])
    label = number % len(LABELS)
    shape, motion = SHAPES[label // len(MOTIONS)], MOTIONS[label % len(MOTIONS)]
    # Lengths are fractions of the frame, so that the scene is the same at every size.
    hue = rng.random()
    day = rng.random() < 0.5  # a dark shape on a light background, or a light one on a dark background
    background = _background(rng, hue, size, day)
    radius = rng.uniform(0.15, 0.19)
    center_x, center_y = _path(rng, motion)

    box = _Box(center_x, center_y, radius, size)
    dx, dy = box.offsets
    cos, sin = _direction(rng.uniform(-0.2, 0.2))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    alpha = _opacity(_distance(shape, u, v) * np.float32(radius * size))

    opposite = hue + 0.5 + rng.uniform(-0.08, 0.08)
    if day:
        light, dark = _color(opposite, 0.9, 0.5), _color(opposite + 0.08, 0.9, 0.2)
    else:
        light, dark = _color(opposite, 0.45, 1.0), _color(opposite + 0.08, 0.9, 0.75)
    cos, sin = _direction(rng.uniform(0, np.pi))
    stripes = 0.5 + 0.5 * np.sin(np.float32(rng.uniform(4, 6)) * (cos * u + sin * v))[..., None]
    video = box.paste(np.repeat(background[None], FRAMES, axis=0), dark + stripes * (light - dark), alpha)
    return (video * 255 + 0.5).astype(np.uint8), label


class _Box:
    """The part of each frame around a shape, [T, 2 * half, 2 * half] pixels: only these are rendered.

    Centers (x, y), [T] each, and the radius are fractions of the frame, whose side is `size` pixels.
    """

    def __init__(self, center_x: np.ndarray, center_y: np.ndarray, radius: float, size: int):
        self._half = half = int(np.ceil(1.3 * radius * size)) + 1
        self._left, self._top = (np.floor(center * size).astype(int) for center in (center_x, center_y))
        offsets = np.arange(-half, half) + 0.5
        dx = (((self._left[:, None] + offsets) / size - center_x[:, None]) / radius).astype(np.float32)[:, None, :]
        dy = (((self._top[:, None] + offsets) / size - center_y[:, None]) / radius).astype(np.float32)[:, :, None]
        self.offsets = dx, dy  # in radii from the center

    def paste(self, video: np.ndarray, pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """The video [T, S, S, 3] with pixels of this opacity, [T, 2 * half, 2 * half, 3 and 1], over it."""
        half = self._half
        # the border takes the parts of the box that are outside the frame
        video = np.pad(video, ((0, 0), (half, half), (half, half), (0, 0)))
        for frame, y, x, over, opacity in zip(video, self._top, self._left, pixels, alpha, strict=True):
            under = frame[y : y + 2 * half, x : x + 2 * half]
            under += opacity * (over - under)
        return video[:, half:-half, half:-half]


def render_plain(split: str, number: int, size: int) -> tuple[np.ndarray, int]:
    """`render` for the plain variant: one color on another, and a period of 16 frames."""
    rng = np.random.default_rng([len(SPLITS) + list(SPLITS).index(split), number])
    label = number % len(LABELS)
    shape, motion = SHAPES[label // len(MOTIONS)], MOTIONS[label % len(MOTIONS)]
    hue = rng.random()
    day = rng.random() < 0.5
    background = _color(hue, rng.uniform(0.2, 0.6), rng.uniform(0.7, 0.95) if day else rng.uniform(0.2, 0.5))
    color = _color(hue + 0.5 + rng.uniform(-0.08, 0.08), 0.9, 0.3 if day else 0.95)
    radius = rng.uniform(0.2, 0.26)
    angle = 2 * np.pi * (np.arange(FRAMES) / PLAIN_PERIOD + rng.random())
    along_x, along_y = _along(motion, angle, 1)
    pixels = (np.arange(size) + 0.5) / size
    u = ((pixels - 0.5 - PLAIN_REACH * along_x[:, None]) / radius)[:, None, :]
    v = ((pixels - 0.5 - PLAIN_REACH * along_y[:, None]) / radius)[:, :, None]
    alpha = _opacity(_distance(shape, *np.broadcast_arrays(u, v)) * radius * size)
    return ((background + alpha * (color - background)) * 255 + 0.5).astype(np.uint8), label


def render_busy(split: str, number: int, size: int) -> tuple[np.ndarray, int]:
    """`render` for the busy variant; the label is number % 7, of that many shapes that move."""
    rng = np.random.default_rng([2 * len(SPLITS) + list(SPLITS).index(split), number])
    moving = number % len(BUSY_LABELS)
    hue = rng.random()
    background = _color(hue, rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.9))
    video = np.tile(background, (FRAMES, size, size, 1))
    for i in range(moving + 1):
        color = _color(hue + rng.uniform(0.25, 0.75), 0.9, rng.uniform(0.3, 0.95))
        shape, motion = SHAPES[rng.integers(len(SHAPES))], MOTIONS[rng.integers(len(MOTIONS))]
        radius, reach = (rng.uniform(0.16, 0.24), 0.0) if i == 0 else (rng.uniform(0.08, 0.13), rng.uniform(0.15, 0.3))
        angle = 2 * np.pi * (np.arange(FRAMES) / rng.uniform(8, 16) * rng.choice([-1, 1]) + rng.random())
        along_x, along_y = _along(motion, angle, rng.choice([-1, 1]))
        middle_x, middle_y = rng.uniform(0.3, 0.7, size=2)
        box = _Box(middle_x + reach * along_x, middle_y + reach * along_y, radius, size)
        alpha = _opacity(_distance(shape, *np.broadcast_arrays(*box.offsets)) * np.float32(radius * size))
        video = box.paste(video, np.broadcast_to(color, (*alpha.shape[:-1], 3)), alpha)
    return (video * 255 + 0.5).astype(np.uint8), moving


def _opacity(distance: np.ndarray) -> np.ndarray:
    """Opacity [..., 1] by signed distances to the edge in pixels: it changes over one pixel across the edge."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def _direction(angle: float) -> tuple[np.float32, np.float32]:
    return np.float32(np.cos(angle)), np.float32(np.sin(angle))


def _background(rng: np.random.Generator, hue: float, size: int, day: bool) -> np.ndarray:
    """A gradient between four colors near one hue, with waves of brightness: float32 [S, S, 3] in [0, 1]."""
    saturations, values = ((0.15, 0.5), (0.75, 0.95)) if day else ((0.5, 0.9), (0.2, 0.5))
    corners = [
        _color(hue + rng.uniform(-0.12, 0.12), rng.uniform(*saturations), rng.uniform(*values)) for _ in range(4)
    ]
    x = ((np.arange(size) + 0.5) / size)[:, None]
    y = x[:, None]
    image = (1 - y) * ((1 - x) * corners[0] + x * corners[1]) + y * ((1 - x) * corners[2] + x * corners[3])
    for _ in range(3):
        angle, waves, phase = rng.uniform(0, np.pi), rng.uniform(1, 4), rng.uniform(0, 2 * np.pi)
        image *= 1 + 0.12 * np.sin(2 * np.pi * waves * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    return np.minimum(image, 1.0).astype(np.float32)


def _path(rng: np.random.Generator, motion: str) -> tuple[np.ndarray, np.ndarray]:
    """Centers (x, y) of the shape, [T] each: an oscillation or a circle with a period of 14 to 20 frames."""
    angle = 2 * np.pi * (np.arange(FRAMES) / rng.uniform(14, 20) * rng.choice([-1, 1]) + rng.random())
    reach = rng.uniform(0.2, 0.26)
    middle_x, middle_y = rng.uniform(0.45, 0.55, size=2)
    along_x, along_y = _along(motion, angle, rng.choice([-1, 1]))
    return middle_x + reach * along_x, middle_y + reach * along_y


def _along(motion: str, angle: np.ndarray, slope: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (x, y) from the middle, [T] each in [-1, 1]; `slope` is that of the diagonal."""
    return {
        "horizontal": (np.sin(angle), np.zeros(FRAMES)),
        "vertical": (np.zeros(FRAMES), np.sin(angle)),
        "diagonal": (np.sin(angle), np.sin(angle) * slope),
        "orbit": (np.sin(angle), np.cos(angle)),
    }[motion]


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of the shape (about 1 in size), negative inside."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == "triangle":  # point up, in a circle of radius 1.2
        return np.maximum(np.abs(u) * np.sqrt(np.float32(0.75)) - v / 2, v) - 0.6
    narrow, wide = 0.38, 1.05
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - wide, v - narrow), np.maximum(u - narrow, v - wide))


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV, each in [0, 1] (hue in turns), to float32 RGB [3]."""
    turn = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return (value * (1 - saturation + saturation * np.clip(turn, 0, 1))).astype(np.float32)
