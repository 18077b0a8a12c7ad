"""Metrics, the clips they are computed on, and evaluation of checkpoints."""
