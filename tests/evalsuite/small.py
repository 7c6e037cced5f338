"""A small random model of ours behind the native backend, for tests of the engine."""

import random

import numpy as np
import torch

from evalsuite.backends.native import NativeBackend, describe
from evalsuite.types import Generate, LogLikelihood, Prompt, Rolling, Sampling
from gdn2.models import Decoder, ModelConfig

MIXERS = {
    "gdn2": {"mixer": "gdn2", "n_heads": 2, "d_key": 16, "d_value": 16},
    "gdn": {"mixer": "gdn", "n_heads": 2, "d_key": 16, "d_value": 16},
    "kda": {"mixer": "kda", "n_heads": 2, "d_key": 16, "d_value": 16},
    "deltanet": {"mixer": "deltanet", "n_heads": 2, "d_key": 16, "d_value": 16},
    "mamba2": {"mixer": "mamba2", "n_heads": 4, "d_head": 16, "d_state": 16},
    "mamba3-siso": {"mixer": "mamba3", "n_heads": 4, "d_head": 16, "d_state": 16},
    "mamba3-mimo": {"mixer": "mamba3", "n_heads": 4, "d_head": 16, "d_state": 16, "rank": 2},
    "window": {"mixer": "attention", "n_heads": 2, "d_head": 16, "window": 48},
    "full": {"mixer": "attention", "n_heads": 2, "d_head": 16},
}


class Letters:
    """A tokenizer of 64 ids, one character each; id 0 ends a text."""

    digest, name, vocab_size = "letters", "letters", 64
    bos_id = None
    eos_id = 0

    def encode(self, text):
        return [max(1, ord(c) % 64) for c in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def make(
    pattern=("gdn2", "gdn2"), batch_tokens=8192, slots=64, share_prefixes=True, tied=True, vocabulary=64, gpu=None
):
    """A backend of a model with `pattern`'s layers; `gpu` names the kernels of one on a GPU in bf16."""
    config = ModelConfig(d_model=32, vocab_size=vocabulary, pattern=pattern, mixers=MIXERS, d_ff=64, tied=tied)
    model = Decoder(config)
    model.reset_parameters(seed=3)
    model.eval().requires_grad_(False)
    model.embed.weight.mul_(40)  # sharper choices, so that texts differ
    if gpu is not None:
        model.cast(torch.bfloat16).to("cuda").use(gpu)
    info = describe(model, "small", "0" * 64, Letters())
    return NativeBackend(model, Letters(), info, batch_tokens, slots, share_prefixes)


def prompt(rng, n, front=()):
    """A prompt of n random tokens after `front`."""
    ids = [*front, *(rng.randrange(1, 64) for _ in range(n))]
    return Prompt(np.array(ids, dtype=np.int32), Letters().decode(ids))


def sampling(rng):
    """Some way to draw tokens from logits that are some tens apart."""
    return Sampling(rng.choice([3.0, 20.0, 60.0]), rng.randrange(1 << 64), rng.choice([1.0, 0.8]), rng.choice([0, 5]))


def requests(seed):
    """Requests of every kind, some with a long beginning in common."""
    rng = random.Random(seed)
    front = [rng.randrange(1, 64) for _ in range(130)]
    out = []
    for n in (1, 30, 63, 64, 65, 200):
        out.append(Generate(prompt(rng, n, front), max_tokens=rng.randrange(4, 16)))
        out.append(LogLikelihood(prompt(rng, n, front), prompt(rng, rng.randrange(1, 20))))
        out.append(Rolling(prompt(rng, n), window=rng.choice([None, 32])))
    return out


def answers(backend, asked):
    """What can be compared bit for bit, in the order of the requests."""
    found = dict(backend.answer(asked))
    assert sorted(found) == list(range(len(asked)))
    return [(r.text, r.logprob, r.greedy, r.ended, r.error) for r in (found[i] for i in range(len(asked)))]


class Limit:
    """A device that holds `tokens` tokens of a batch, or `rows` sequences being decoded, and no more."""

    def __init__(self, backend, monkeypatch, tokens=10**9, rows=10**9):
        self.tokens, self.rows, self.failures = tokens, rows, 0
        self.held = []
        forward, step = backend.model.forward, backend.model.step

        def limited_forward(ids, ragged, state=None):
            if ragged.n_tokens > self.tokens:
                self.fail()
            return forward(ids, ragged, state)

        def limited_step(ids, state):
            hidden = step(ids, state)  # the states have moved on when it fails
            if len(ids) > self.rows:
                self.fail()
            return hidden

        monkeypatch.setattr(backend.model, "forward", limited_forward)
        monkeypatch.setattr(backend.model, "step", limited_step)

    def fail(self):
        import weakref

        assert not [ref for ref in self.held if ref() is not None], "the failed call's tensors are still there"
        tensor = torch.zeros(3)
        self.held.append(weakref.ref(tensor))
        self.failures += 1
        raise torch.OutOfMemoryError("out of memory")
