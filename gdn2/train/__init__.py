"""Training small models: configuration, data, optimiser, loop, checkpoints to go on from."""
