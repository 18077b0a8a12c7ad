"""Tokenizer and prior compute what the authors' implementation computes, on its weights."""

from fidelity import tokenizer_deviations


def test_every_quantity_of_the_reference(reference_dir):
    deviations = tokenizer_deviations(reference_dir / "tokenizer")
    assert len(deviations) == 16
    assert not [d for d in deviations if not d.within]
