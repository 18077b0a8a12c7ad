"""The commands experiment, plan, benchmark, report, demo and doctor."""

import argparse
from typing import Any

from larp_jax import files
from larp_jax.cli.arguments import (
    CHECKPOINT,
    add_batch_size,
    add_checkpoint,
    add_command,
    add_config,
    add_guidance,
    add_precision,
    add_sample_budget,
    add_solver,
    add_window,
    positive,
    seconds,
)
from larp_jax.cli.recipe import load_experiment, load_recipe
from larp_jax.errors import InputError


def add_experiment(commands) -> None:
    """Adds the command experiment."""
    sub = add_command(
        commands,
        "experiment",
        _experiment,
        "compare tokenizers: train, sample and measure several arms with several seeds",
        "prior --workdir runs/prior",
    )
    sub.add_argument(
        "name", metavar="NAME[:VARIANT]",
        help="bottleneck, patchwise, prior, prior_size, quantizer, scheduled_sampling, semantic or tokens, or the"
        " Python file of an experiment; the variants gpu64 and gpu128 are for one GPU",
    )  # fmt: skip
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the experiment, new or to be continued")
    sub.add_argument(
        "--seeds", type=positive, metavar="N", help="number of seeds (default: that of the experiment, usually 3)"
    )
    sub.add_argument(
        "--jobs", type=positive, default=1, metavar="N",
        help="processes side by side, each with its own GPU or its share of the CPU cores (default: 1)",
    )  # fmt: skip


def _experiment(arguments):
    import dataclasses

    from larp_jax.tools import experiment_results
    from larp_jax.tools.experiment import run_experiment

    experiment = load_experiment(arguments.name)
    if arguments.seeds:
        experiment = dataclasses.replace(experiment, seeds=arguments.seeds)
    results = run_experiment(experiment, arguments.workdir, name=arguments.name, jobs=arguments.jobs)
    print(experiment_results.table(results))


def add_plan(commands) -> None:
    """Adds the command plan."""
    sub = add_command(
        commands,
        "plan",
        _plan,
        "estimate memory and step time on hardware you do not have",
        "--config configs/larp_l_long.py --topology v5e:16x16 --config.remat=block",
    )
    add_config(sub)
    hardware = sub.add_mutually_exclusive_group(required=True)
    hardware.add_argument(
        "--topology", metavar="T",
        help="TPU slice, for example v5e:4x4 or v5p:4x4x4, or several, 2xv5e:16x16; the step is compiled with libtpu",
    )  # fmt: skip
    hardware.add_argument(
        "--devices", type=positive, metavar="N", help="number of emulated CPU devices; the step is compiled for them"
    )
    hardware.add_argument("--gpus", metavar="KIND:N", help="GPUs, for example H200:8; estimated without compiling")
    sub.add_argument("--output", metavar="FILE", help="JSON file for the numbers")


def _plan(arguments):
    from larp_jax.tools import plan

    recipe = load_recipe(arguments)
    _check_numbers(arguments)
    result = plan.plan(recipe, topology=arguments.topology, devices=arguments.devices, gpus=arguments.gpus)
    print(plan.format_table(result))
    _write_numbers(arguments, result)


def add_benchmark(commands) -> None:
    """Adds the command benchmark."""
    sub = add_command(
        commands,
        "benchmark",
        _benchmark,
        "measure throughput",
        "train --config configs/quickstart.py --output train.json",
    )
    sub.add_argument(
        "what", choices=("train", "encode", "decode", "sample", "data"),
        help="train: the training step; encode, decode: a tokenizer; sample: a generator (all with random weights and"
        " synthetic clips); data: reading training batches",
    )  # fmt: skip
    model = sub.add_mutually_exclusive_group(required=True)
    add_config(model, required=False)
    model.add_argument("--checkpoint", metavar="G", help=f"for benchmark sample, a trained generator: {CHECKPOINT}")
    sub.add_argument(
        "--seconds", type=seconds, default=10.0, metavar="S", help="length of the measurement in seconds (default: 10)"
    )
    models = sub.add_argument_group("benchmark encode, decode and sample")
    add_batch_size(models)
    add_precision(models)
    models.add_argument(
        "--router-config", metavar="FILE[:VARIANT]", help="for benchmark encode: recipe of a router, to time its choice"
    )
    sampling = sub.add_argument_group("benchmark sample")
    add_guidance(sampling, 1.25)
    add_window(sampling)
    add_solver(sampling)
    add_sample_budget(sampling)
    sampling.add_argument("--tokenizer", metavar="P", help="the tokenizer, to measure the time to the first clip")
    sampling.add_argument(
        "--stream", action="store_true",
        help="instead, time the first frames and the following of a stream of one video, beside whole clips",
    )  # fmt: skip
    sub.add_argument("--output", metavar="FILE", help="JSON file for the numbers")
    sub.add_argument(
        "--model-rate", type=positive, metavar="R",
        help="clips per second that the model trains on, to check whether data keeps up",
    )  # fmt: skip


def _benchmark(arguments):
    from larp_jax.tools import benchmark

    _check_numbers(arguments)
    if arguments.what == "sample":
        result = _benchmark_sample(arguments)
    else:
        result = _benchmark_tokenizer(arguments)
    print(benchmark.format_table(result))
    _write_numbers(arguments, result)


def _recipe_of(stage: str, arguments):
    """The recipe of --config; `InputError` if it is of another stage."""
    if arguments.config is None:
        raise InputError(f"benchmark {arguments.what} needs --config; only benchmark sample takes a --checkpoint")
    recipe = load_recipe(arguments)
    if recipe.holds != stage:
        raise InputError(f"benchmark {arguments.what} needs the config of a {stage}, not of a {recipe.stage}")
    return recipe


def _benchmark_sample(arguments) -> dict[str, Any]:
    from larp_jax import api
    from larp_jax.cli.inference import sampling_options
    from larp_jax.tools import benchmark_sampling

    options, precision = sampling_options(arguments), arguments.precision
    changed = {}
    if arguments.checkpoint is None:
        if options.window > 1:
            raise InputError("--window depends on what the generator has learned: give --checkpoint, not --config")
        recipe = _recipe_of("generator", arguments)
        generator = benchmark_sampling.untrained_generator(
            recipe.model, precision=precision, given_frames=recipe.given_frames
        )
    else:
        found = api.load_checkpoint(arguments.checkpoint, kind="generator")
        generator = api.LoadedGenerator.of(found, precision=precision)
        if precision != "float32" and generator.config.has_codes:
            changed = benchmark_sampling.precision_change(found, precision)
    tokenizer = None
    if arguments.tokenizer is not None:
        tokenizer = api.load_tokenizer(arguments.tokenizer)
        generator.check_tokenizer(tokenizer)
    generator.assignment(arguments.budget, options)
    measured: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": arguments.batch_size}
    if not generator.config.has_codes and not arguments.stream:
        return benchmark_sampling.benchmark_flow(generator, options, seconds=arguments.seconds, **measured)
    if arguments.stream:
        if tokenizer is None:
            raise InputError("--stream measures the time to frames: give the tokenizer that decodes them, --tokenizer")
        found = benchmark_sampling.benchmark_stream(
            generator, tokenizer, options, seconds=arguments.seconds, budget=arguments.budget
        )
        return found | changed
    result = benchmark_sampling.benchmark_sample(
        generator, options, seconds=arguments.seconds, budget=arguments.budget, **measured
    )
    return result | changed


def _benchmark_tokenizer(arguments) -> dict[str, Any]:
    from larp_jax.tools import benchmark
    from larp_jax.training import common

    recipe, router = _recipe_of("tokenizer", arguments), None
    if arguments.router_config is not None:
        if arguments.what != "encode" or not recipe.model.ladder:
            raise InputError("--router-config is for benchmark encode of a tokenizer with model.ladder; leave it out")
        given = argparse.Namespace(config=arguments.router_config, overrides=[], command=arguments.command)
        router = load_recipe(given).model.for_tokenizer(recipe.model)
    if arguments.what == "train":
        return benchmark.benchmark_train(recipe, seconds=arguments.seconds)
    if arguments.what == "data":
        return benchmark.benchmark_data(
            recipe.data.train,
            common.clip_spec(recipe.model, recipe.data),
            batch_size=recipe.data.batch_size,
            workers=recipe.data.workers,
            seconds=arguments.seconds,
            model_rate=arguments.model_rate,
        )
    if arguments.precision == "int8":
        raise InputError("--precision int8 is for generators, not for tokenizers; choose float32 or bfloat16")
    return benchmark.benchmark_codec(
        recipe,
        arguments.what,
        router=router,
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        seconds=arguments.seconds,
    )


def _check_numbers(arguments) -> None:
    """Checks that `_write_numbers` can write and replaces no other file than numbers of the same command."""
    if arguments.output:
        kind = f"larp_jax.{arguments.command}"
        files.check_output(arguments.output, ours=lambda path: files.json_object(path).get("format") == kind)


def _write_numbers(arguments, result: dict[str, Any]) -> None:
    if arguments.output:
        files.write_json(arguments.output, {"format": f"larp_jax.{arguments.command}", **result})


def add_report(commands) -> None:
    """Adds the command report."""
    sub = add_command(
        commands,
        "report",
        _report,
        "show a run on one HTML page: curves, videos, codebook usage, metrics, settings",
        "--workdir runs/quickstart",
    )
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, finished or not")
    sub.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the workdir)")


def _report(arguments):
    from larp_jax.tools import report

    path = report.report(arguments.workdir, arguments.output)
    print(f"{path}: {files.size(path) / 1e6:.1f} MB, opens in any browser")


def add_demo(commands) -> None:
    """Adds the command demo."""
    sub = add_command(
        commands,
        "demo",
        _demo,
        "try a model on a local page: drop videos, look at their codes, swap them, sample",
        "--checkpoint runs/quickstart --generator runs/generator",
    )
    add_checkpoint(sub)
    sub.add_argument("--generator", metavar="G", help="a generator for it, to sample from")
    sub.add_argument("--router", metavar="R", help="the router of the budget auto: a workdir or a checkpoint")
    sub.add_argument(
        "--host", default="127.0.0.1", metavar="H",
        help="address to listen on; 0.0.0.0 shows the page to everyone on the network (default: 127.0.0.1)",
    )  # fmt: skip
    sub.add_argument("--port", type=positive, metavar="N", help="port of the page (default: the first free from 7860)")


def _demo(arguments):
    from larp_jax import api
    from larp_jax.runtime.stopping import StopRequest
    from larp_jax.tools import demo, demo_page

    demo_page.check(arguments.host, arguments.port)
    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights, router=arguments.router)
    generator = None
    if arguments.generator is not None:
        generator = api.load_generator(arguments.generator, weights=arguments.weights)
    models = demo.Demo(tokenizer, generator)
    with StopRequest() as stop:
        stop.defer()
        demo_page.serve(models, host=arguments.host, port=arguments.port, stopped=lambda: stop.signal is not None)


def add_doctor(commands) -> None:
    """Adds the command doctor."""
    add_command(
        commands, "doctor", _doctor, "check the installation: versions, devices, missing parts and how to fix them", ""
    )


def _doctor(arguments):
    from larp_jax.tools import doctor

    print(doctor.report())
