"""Training: the stages with their losses and optimizers, and the loop."""
