"""A router that chooses how many codes a clip gets, at the size of EVATok (arXiv 2603.12267).

    larp-jax allocate --checkpoint runs/evatok --data folder:videos --output runs/evatok_rewards
    larp-jax train --config configs/router.py --workdir runs/router --config.data.train=rewards:runs/evatok_rewards

    larp-jax allocate --checkpoint runs/adaptive --data moving_shapes/busy:train --output runs/adaptive_rewards \
        --metric rmse --quality-weight 1.8 --length-weight 0.2
    larp-jax train --config configs/router.py:small --workdir runs/adaptive_router  # for configs/adaptive.py, minutes

Stated in the paper: a linear patch embedding, ViT-S (19.9 M parameters) with a class token, cross-entropy over all
assignments, batch 128, 50,000 steps, 100,000 clips with rewards. Not stated, and chosen here: patches of 4x32x32, with
which a choice costs about 2% of the encoder's work; AdamW at 3e-4 with a warm-up and weight decay of 0.05.
"""

from larp_jax.config import default_recipe


def get_config(variant=""):
    """The recipe; the variant `small` is for clips of 32x32 on two CPU cores."""
    if variant not in ("", "small"):
        raise ValueError(f"variant {variant!r} is not known, only 'small' is")
    config = default_recipe("router")
    config.data.train = "rewards:runs/evatok_rewards"
    config.data.batch_size = 128
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 2000
    config.precision = "bfloat16"
    if variant == "small":
        config.steps = 1200
        config.objective = "rewards"  # one row of numbers per clip instead of one name
        model = config.model
        model.size = "custom"
        model.width, model.depth, model.heads = 64, 2, 4
        model.input = "differences"  # choices follow motion more closely than with pixels
        config.precision = "float32"
        config.optim.learning_rate = 1e-3
        config.optim.warmup_steps = 100
        config.optim.ema_decay = 0.99
        config.data.train = "rewards:runs/adaptive_rewards"
        config.data.batch_size = 32
        config.log_every = 20
        config.eval_every = 200
        config.save_every = 500
    return config
