"""How weights get in and out: checkpoints, released weights, exports."""
