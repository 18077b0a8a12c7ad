"""Prints the table of docs/adaptive.md: a router's choices against the best uniform numbers of codes, at equal PSNR.

    python docs/adaptive_table.py runs/adaptive runs/adaptive_router runs/adaptive_rewards_test docs/adaptive_clips.png

The clips and the PSNR of every assignment are those of the rewards, of clips that no stage has trained on. Writes a
picture of the clips with the fewest and the most codes, each above its reconstruction.
"""

import sys

import numpy as np
from scipy.stats import spearmanr

import larp_jax
from larp_jax.data.rewards import RewardSet
from larp_jax.data.video import frame_grid, write_png
from larp_jax.evaluation.router import scores
from larp_jax.models.pixels import to_uint8

BATCH, SHOWN = 64, 2


def main(checkpoint: str, router: str, directory: str, picture: str) -> None:
    """Prints the table and writes the picture."""
    tokenizer, clips = larp_jax.load_tokenizer(checkpoint, router=router), RewardSet(directory)
    rows, batches = clips.eval_batches(batch_size=BATCH)
    with batches:
        video = np.concatenate([batch["video"] for batch in batches])[: len(rows)]
    lengths = np.concatenate(
        [tokenizer.assign(np.resize(part, (BATCH, *part.shape[1:])), "auto")[: len(part)]
         for part in np.split(video, range(BATCH, len(video), BATCH))]
    )  # fmt: skip
    assignments = list(clips.ladder.assignments)
    chosen = np.array([assignments.index(tuple(row.tolist())) for row in lengths])
    codes = lengths.sum(axis=1)

    for name, values in clips.values.items():
        uniform = [(sum(x), float(values[:, assignments.index(x)].mean())) for x in clips.ladder.uniform]
        own = float(values[np.arange(len(rows)), chosen].mean())
        print(f"| budget | mean codes | {name} |\n|---|---|---|")
        for total, quality in uniform:
            print(f"| {total} | {total} | {quality:.3f} |")
        print(f"| auto | {codes.mean():.1f} | {own:.3f} |")
        totals, qualities = zip(*sorted(uniform, key=lambda pair: pair[1]), strict=True)
        fixed = int(clips.rewards.mean(axis=0).argmax())  # the same for all clips
        for what, count, quality in (
            ("auto", codes.mean(), own),
            (f"{','.join(map(str, assignments[fixed]))} for all", sum(assignments[fixed]), values[:, fixed].mean()),
        ):
            same = float(np.interp(quality, qualities, totals))  # between two uniform assignments
            print(f"\nuniform codes at the {name} of {what}: {same:.1f}; it has {1 - count / same:.1%} fewer")

    motion = np.abs(np.diff(video.astype(np.float32), axis=1)).mean(axis=(1, 2, 3, 4))
    correlation = f"{spearmanr(codes, motion).statistic:.3f}" if np.ptp(codes) else "all clips have the same codes"
    print(f"\nrank correlation of codes and motion: {correlation}")
    labels = np.array([clips.manifest["rows"][row]["label"] for row in rows])
    print("mean codes by label:", *(f"{label}: {codes[labels == label].mean():.1f}" for label in np.unique(labels)))
    for name, value in scores(clips, rows, chosen).items():
        print(f"{name}: {value:.4f}")

    order = np.argsort(codes, kind="stable")
    extremes = [*order[:SHOWN], *order[-SHOWN:]]
    decoded = to_uint8(np.asarray(tokenizer.reconstruct(video[extremes], budget=lengths[extremes])))
    write_png(picture, frame_grid([x for pair in zip(video[extremes], decoded, strict=True) for x in pair]))
    print("codes by block in the picture:", lengths[extremes].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
