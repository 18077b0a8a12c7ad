"""Compare sampling with a plain loop in PyTorch, in turns on the same cores.

    python launch/bench_torch.py --output bench.json

The loop samples as the released code does (LARP, section 4.1): keys and values in caches for the whole sequence, of
which a mask hides what is not written yet, one pass for each code, guidance by a doubled batch, and one multinomial
draw. It has the weights of ours, in float32. Weights are random, because the speed does not depend on them; only
`--windows` need a trained generator (`--checkpoint`). PyTorch must be installed.

Calls alternate. A ratio is that of two calls of one round; the table has medians over the rounds, with the least and
the greatest. Where other programs load the cores, threads that wait for each other lose the most, so there is a second
ratio, of the processor time that the calls took. Look at both, and at the load.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch.nn import functional

from larp_jax.api import LoadedGenerator
from larp_jax.config import GeneratorConfig
from larp_jax.errors import InputError
from larp_jax.models.embeddings import sincos_1d
from larp_jax.models.generator import Generator
from larp_jax.runtime import rng
from larp_jax.weights import checkpoint

SIZES = "12x384,6x768"
FORMS = ("float32", "int8")


class Norm(torch.nn.Module):
    """RMSNorm, in float32."""

    def __init__(self, scale: torch.Tensor, epsilon: float):
        super().__init__()
        self.scale, self.epsilon = scale, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, n, D] -> the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.scale


class Block(torch.nn.Module):
    """One block with its caches, from the parameters of ours."""

    def __init__(self, config: GeneratorConfig, params: Mapping):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.norm1, self.norm2 = (Norm(tensor(params[name]["scale"]), config.norm_epsilon) for name in NORMS)
        self.qkv, self.out = (linear(params["attention"][name]) for name in ("qkv", "out"))
        self.gate, self.up, self.down = (linear(params["mlp"][name]) for name in ("gate", "up", "down"))
        self.caches: tuple[torch.Tensor, torch.Tensor] | None = None

    def clear(self, rows: int, positions: int) -> None:
        """Makes room for so many positions."""
        shape = rows, self.kv_heads, positions, self.qkv.in_features // self.heads
        self.caches = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [B, n, D] at `positions` [n], which attend to what `mask` [n, all positions] shows."""
        x = x + self.attend(self.norm1(x), positions, mask)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    def attend(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attention, writing the caches."""
        rows, n, width = x.shape
        heads = self.heads + 2 * self.kv_heads
        qkv = self.qkv(x).view(rows, n, heads, width // self.heads).transpose(1, 2)
        q, *new = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        for cache, one in zip(self.caches, new, strict=True):
            cache[:, :, positions] = one
        k, v = self.caches
        if self.kv_heads != self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(rows, n, width))


NORMS = ("norm1", "norm2")


class PlainLoop(torch.nn.Module):
    """The generator and its sampling loop in PyTorch.

    Args:
      config: of a generator that is given a class, without a ladder.
      params: float32 parameters, as of `LoadedGenerator.params`.

    Raises:
      InputError: the generator is of another kind.
    """

    def __init__(self, config: GeneratorConfig, params: Mapping):
        super().__init__()
        if config.given != "class" or config.ladder:
            raise InputError("the loop in PyTorch is for generators that are given a class, and without a ladder")
        self.config = config
        self.classes, self.tokens = (tensor(params[name]) for name in ("class_embedding", "token_embedding"))
        layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.depth)]
        self.blocks = torch.nn.ModuleList(Block(config, layer) for layer in layers)
        self.norm, self.head = Norm(tensor(params["norm"]["scale"]), config.norm_epsilon), linear(params["head"])
        fixed = sincos_1d(np.arange(config.num_tokens), config.width) if config.fixed_positions else None
        self.positions = tensor(params["positions"] if fixed is None else fixed)
        self.mask = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool).tril()

    @torch.inference_mode()
    def sample(self, classes: np.ndarray, *, cfg_scale: float = 1.0, greedy: bool = False) -> torch.Tensor:
        """Codes [B, N] int64 of `classes` [B]; drawn with PyTorch's random numbers unless `greedy`."""
        classes = torch.as_tensor(classes)
        if cfg_scale > 1.0:
            classes = torch.cat([classes, torch.full_like(classes, len(self.classes) - 1)])
        for block in self.blocks:
            block.clear(len(classes), self.config.num_tokens)
        x, codes = self.classes[classes][:, None], []
        for position in range(self.config.num_tokens):
            logits = self.forward(x, torch.tensor([position]))
            if cfg_scale > 1.0:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + cfg_scale * (conditional - unconditional)
            probs = torch.softmax(logits, dim=-1)
            codes.append(probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1))
            x = self.tokens[torch.cat([codes[-1]] * (1 + (cfg_scale > 1.0)))]
        return torch.cat(codes, dim=1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] after embeddings x [B, 1, D] at `positions` [1]."""
        x, mask = x + self.positions[positions], self.mask[positions]
        for block in self.blocks:
            x = block(x, positions, mask)
        return self.head(self.norm(x))[:, -1]


def tensor(x: jax.Array | np.ndarray) -> torch.Tensor:
    """A float32 tensor of its own."""
    return torch.from_numpy(np.array(x, np.float32))


def linear(params: Mapping) -> torch.nn.Linear:
    """A linear layer without a bias, from a kernel [inputs, outputs]."""
    weight = tensor(params["kernel"]).T.contiguous()
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def random_params(config: GeneratorConfig) -> dict:
    """Normal parameters, also where training would start from zeros."""
    shapes = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(Generator(config, rngs=nnx.Rngs(0)), nnx.Param)))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: draw.normal(0.0, config.init_std, x.shape).astype(np.float32), shapes)


def compare(
    config: GeneratorConfig, params: Mapping, *, rows: int, cfg_scale: float, windows: list[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times our forms of sampling in turns with the loop in PyTorch.

    Args:
      config: of the generator.
      params: its float32 parameters.
      rows: videos at a time.
      cfg_scale: guidance, 1 for none.
      windows: more than one code in a pass, in float32.
      rounds: how often each is called, after one call to warm up.

    Returns:
      For each form `speedup`, the time of PyTorch over ours, and `processor_speedup`, that of the processor's time:
      each [median, least, greatest]; with a window also the `codes_per_pass`.
    """
    forms = {name: LoadedGenerator(config, params, precision=name) for name in FORMS}
    classes, plain = np.arange(rows) % config.num_classes, PlainLoop(config, params)

    def ours(form, window):
        call = forms[form].sample_counted
        return jax.block_until_ready(call(classes, key=rng.key(0), cfg_scale=cfg_scale, window=window))

    calls: dict[str, Callable] = {"PyTorch": lambda: plain.sample(classes, cfg_scale=cfg_scale)}
    calls |= {form: lambda form=form: ours(form, 1) for form in FORMS}
    calls |= {f"window {window}": lambda window=window: ours("float32", window) for window in windows}
    for call in calls.values():
        call()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    result = {name: _speedups(taken["PyTorch"], taken[name]) for name in calls if name != "PyTorch"}
    for window in windows:
        passes = int(ours("float32", window).passes)
        result[f"window {window}"]["codes_per_pass"] = (config.num_tokens - 1) / passes
    return result


def _speedups(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict[str, Any]:
    """Ratios of the two times of each round: medians and ranges."""
    found = {}
    for name, ratios in zip(
        ("speedup", "processor_speedup"),
        np.transpose(np.divide(theirs, ours)).tolist(),
        strict=True,
    ):
        found[name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def models(arguments: argparse.Namespace) -> dict[str, tuple[GeneratorConfig, Mapping]]:
    """The generators to compare, by name."""
    if arguments.checkpoint:
        found = checkpoint.load(arguments.checkpoint)
        return {arguments.checkpoint: (found.recipe.model, found.params["generator"])}
    made = {}
    for name in arguments.sizes.split(","):
        depth, width = map(int, name.split("x"))
        sizes = dict(depth=depth, width=width, heads=width // 64 or 1)
        config = GeneratorConfig(**sizes, num_tokens=arguments.tokens, codebook_size=arguments.vocabulary)
        made[name] = config, random_params(config)
    return made


def main() -> None:
    """Runs all comparisons, printing each and writing all results so far after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="bench.json", help="JSON file (default: bench.json)")
    parser.add_argument("--checkpoint", help="a trained generator, instead of random weights")
    parser.add_argument("--windows", default="", help="several codes in a pass, for example 2,4,8,16 (default: none)")
    parser.add_argument("--sizes", default=SIZES, help=f"depth x width of each, without it (default: {SIZES})")
    parser.add_argument("--tokens", type=int, default=256, help="codes of a video, without it (default: 256)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="codebook size, without it (default: 8192)")
    parser.add_argument("--batches", default="1,8", help="videos at a time (default: 1,8)")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each (default: 9)")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    windows = [int(window) for window in arguments.windows.split(",") if window]
    found: dict[str, Any] = {}
    for name, (config, params) in models(arguments).items():
        for rows in map(int, arguments.batches.split(",")):
            for cfg_scale in (1.0, 1.25):
                title = f"{name}, batch {rows}, guidance {cfg_scale}"
                sizes = dict(rows=rows, cfg_scale=cfg_scale, windows=windows, rounds=arguments.rounds)
                found[title] = compare(config, params, **sizes) | {"load": os.getloadavg()[0]}
                print(f"\n{title}; load {found[title]['load']:.1f}", flush=True)
                for form, row in found[title].items():
                    if form != "load":
                        print(_line(form, row), flush=True)
                pathlib.Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n")


def _line(form: str, row: Mapping[str, Any]) -> str:
    """A line of the table."""
    ratios = ("{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("speedup", "processor_speedup"))
    time_ratio, processor = ratios
    more = f"; {row['codes_per_pass']:.2f} codes per pass" if "codes_per_pass" in row else ""
    return f"  {form:10} {time_ratio} times as fast; processor time {processor}{more}"


if __name__ == "__main__":
    main()
