"""Prints the tables of docs/streaming.md on pictures and actions, and draws samples.

    python docs/actions_table.py people runs/actions runs/mixed_generator runs/actions_probe.npz docs/actions.png

`people` has the folders `train` and `test`, each with a folder of videos for each action, named by the person. The
first frames are those of the test videos. A probe that does not exist is trained on real clips of `people/train`.
LPIPS needs its weights, see `larp-jax doctor`.
"""

import pathlib
import sys

import jax
import numpy as np
from flax import nnx

import larp_jax
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs
from larp_jax.data.video import frame_grid, write_png
from larp_jax.evaluation.probe import ClipProbe, train_probe
from larp_jax.models.pixels import to_uint8
from larp_jax.weights import networks

WINDOWS, BATCH, PROBE_STEPS = 4, 32, 150
SAMPLING = {"cfg_scale": 4.0, "top_k": 8}
COMPARED = (5, 8, 11, 14)  # generated frames that are compared with given ones


def read(people: str, split: str, clip: ClipSpec):
    """Clips [M, T, H, W, 3] of the videos of a split, their actions [M] and people [M], and the names of actions."""
    inputs = Inputs(f"folder:{people}/{split}", clip, windows=WINDOWS)
    rows, clips = zip(*inputs.batches(1), strict=True)
    rows = [row for (row,) in rows]
    names = np.array([pathlib.PurePosixPath(inputs.videos[row.video].name).stem for row in rows])
    return np.concatenate(clips), np.array([row.label for row in rows]), names, inputs.label_names


def share(right: np.ndarray) -> str:
    """A share with its count and the 95% interval of Wilson (1927), as if all were independent."""
    n, k, z = len(right), int(np.sum(right)), 1.96
    center, spread = (k + z * z / 2) / (n + z * z), z * np.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return f"{k} of {n} = {k / n:.0%} ({center - spread:.0%} to {center + spread:.0%})"


def embedding():
    """A function of frames [B, H, W, 3]: vectors [B, D] whose squared distances are LPIPS."""
    graphdef, params = nnx.split(networks.load_lpips(None))

    @jax.jit
    def embed(params, frames):
        network, parts = nnx.merge(graphdef, params), []
        for stage, x in enumerate(network.features(frames), 1):
            weights = getattr(network, f"head{stage}")[...]
            parts.append((x * np.sqrt(1 / (x.shape[1] * x.shape[2])) * weights**0.5).reshape(len(x), -1))
        return jax.numpy.concatenate(parts, axis=1)

    return lambda frames: np.concatenate(
        [np.asarray(embed(params, np.resize(x, (BATCH, *x.shape[1:]))))[: len(x)]
         for x in np.split(frames, range(BATCH, len(frames), BATCH))]
    )  # fmt: skip


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [M, M'] of vectors [M, D] and [M', D]."""
    return np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T


def main(people: str, checkpoint: str, generator_checkpoint: str, probe_file: str, picture: str, split="test") -> None:
    """Prints the tables and writes the picture."""
    tokenizer, generator = larp_jax.load_tokenizer(checkpoint), larp_jax.load_generator(generator_checkpoint)
    config = tokenizer.config
    clip = ClipSpec.of(config.clip_shape, fps=tokenizer.fps, stride=tokenizer.stride)
    clips, actions, persons, names = read(people, split, clip)
    if pathlib.Path(probe_file).exists():
        probe = ClipProbe.load(probe_file, clip.shape, len(names))
    else:
        probe = train_probe(f"folder:{people}/train", clip, len(names), steps=PROBE_STEPS)
        probe.save(probe_file)

    size = config.frames // config.blocks
    held = clips[:, np.maximum(np.arange(config.frames) - size + 1, 0)]  # the first frame as the first block
    whole = np.asarray(tokenizer.reconstruct(held))
    codes, lengths = tokenizer.encode_frames(clips[:, :1])
    videos = []  # [action][clip, T, H, W, 3]
    for action, name in enumerate(names):
        classes, key = np.full(len(clips), generator.class_names.index(name)), jax.random.key(action)
        found = generator.sample(classes, frames=(codes, lengths), key=key, **SAMPLING)
        videos.append(np.asarray(tokenizer.decode(*found)))
    print("| clips | action seen by the probe |\n|---|---|")
    for name, shown in (("real", clips), ("real, after a picture", held), ("these reconstructed", whole)):
        print(f"| {name} | {share(probe.measure(shown)[1] == actions)} |")
    seen = np.stack([probe.measure(video)[1] for video in videos])  # [asked action, clip]
    asked = np.arange(len(names))[:, None]
    own = asked == actions
    print(f"| sampled, action of the picture's video | {share((seen == asked)[own])} |")
    print(f"| sampled, another action | {share((seen == asked)[~own])} |\n")
    for action, name in enumerate(names):
        by_person = [share((seen[action] == action)[(persons == p) & own[action]]) for p in np.unique(persons)]
        counts = [np.bincount(seen[action][actions == other], minlength=len(names)) for other in range(len(names))]
        print(f"{name}: {'; '.join(by_person)}; seen, by the action of the picture: {np.stack(counts).tolist()}")
    identity(tokenizer, read(people, "train", clip), (whole[:, 0], actions, persons), whole, videos)

    shown = [np.flatnonzero((persons == p) & (actions == a))[0] for p in np.unique(persons) for a in range(len(names))]
    frames = [0, *range(size, config.frames, 2)]
    rows = [to_uint8(videos[actions[i]][i])[frames] for i in shown]
    write_png(picture, frame_grid(rows, columns=len(frames)))


def identity(tokenizer, others, given, whole, videos) -> None:
    """Prints how far sampled frames are from the given ones, and these from those of other people, all as decoded."""
    embed, (pictures, actions, persons) = embedding(), given
    theirs, their_actions, their_persons, _ = others
    first = np.repeat(theirs[:, :1], tokenizer.config.frames, axis=1)
    first = np.concatenate([np.asarray(tokenizer.reconstruct(x))[:, 0] for x in np.split(first, len(first) // 4)])
    references = embed(np.concatenate([pictures, first]))
    action, person = np.concatenate([actions, their_actions]), np.concatenate([persons, their_persons])
    count, people = len(pictures), np.unique(person)
    between = distances(references[:count], references)
    other = (actions[:, None] == action) & (persons[:, None] != person)

    def measure(video):
        far = np.mean([distances(embed(video[:, t]), references) for t in COMPARED], axis=0)  # [clip, reference]
        means = np.stack([far[:, person == p].mean(axis=1) for p in people])
        return far[np.arange(count), np.arange(count)], people[means.argmin(axis=0)] == persons

    real_far, real_nearest = measure(whole)
    far, nearest = (np.stack(parts) for parts in zip(*map(measure, videos), strict=True))
    print("\n| LPIPS of decoded frames | mean |\n|---|---|")
    own = np.arange(len(videos))[:, None] == given[1]
    print(f"| sampled frames, to the given one | {far.mean():.3f} |")
    print(f"| the same, only with the action of the picture's video | {far[own].mean():.3f} |")
    print(f"| later frames of the real clips, to the given one | {real_far.mean():.3f} |")
    print(f"| given frames of two people, same action | {between[other].mean():.3f} |")
    print(f"| the same, only the people of the test videos | {between[:, :count][other[:, :count]].mean():.3f} |")
    below = far < np.array([between[i][other[i]].mean() for i in range(count)])
    print(f"\nnearer to the given frame than other people's are to it on average: {share(below.ravel())}")
    print(f"of {len(people)} people, nearest to the given one: {share(nearest.ravel())}; real {share(real_nearest)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
