"""Recurrent and hybrid language models of the delta-rule family: kernels, mixers, models, checkpoints, training."""
