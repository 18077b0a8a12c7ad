"""Tokenizer and prior agree with the released code on its weights."""

import pytest
from fidelity import COMPARISONS, tokenizer_deviations


def test_every_quantity_of_the_reference(reference_dir):
    deviations = tokenizer_deviations(reference_dir / "tokenizer")
    assert len(deviations) == 16
    assert not [d for d in deviations if not d.within]


OPTIONS = [name for name in COMPARISONS if name.startswith("tokenizer_")]


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*OPTIONS, "entropy", "ns_smooth", "schedules", "initialisation"])
def test_every_quantity_of_its_options(reference_dir, folder):
    deviations = COMPARISONS[folder](reference_dir / folder)
    assert len(deviations) >= 4
    assert not [d for d in deviations if not d.within]


def test_every_reference_is_compared(reference_dir):
    released = {path.name for path in reference_dir.iterdir() if not list(path.glob("*.py"))}  # others have a script
    assert released == set(COMPARISONS)
