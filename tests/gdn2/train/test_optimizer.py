"""Which parameters decay, and the learning rate."""

import pytest
import torch

from gdn2.models import Decoder
from gdn2.train.config import Optimizer
from gdn2.train.optimizer import decays, learning_rate, make_optimizer

CONFIG = Optimizer(lr=1.0, min_lr=0.1, warmup_steps=10)


def test_only_matrices_decay(tiny) -> None:
    model = Decoder(tiny().model)
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    matrices = {name for name, _ in model.named_parameters() if "_proj" in name or ".mlp." in name}
    assert decayed == matrices - {"layers.0.mixer.g_proj.1.bias"} | {"head.weight"}
    optimizer = make_optimizer(model, CONFIG)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [CONFIG.weight_decay, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_without_gradient_only_decaying_matrices_shrink(tiny) -> None:
    model = Decoder(tiny().model)
    model.reset_parameters(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, CONFIG)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        changed = not torch.equal(p, before[name])
        assert changed == (decays(name, p) and bool(before[name].any())), name


def test_rate_rises_then_follows_the_cosine() -> None:
    assert learning_rate(CONFIG, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(CONFIG, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate(CONFIG, 500, 0.5) == pytest.approx(0.55)
    assert learning_rate(CONFIG, 500, 1.0) == pytest.approx(0.1)
    assert learning_rate(CONFIG, 500, 7.0) == pytest.approx(0.1)
