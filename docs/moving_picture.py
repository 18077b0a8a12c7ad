"""Creates docs/moving.webp from a quickstart run and a generator trained on its codes. Needs pillow (extra `docs`).

    bash launch/quickstart.sh
    larp-jax tokenize --checkpoint runs/quickstart --input moving_shapes/plain:train --output runs/quickstart_codes \
        --windows 4 --flips
    larp-jax train --config configs/generator_quickstart.py --workdir runs/quickstart_generator
    python docs/moving_picture.py runs/quickstart runs/quickstart_generator docs/moving.webp
"""

import sys

import jax
import numpy as np
from PIL import Image, ImageDraw

import larp_jax
from larp_jax.data import ClipSpec, open_source

COLUMNS, SCALE, GAP, LEFT = 8, 4, 4, 104
MILLISECONDS = 125
CLIPS = range(0, 2 * COLUMNS, 2)  # classes alternate in the data set: two motions of each of the four shapes
SAMPLING = {"cfg_scale": 2.0, "temperature": 0.7, "key": jax.random.key(0)}


def main(tokenizer_path: str, generator_path: str, output: str) -> None:
    """Writes an animation: rows of held-out clips, their reconstructions, and samples of the same classes."""
    tokenizer, generator = larp_jax.load_tokenizer(tokenizer_path), larp_jax.load_generator(generator_path)
    frames, size, *_ = tokenizer.config.clip_shape
    spec = ClipSpec.of(tokenizer.config.clip_shape)
    source = open_source("moving_shapes/plain:test", spec)
    clips, classes = zip(*(source.read_clip(index, 0, spec) for index in CLIPS), strict=True)
    clips = np.stack(clips)
    sampled = tokenizer.decode(generator.sample(classes=classes, **SAMPLING))
    videos = [np.asarray(video) * 255 for video in (tokenizer.reconstruct(clips), sampled)]
    rows = {"held-out": clips, "reconstructed": videos[0], "sampled": videos[1]}
    images = [image({name: row[:, frame] for name, row in rows.items()}, size * SCALE) for frame in range(frames)]
    # forward and back, so that the loop has no jump
    images += images[-2:0:-1]
    first, *others = images
    first.save(output, save_all=True, append_images=others, duration=MILLISECONDS, loop=0, quality=75, method=6)


def image(rows: dict[str, np.ndarray], side: int) -> Image.Image:
    """One frame of the animation: a labeled row of images [columns, H, W, 3] in [0, 255] for each name."""
    step = side + GAP
    canvas = Image.new("RGB", (LEFT + COLUMNS * step, len(rows) * step - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (name, images) in enumerate(rows.items()):
        draw.text((4, y * step + side // 2), name, fill="black", anchor="lm", font_size=14)
        for x, pixels in enumerate(images):
            tile = Image.fromarray(np.asarray(pixels).round().astype(np.uint8))
            canvas.paste(tile.resize((side, side), Image.Resampling.BICUBIC), (LEFT + x * step, y * step))
    return canvas


if __name__ == "__main__":
    main(*sys.argv[1:])
