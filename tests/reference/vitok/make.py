"""Writes io.npz beside it. Needs torch, diffusers 0.42 and transformers 5.24; the arrays are in the repository."""

import pathlib

import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

GRID, EXTRA, WIDTH, HEADS = (2, 3, 4), 3, 48, 3

torch.manual_seed(0)
arrays = {}
rotations = {}
for width in (16, 22, 24):
    embed = WanRotaryPosEmbed(width, (1, 1, 1), max(GRID))
    cos, sin = embed(torch.zeros(1, 1, *GRID))
    rotations[width] = cos[0, :, 0], sin[0, :, 0]  # each value twice, for both dimensions of a pair
    arrays[f"angles_{width}"] = torch.atan2(sin, cos)[0, :, 0, ::2]

config = LlamaConfig(hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_attention_heads=HEADS)
norm1, norm2, mlp = LlamaRMSNorm(WIDTH, eps=1e-5), LlamaRMSNorm(WIDTH, eps=1e-5), LlamaMLP(config)
qkv, out = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False), torch.nn.Linear(WIDTH, WIDTH)
parts = {"norm1": norm1, "norm2": norm2, "mlp": mlp, "qkv": qkv, "out": out}
with torch.no_grad():
    for part in parts.values():
        for parameter in part.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape) + (parameter.ndim == 1))

still = torch.ones(EXTRA, WIDTH // HEADS), torch.zeros(EXTRA, WIDTH // HEADS)
rotation = [torch.cat(pair) for pair in zip(rotations[WIDTH // HEADS], still, strict=True)]
x = torch.randn(2, len(rotation[0]), WIDTH, requires_grad=True)
heads = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
q, k, v = (heads(t) for t in qkv(norm1(x)).chunk(3, dim=-1))
q, k = (apply_rotary_emb(t, rotation, use_real=True, use_real_unbind_dim=-1) for t in (q, k))
h = x + out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
y = h + mlp(norm2(h))
dy = torch.randn(y.shape)
y.backward(dy)

arrays |= {"x": x, "y": y, "dy": dy, "dx": x.grad}
arrays |= {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
path = pathlib.Path(__file__).with_name("io.npz")
np.savez_compressed(path, **{name: t.detach().numpy().astype(np.float32) for name, t in arrays.items()})
