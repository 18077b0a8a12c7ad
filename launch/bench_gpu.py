"""Benchmark a GPU in one run: training, encoding, decoding and sampling.

    python launch/bench_gpu.py --output bench.json

For one large GPU (H200). Measures the published tokenizer with its full objective, in bfloat16, at several batch sizes,
and the published 632 M generator with 64 videos at a time and guidance 1.25. Weights and clips are random, so no files
are needed. A measurement that does not fit in memory is recorded as failed and skipped. `--small` runs the same with
small models, without prior and perceptual loss, on any machine.
"""

import argparse
import json
import pathlib
import time

from larp_jax.config import default_recipe, parse_recipe
from larp_jax.errors import InputError
from larp_jax.models.sampling import SamplingOptions
from larp_jax.tools import benchmark, benchmark_sampling


def recipes(small: bool):
    """The recipe of the tokenizer, for `main` to change, and the parsed recipe of the generator."""
    tokenizer, generator = default_recipe("tokenizer"), default_recipe("generator")
    tokenizer.precision = "bfloat16"
    if small:
        model = tokenizer.model
        model.size, model.frames, model.resolution, model.num_tokens = "custom", 8, 32, 8
        for part in (model.encoder, model.decoder, tokenizer.discriminator):
            part.width, part.depth, part.heads = 32, 1, 2
        model.quantizer.codebook_size, model.quantizer.code_dim = 32, 4
        tokenizer.loss.perceptual, tokenizer.loss.prior_weight = "none", 0.0  # which take the longest to compile
        model = generator.model
        model.width, model.depth, model.heads, model.codebook_size, model.num_tokens = 32, 1, 2, 32, 8
    return tokenizer, parse_recipe(generator)


def main() -> None:
    """Runs all measurements, printing each and writing all results so far after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="bench.json", help="JSON file (default: bench.json)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each measurement (default: 15)")
    parser.add_argument("--batches", default="", help="batch sizes, except for sampling (default: 16,32,64,128)")
    parser.add_argument("--small", action="store_true", help="small models, to try this script")
    arguments = parser.parse_args()
    batches = [int(size) for size in (arguments.batches or ("8" if arguments.small else "16,32,64,128")).split(",")]
    tokenizer, generator = recipes(arguments.small)
    found = {}

    def measure(name, call):
        began = time.perf_counter()
        try:
            found[name] = call()
            print(f"\n{name}\n{benchmark.format_table(found[name])}", flush=True)
        except InputError:
            raise
        except Exception as error:  # most often out of memory
            found[name] = {"failed": str(error).splitlines()[0]}
            print(f"\n{name}: {found[name]['failed']}", flush=True)
        found[name]["took_seconds"] = time.perf_counter() - began
        pathlib.Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n")

    for size in batches:
        for remat in ("none",) if arguments.small else ("none", "block"):
            tokenizer.data.batch_size, tokenizer.remat = size, remat
            recipe = parse_recipe(tokenizer)
            measure(
                f"train, batch {size}, remat {remat}",
                lambda recipe=recipe: benchmark.benchmark_train(
                    recipe, seconds=arguments.seconds, by_term=False
                ),
            )
    recipe = parse_recipe(tokenizer)
    for what in ("encode", "decode"):
        for size in batches:
            measure(
                f"{what}, batch {size}",
                lambda what=what, size=size: benchmark.benchmark_codec(
                    recipe, what, batch_size=size, precision="bfloat16", seconds=arguments.seconds
                ),
            )
    measure(
        "sample",
        lambda: benchmark_sampling.benchmark_sample(
            benchmark_sampling.untrained_generator(generator.model, precision="bfloat16"),
            SamplingOptions(cfg_scale=1.25),
            batch_size=8 if arguments.small else 64,
            seconds=arguments.seconds,
        ),
    )
    best = max(
        (name for name in found if "mfu" in found[name] and name.startswith("train")),
        key=lambda name: found[name]["clips_per_second"],
        default=None,
    )
    if best:
        print(f"\nbest training: {best}, {found[best]['clips_per_second']:.1f} clips/s, MFU {found[best]['mfu']:.1%}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
