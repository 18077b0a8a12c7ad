"""Plots the curves of several runs from their metrics.jsonl. Needs matplotlib (`pip install -e '.[docs]'`).

    python docs/plot_curves.py docs/curves.png with=runs/a without=runs/b
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {  # title: {scalar: label}; training scalars are lines, evaluation scalars have markers
    "reconstruction loss": {"train/loss_reconstruction": ""},
    "PSNR (dB)": {"train/psnr": "training batch", "eval/psnr": "unseen people"},
    "quantizer loss": {"train/loss_quantizer": ""},
    "codes in use": {"train/usage_batch": "training batch", "eval/usage": "unseen people"},
    "prior: cross-entropy (nats)": {"train/loss_prior": ""},
    "prior: accuracy": {"train/prior_top1": "top 1", "train/prior_top5": "top 5"},
    "adversarial loss of the tokenizer": {"train/loss_adversarial": ""},
    "logits of the discriminator": {"train/logits_real": "real", "train/logits_fake": "reconstruction"},
}


def read(workdir: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by scalar; if a step occurs twice, the later line counts."""
    curves = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if "/" in name and value is not None:
                curves.setdefault(name, {})[row["step"]] = value
    return {name: sorted(values.items()) for name, values in curves.items()}


def main(output: str, *runs: str) -> None:
    """Plots `LABEL=WORKDIR` runs into one figure; panels that no run has values for are left out."""
    labels, workdirs = zip(*(run.split("=", 1) for run in runs), strict=True)
    curves = [read(workdir) for workdir in workdirs]
    panels = {title: names for title, names in PANELS.items() if any(name in run for run in curves for name in names)}
    columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, scalars) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title)
        axis.set_xlabel("step")
        for color, label, run in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], labels, curves, strict=False):
            for number, (name, what) in enumerate(scalars.items()):
                if name in run:
                    steps, values = zip(*run[name], strict=True)
                    style = {"marker": "o"} if name.startswith("eval/") else {"linestyle": ("-", ":")[number % 2]}
                    axis.plot(steps, values, color=color, label=", ".join(filter(None, (label, what))), **style)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
