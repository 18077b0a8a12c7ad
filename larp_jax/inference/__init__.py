"""Codes, reconstructions, samples and predictions of trained models, written to files."""
