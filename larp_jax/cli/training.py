"""The command train."""

from larp_jax.cli.arguments import add_command, add_config, add_processes, positive
from larp_jax.cli.output import print_table
from larp_jax.cli.recipe import load_recipe


def add_train(commands) -> None:
    """Adds the command train."""
    sub = add_command(
        commands,
        "train",
        _train,
        "train a tokenizer or a generator, or resume a run",
        "--config configs/quickstart.py --workdir runs/quickstart --config.steps=1000",
    )
    add_config(sub)
    sub.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="folder of the run, also gs://BUCKET/PATH; the same for all processes",
    )  # fmt: skip
    sub.add_argument(
        "--profile", type=positive, default=0, metavar="STEPS",
        help="record a trace of STEPS steps for TensorBoard and Perfetto, in profile/ in the workdir",
    )  # fmt: skip
    add_processes(sub)


def _train(arguments):
    from larp_jax.training import train

    recipe = load_recipe(arguments)
    scores = train.train(recipe, arguments.workdir, profile=arguments.profile)
    print(f"trained to step {recipe.steps}, in {arguments.workdir}")
    print_table(scores)
