"""Writes setup.json and io.npz: features of tiny networks by transformers, settings and parameter counts of large ones.

Run once, from the root of the repository, in an environment of this package with transformers 5.24.0 and torch 2.13.0:

    PYTHONPATH=tests python tests/reference/teachers/make.py

setup.json holds, for each case, config.json and the names and shapes of the tensors in model.safetensors, both as
transformers writes them; the values are those of `network_weights.fill`. io.npz holds clips [B, T, H, W, 3] in uint8,
and the last hidden state (after the final norm) and the output of the second block as [B, t, h, w, C].
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from network_weights import fill
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
DINO = TINY | {"hidden_size": 24}
PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
PREDICTOR |= {"pred_num_mask_tokens": 1}
DECODER = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
DECODER |= {"decoder_intermediate_size": 48}

# Per case: class, configuration, and shapes [B, T, H, W] of clips; the first fits the position table.
CASES = {
    "vjepa2": (
        "VJEPA2Model",
        TINY | PREDICTOR | {"crop_size": 12, "frames_per_clip": 4},
        [(2, 6, 12, 12), (2, 1, 12, 12)],
    ),
    "videomae": (
        "VideoMAEForPreTraining",
        TINY | DECODER | {"intermediate_size": 80, "image_size": 12, "num_frames": 4, "use_mean_pooling": False},
        [(2, 4, 12, 12)],
    ),
    "dinov2": ("Dinov2Model", DINO | {"image_size": 20}, [(1, 2, 20, 20), (2, 1, 12, 28)]),
    "dinov2_reg": (
        "Dinov2WithRegistersModel",
        DINO | {"image_size": 20, "num_register_tokens": 3},
        [(1, 2, 20, 20), (2, 1, 12, 28)],
    ),
    "dinov3": (
        "DINOv3ViTModel",
        DINO | {"intermediate_size": 80, "num_register_tokens": 2, "image_size": 12},
        [(1, 2, 12, 12), (2, 1, 8, 20)],
    ),
}

# Full sizes: class and configuration.
FULL = {}
for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16), ("h", 1280, 32, 16)):
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    if size in "lh":
        FULL[f"vjepa2_{size}"] = ("VJEPA2Model", sizes)
    if size in "bl":
        more = {"intermediate_size": 4 * width, "use_mean_pooling": False}
        FULL[f"videomae_{size}"] = ("VideoMAEModel", sizes | more)
    if size != "h":
        FULL[f"dinov2_{size}"] = ("Dinov2Model", sizes | {"image_size": 518, "patch_size": 14})
        FULL[f"dinov2_{size}_reg"] = ("Dinov2WithRegistersModel", sizes | {"image_size": 518, "patch_size": 14})
        FULL[f"dinov3_{size}"] = ("DINOv3ViTModel", sizes | {"intermediate_size": 4 * width, "num_register_tokens": 4})
FULL["vjepa2_g"] = (
    "VJEPA2Model",
    {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22, "mlp_ratio": 48 / 11},
)


def build(kind: str, values: dict):
    kind = getattr(transformers, kind)
    return kind(kind.config_class(**values, attn_implementation="eager"))


def case(name: str, kind: str, values: dict, shapes: list) -> tuple[dict, dict]:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        build(kind, values).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "np") as file:
            tensors = {x: file.get_slice(x).get_shape() for x in file.keys()}
        save_file(fill(tensors, 71), folder / "model.safetensors", {"format": "pt"})
        whole = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
    model = getattr(whole, "videomae", whole)
    arrays = {}
    for number, (batch, frames, height, width) in enumerate(shapes):
        video = np.random.default_rng(number).integers(0, 256, (batch, frames, height, width, 3), np.uint8)
        arrays[f"{name}/{number}/video"] = video
        pixels = ((torch.from_numpy(video) / 255.0 - MEAN) / DEVIATION).permute(0, 1, 4, 2, 3)
        per_frame = name.startswith("dino")
        options = {"skip_predictor": True} if name == "vjepa2" else {}
        with torch.no_grad():
            found = model(pixels.flatten(0, 1) if per_frame else pixels, output_hidden_states=True, **options)
        grid = (-1, height // 4, width // 4)
        for key, x in {"final": found.last_hidden_state, "block2": found.hidden_states[2]}.items():
            x = x[:, -(height // 4) * (width // 4) :] if per_frame else x
            arrays[f"{name}/{number}/{key}"] = x.reshape(batch, *grid, x.shape[-1]).numpy()
    return {"config": config, "tensors": tensors}, arrays


def full(kind: str, values: dict) -> dict:
    with torch.device("meta"):
        model = build(kind, values)
    count = sum(x.numel() for name, x in model.named_parameters() if not name.startswith("predictor."))
    settings = {name: x for name, x in model.config.to_dict().items() if isinstance(x, int | float | str)}
    return {"config": settings, "parameters": count}


def main() -> None:
    torch.manual_seed(0)
    setup = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}, "cases": {}}
    io = {}
    for name, arguments in CASES.items():
        setup["cases"][name], arrays = case(name, *arguments)
        io |= arrays
    setup["full"] = {name: full(*arguments) for name, arguments in FULL.items()}
    (HERE / "setup.json").write_text(json.dumps(setup, indent=1))
    np.savez_compressed(HERE / "io.npz", **io)


if __name__ == "__main__":
    main()
