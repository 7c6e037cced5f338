"""AdamW's parameter groups and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from gdn2.train.config import Optimizer

# What does not decay, by the end of its name: rates of decay, biases, gains, filters, embeddings. Other matrices do.
NO_DECAY = ("A_log", "dt_bias", "bias", "norm.weight", "conv1d.weight", "embed.weight")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter of that name."""
    return parameter.ndim >= 2 and not name.endswith(NO_DECAY)


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW with two groups: matrices with weight decay, all else without."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    betas, gpu = (config.beta1, config.beta2), named[0][1].is_cuda
    # On a GPU the rate is a tensor, which a captured step reads anew each time.
    rate = torch.tensor(config.lr, device=named[0][1].device) if gpu else config.lr
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.eps, fused=gpu, capturable=gpu)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(config: Optimizer, step: int, progress: float) -> float:
    """The rate of step `step` (from 0): linear warm-up by steps, times a cosine by `progress` in [0, 1]."""
    cosine = config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return cosine * min(1.0, (step + 1) / max(config.warmup_steps, 1))
