"""Makes the arrays beside this file from the modules of diffusers: a DiT with random weights, its loss and its samples.

    pip install torch==2.13.0 diffusers==0.42.1
    python tests/reference/flow/make.py

The DiT has normalized queries and keys, exact GELU, and no division by 127 of the frequencies of the time: diffusers'
blocks take these as they are, or after one attribute is replaced.
"""

import pathlib

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps

WIDTH, DEPTH, HEADS, TOKENS, CHANNELS, CLASSES, ROWS = 16, 2, 2, 6, 3, 4, 3
STEPS, SCALE = 4, 1.5
HERE = pathlib.Path(__file__).parent


class Dit(torch.nn.Module):
    """A DiT over a sequence of latents, of diffusers' blocks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(CHANNELS, WIDTH)
        self.positions = torch.nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        head = WIDTH // HEADS
        self.blocks = torch.nn.ModuleList(
            BasicTransformerBlock(
                WIDTH, HEADS, head, activation_fn="gelu", num_embeds_ada_norm=CLASSES, attention_bias=True,
                norm_elementwise_affine=False, norm_type="ada_norm_zero", norm_eps=1e-6,
            )
            for _ in range(DEPTH)
        )  # fmt: skip
        for block in self.blocks:
            block.attn1 = Attention(WIDTH, heads=HEADS, dim_head=head, bias=True, qk_norm="rms_norm", eps=1e-6)
            block.norm1.emb = self.blocks[0].norm1.emb  # one embedding of time and class for all blocks
        self.about = self.blocks[0].norm1.emb
        self.about.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.modulation = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.head = torch.nn.Linear(WIDTH, CHANNELS)

    def forward(self, x, time, label):
        """x [B, N, d], time [B] in [0, 1000], label [B] -> velocities [B, N, d]."""
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, timestep=time, class_labels=label)
        about = self.about(time, label, hidden_dtype=x.dtype)
        shift, scale = self.modulation(torch.nn.functional.silu(about)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale[:, None]) + shift[:, None])

    def named(self):
        """The weights by the names of DiT's own code."""
        about = self.about
        pairs = [("x_embedder", self.embed), ("final_layer.linear", self.head)]
        pairs += [("final_layer.adaLN_modulation.1", self.modulation)]
        pairs += [("t_embedder.mlp.0", about.timestep_embedder.linear_1)]
        pairs += [("t_embedder.mlp.2", about.timestep_embedder.linear_2)]
        classes = about.class_embedder.embedding_table.weight
        found = {"pos_embed": self.positions, "y_embedder.embedding_table.weight": classes}
        for i, block in enumerate(self.blocks):
            attention, mlp = block.attn1, block.ff.net
            for kind in ("weight", "bias"):
                parts = [getattr(layer, kind) for layer in (attention.to_q, attention.to_k, attention.to_v)]
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"blocks.{i}.attn.q_norm.weight"] = attention.norm_q.weight
            found[f"blocks.{i}.attn.k_norm.weight"] = attention.norm_k.weight
            pairs += [(f"blocks.{i}.attn.proj", attention.to_out[0]), (f"blocks.{i}.mlp.fc1", mlp[0].proj)]
            pairs += [(f"blocks.{i}.mlp.fc2", mlp[2]), (f"blocks.{i}.adaLN_modulation.1", block.norm1.linear)]
        for name, layer in pairs:
            found |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        return {name: x.detach().numpy() for name, x in found.items()}


def sample(model, scheduler, noise, label):
    """Samples with guidance: the unconditional velocity plus SCALE times the difference to the conditional one."""
    x, null = noise, torch.full_like(label, CLASSES)
    for time in scheduler.timesteps:
        times = torch.full((len(x),), float(time))
        free, given = model(x, times, null), model(x, times, label)
        x = scheduler.step(free + SCALE * (given - free), time, x).prev_sample
    return x.numpy()


def schedulers():
    """Euler and Heun with STEPS equal steps from 1 to 0."""
    sigmas = np.linspace(1.0, 1.0 / STEPS, STEPS)
    euler, heun = FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()
    euler.set_timesteps(sigmas=sigmas.tolist())
    heun.set_timesteps(STEPS)  # its own steps end at 0.001; the rest of it is used as it is
    whole = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    heun.sigmas = torch.cat([whole[:1], whole[1:-1].repeat_interleave(2), whole[-1:]])
    heun.timesteps = 1000 * torch.cat([whole[:1], whole[1:-1].repeat_interleave(2)])
    return {"euler": euler, "heun": heun}


@torch.no_grad()
def main():
    """Writes weights.npz and io.npz."""
    torch.manual_seed(0)
    model = Dit().eval()
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
    latents, noise = torch.randn(2, ROWS, TOKENS, CHANNELS)
    times, label = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 2, CLASSES])
    noised = (1 - times)[:, None, None] * latents + times[:, None, None] * noise
    velocity = model(noised, 1000 * times, label)
    arrays = {"latents": latents, "noise": noise, "times": times, "label": label, "velocity": velocity}
    arrays["loss"] = torch.nn.functional.mse_loss(velocity, noise - latents, reduction="none").mean(dim=(1, 2))
    arrays = {name: x.numpy() for name, x in arrays.items()}
    for name, scheduler in schedulers().items():
        arrays[name] = sample(model, scheduler, noise, torch.tensor([1, 3, 0]))
    np.savez_compressed(HERE / "weights.npz", **model.named())
    np.savez_compressed(HERE / "io.npz", **arrays)


if __name__ == "__main__":
    main()
