"""Reading and writing weights: checkpoints, released weights, exports."""
