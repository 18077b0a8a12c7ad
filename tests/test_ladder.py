"""Assignments of codes to blocks, their budgets, and packed arrays."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from larp_jax.config import Ladder, TokenizerConfig, default_recipe, parse_recipe, to_dict
from larp_jax.config.ladder import MOST_ASSIGNMENTS
from larp_jax.errors import InputError
from larp_jax.models import packing

EVATOK = Ladder((32, 64, 128, 256, 512), 4, 1024)
SMALL = Ladder((2, 4, 8), 2, 12)


def test_the_assignments_are_those_that_fit():
    everything = [x for x in itertools.product(SMALL.rungs, repeat=2) if sum(x) <= 12]
    assert list(SMALL.assignments) == everything and (8, 8) not in everything
    assert SMALL.uniform == ((2, 2), (4, 4)) and SMALL.largest == (4, 4)
    assert dataclasses.replace(EVATOK, bucket=2048).count == 625
    for ladder in (SMALL, EVATOK, Ladder((3,), 5, 15), Ladder((1, 5), 7, 20)):
        ladder.check()
        assert ladder.count == len(ladder.assignments)
        assert all(ladder.checked(x, "x") == x for x in ladder.assignments)


@pytest.mark.parametrize("text, lengths", [
    ("128", (32,) * 4),
    ("1024", (256,) * 4),
    ("32,64,32,512", (32, 64, 32, 512)),
    (" 32, 64,32,32", (32, 64, 32, 32)),
    ("bits=6656", (128,) * 4),  # 512 codes of 13 bits
    ("bits=6655", (64,) * 4),
    ("bits=1e9", (256,) * 4),
])  # fmt: skip
def test_budgets(text, lengths):
    assert EVATOK.budget(text, 8192) == lengths


@pytest.mark.parametrize("text, message", [
    ("129", "budget 129 does not split into 4 equal blocks of the ladder; choose from 128, 256, 512, 1024, or"),
    ("32,64", "gives 2 numbers of codes, but a clip has 4"),
    ("32,64,32,48", "a block cannot have 48 codes; choose from 32, 64, 128, 256, 512"),
    ("512,512,64,32", "has 1120 codes, above the tokenizer's 1024"),
    ("bits=100", "too small: the fewest codes, 128, need 1664 bits"),
    ("bits=x", "is not known; give a number of codes such as 1024, the number of each block such as 32,32,32,32"),
    ("bits=nan", "is not known"),
    ("pieces=3", "is not known"),
    ("", "is not known"),
    ("-128", "is not known"),
])  # fmt: skip
def test_budgets_that_are_wrong(text, message):
    with pytest.raises(InputError, match=message):
        EVATOK.budget(text, 8192)


def adaptive(**changes):
    small = {"frames": 8, "resolution": 32, "num_tokens": 12, "blocks": 2, "ladder": (2, 4, 8)}
    return TokenizerConfig(**small | changes)


@pytest.mark.parametrize("change, message", [
    ({"blocks": 0}, "model.blocks must be positive"),
    ({"blocks": 4, "ladder": (2, 4)}, "do not split into model.blocks=4 of whole patches of model.patch_frames=4"),
    ({"ladder": ()}, "model.blocks=2 needs model.ladder"),
    ({"ladder": (4, 2)}, "model.ladder=4,2 must be positive numbers of codes, each above the one before"),
    ({"ladder": (0, 2)}, "must be positive numbers"),
    ({"num_tokens": 9}, "does not fit model.num_tokens=9: a block of 8 and 1 of 2 are 10 codes; raise"),
    ({"num_tokens": 17}, "model.num_tokens=17 is more than 2 block.s. of model.ladder=2,4,8 can have; set it to"),
    ({"layout": "patchwise", "num_tokens": 32, "ladder": (16,)}, "leave out model.ladder"),
    ({"patch_frames": 1, "blocks": 8, "ladder": tuple(range(1, 33)), "num_tokens": 99}, f"limit of {MOST_ASSIGNMENTS}"),
])  # fmt: skip
def test_ladders_that_are_wrong(change, message):
    assert adaptive().adaptive == SMALL and TokenizerConfig().adaptive is None
    with pytest.raises(InputError, match=message):
        adaptive(**change)


def test_the_ladder_of_a_recipe():
    config = default_recipe()
    config.model.blocks, config.model.ladder = 4, (32, 64, 128, 256, 512)
    recipe = parse_recipe(config)
    assert recipe.model.adaptive == EVATOK
    stored = to_dict(recipe)
    stored["model"]["ladder"] = list(recipe.model.ladder)  # as in JSON
    assert parse_recipe(stored) == recipe
    stored["model"]["ladder"] = [32, "64"]
    with pytest.raises(InputError, match=r"config.model.ladder must be integers such as 8,16,32, got \[32, '64'\]"):
        parse_recipe(stored)


def test_the_layout_of_packed_codes():
    lengths = np.array([[2, 4], [8, 2], [4, 8]], np.int32)
    found = packing.layout(jnp.asarray(lengths), 12)
    for row, (first, second) in enumerate(lengths):
        rest = 12 - first - second
        assert found.block[row].tolist() == [0] * first + [1] * second + [2] * rest
        assert found.place[row].tolist() == [*range(first), *range(second)] + [0] * rest
        assert found.valid[row].tolist() == [True] * (first + second) + [False] * rest
    assert packing.offsets(jnp.asarray(lengths)).tolist() == [[0, 2, 6], [0, 8, 10], [0, 4, 12]]
    codes = np.where(found.valid, 100 * found.block + found.place, 0)
    dense = packing.by_place(codes, lengths, 8)
    assert dense[0].tolist() == [0, 1] + [-1] * 6 + [100, 101, 102, 103] + [-1] * 4
    assert dense[2].tolist() == [0, 1, 2, 3] + [-1] * 4 + list(range(100, 108))


def test_the_mean_of_a_batch_is_that_of_its_clips():
    x = jnp.arange(2 * 12 * 3, dtype=jnp.float32).reshape(2, 12, 3)
    valid = packing.layout(jnp.array([[2, 4], [4, 8]]), 12).valid
    alone = [packing.mean_of_codes(x[i : i + 1, :n], None) for i, n in enumerate((6, 12))]
    np.testing.assert_allclose(packing.mean_of_codes(x, valid), np.mean(alone), rtol=1e-6)
    assert packing.mean_of_codes(x, None) == x.mean()
