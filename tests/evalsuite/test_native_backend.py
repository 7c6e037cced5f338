"""An answer of our own models is the same alone, in any batch, in any order and with any token budget, bit for bit."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evalsuite.backends import native
from evalsuite.backends.native import NativeBackend, describe
from evalsuite.batching import windows
from evalsuite.types import Decision, Generate, LogLikelihood, Prompt, Request, Response, Rolling
from gdn2.mixers import linear
from gdn2.models import PRESETS, Decoder, ModelConfig
from gdn2.ragged import Ragged


class Letters:
    """A tokenizer of 64 ids, one character each; id 0 ends a text."""

    digest, name, vocab_size = "letters", "letters", 64
    bos_id: int | None = None
    eos_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 48 for c in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(48 + i) for i in ids)


def make(batch_tokens: int = 8192, slots: int = 64, share_prefixes: bool = True) -> NativeBackend:
    config = ModelConfig(
        d_model=128,
        vocab_size=64,
        pattern=("gdn2", "gdn2"),
        mixers={"gdn2": {"mixer": "gdn2", "n_heads": 2, "d_key": 20, "d_value": 24}},
        d_ff=256,
    )
    model = Decoder(config)
    model.reset_parameters(seed=3)
    model.eval().requires_grad_(False)
    model.embed.weight.mul_(40)  # sharper choices, so that texts differ
    return NativeBackend(
        model, Letters(), describe(model, "test", "0" * 64, Letters()), batch_tokens, slots, share_prefixes
    )


@pytest.mark.parametrize(
    ("preset", "mixer", "family"),
    [
        ("mamba3-siso-tiny", "mamba3_siso", "recurrent"),
        ("mamba3-mimo-hybrid-tiny", "mamba3_mimo", "hybrid"),
        ("gdn2-hybrid-tiny", "gdn2", "hybrid"),
        ("transformer-tiny", "transformer", "transformer"),
    ],
)
def test_records_name_models_as_the_tables_do(preset: str, mixer: str, family: str) -> None:
    with torch.device("meta"):
        info = describe(Decoder(PRESETS[preset]()), preset, "0" * 64, Letters())
    assert (info.mixer, info.family) == (mixer, family)


def prompt(rng: random.Random, n: int) -> Prompt:
    ids = [rng.randrange(1, 64) for _ in range(n)]
    return Prompt(np.array(ids, dtype=np.int32), Letters().decode(ids))


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    out: list[Request] = []
    for n in (1, 15, 63, 64, 65, 200, 333):
        out.append(Generate(prompt(rng, n), max_tokens=rng.randrange(1, 20)))
        out.append(LogLikelihood(prompt(rng, n), prompt(rng, rng.randrange(1, 30))))
        out.append(Rolling(prompt(rng, n), window=rng.choice([None, 32, 64])))
    return out


def answers(backend: NativeBackend, asked: list[Request]) -> list[tuple[str, float | None, bool | None, str]]:
    found: dict[int, Response] = dict(backend.answer(asked))
    assert sorted(found) == list(range(len(asked)))
    return [(r.text, r.logprob, r.greedy, r.ended) for r in (found[i] for i in range(len(asked)))]


@pytest.mark.parametrize(("batch_tokens", "slots"), [(8192, 64), (64, 64), (128, 2), (512, 1)])
def test_answers_do_not_depend_on_the_batch(batch_tokens: int, slots: int) -> None:
    asked = requests(0)
    alone = [answers(make(), [request])[0] for request in asked]
    assert answers(make(batch_tokens, slots), asked) == alone


def test_answers_do_not_depend_on_the_order() -> None:
    asked = requests(1)
    expected = answers(make(), asked)
    order = list(range(len(asked)))
    random.Random(5).shuffle(order)
    shuffled = answers(make(), [asked[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(len(asked))] == expected


def test_the_naive_product_fails_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    asked: list[Request] = [LogLikelihood(prompt(rng, n), prompt(rng, 2)) for n in range(1, 40)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(linear, "blocked", lambda x, weight, bias=None: F.linear(x, weight, bias))
    alone = [answers(make(), [request])[0] for request in asked]
    together = answers(make(), asked)
    torch.set_num_threads(threads)
    assert together != alone


def test_likelihoods_are_those_of_the_model() -> None:
    backend = make()
    rng = random.Random(2)
    context, rest = prompt(rng, 37), prompt(rng, 9)
    ((_, response),) = backend.answer([LogLikelihood(context, rest)])
    ids = torch.tensor([*context.ids, *rest.ids])
    with torch.no_grad():
        logits = backend.model.logits(backend.model(ids, Ragged([46]))[0]).double().log_softmax(-1)
    expected = sum(logits[36 + j, ids[37 + j]].item() for j in range(9))
    assert response.logprob == pytest.approx(expected, abs=1e-4)
    assert response.greedy == bool((logits[36:45].argmax(-1) == ids[37:]).all())


def test_rolling_windows_follow_the_rule() -> None:
    """Windows of 4 over 10 tokens: 4, 4, then the last 2 after as much context as fits, its own scores left out."""
    ids = prompt(random.Random(3), 10).ids
    stream = [0, *ids.tolist()]
    found = [(a.tolist(), skip, b.tolist()) for a, skip, b in windows(ids, 0, 4)]
    assert found == [
        (stream[0:4], 0, stream[1:5]),
        (stream[4:8], 0, stream[5:9]),
        (stream[6:10], 2, stream[7:11]),
    ]
    ((whole, skip, targets),) = windows(ids, 0, None)
    assert (whole.tolist(), skip, targets.tolist()) == (stream[:10], 0, stream[1:])


def test_rolling_scores_every_token_once() -> None:
    backend = make()
    document = prompt(random.Random(4), 50)
    stream = [0, *document.ids.tolist()]
    expected = 0.0
    with torch.no_grad():
        for begin, end, context in ((0, 24, 0), (24, 48, 24), (48, 50, 26)):
            ids = torch.tensor(stream[context:end])
            table = backend.model.logits(backend.model(ids, Ragged([len(ids)]))[0]).double().log_softmax(-1)
            expected += sum(table[t - context, stream[t + 1]].item() for t in range(begin, end))
    ((_, response),) = backend.answer([Rolling(document, window=24)])
    assert response.logprob == pytest.approx(expected, abs=1e-4)
    assert response.tokens == 50


def related(seed: int) -> list[Request]:
    """Requests whose contexts share stretches: equal ones, prefixes of each other, forks at and off block borders."""
    rng = random.Random(seed)
    trunk = prompt(rng, 400).ids
    out: list[Request] = []
    for _ in range(14):
        n = rng.choice([1, 64, 65, 128, 130, 200, 256, 300, 400])
        tail = prompt(rng, rng.choice([0, 1, 10, 90])).ids
        ids = np.concatenate([trunk[:n], tail])
        context = Prompt(ids, Letters().decode(ids.tolist()))
        for _ in range(rng.choice([1, 1, 3])):
            if rng.random() < 0.5:
                out.append(LogLikelihood(context, prompt(rng, rng.randrange(1, 12))))
            else:
                out.append(Generate(context, max_tokens=rng.randrange(1, 6)))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_sharing_prefixes_changes_nothing_but_the_work(seed: int) -> None:
    asked = related(seed)
    plain, sharing = make(share_prefixes=False), make(batch_tokens=256, slots=5)
    assert answers(sharing, asked) == answers(plain, asked)
    assert sharing.tokens_asked == plain.tokens_asked == plain.tokens_read
    assert sharing.tokens_read < 0.7 * plain.tokens_read


def test_gradients_stay_on_for_the_caller_while_answers_come_in() -> None:
    for _ in make().answer(requests(0)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_generation_is_greedy_and_ends_as_asked() -> None:
    backend = make()
    rng = random.Random(8)
    start = prompt(rng, 50)
    ((_, free),) = backend.answer([Generate(start, max_tokens=30)])
    ids = start.ids.tolist()
    with torch.no_grad():
        for token in free.text:
            hidden, _ = backend.model(torch.tensor(ids), Ragged([len(ids)]))
            assert backend.model.logits(hidden[-1:]).argmax().item() == ord(token) - 48
            ids.append(ord(token) - 48)
    assert free.ended in ("length", "eos")
    assert len(free.text) >= 4
    reference = free.text[1:3]
    ((_, decided),) = backend.answer([Generate(start, max_tokens=30, decision=Decision((reference,)))])
    assert decided.ended == "decided"
    assert decided.text == free.text[: free.text.lower().find(reference.lower()) + 2]
    ((_, stopped),) = backend.answer([Generate(start, max_tokens=30, stop=(free.text[2:4],))])
    assert stopped.ended == "stop"
    assert stopped.text == free.text[: free.text.find(free.text[2:4])]


def test_a_request_whose_logits_are_not_finite_fails_alone() -> None:
    backend = make()
    asked = requests(4)
    expected = answers(backend, asked)
    rng = random.Random(9)
    poison = Prompt(np.array([63] * 5, dtype=np.int32), "o" * 5)
    clean = [i for i, r in enumerate(asked) if 63 not in _ids(r)]
    backend.model.embed.weight[63] = math.nan
    mixed = [*[asked[i] for i in clean], Generate(poison, 4), LogLikelihood(poison, prompt(rng, 3))]
    found = dict(backend.answer(mixed))
    assert found[len(clean)].error == "values that are not finite, first in embedding"
    assert found[len(clean) + 1].error == "values that are not finite, first in embedding"
    for at, i in enumerate(clean):
        if "o" not in expected[i][0]:
            assert (found[at].text, found[at].logprob) == expected[i][:2]
    assert clean


def _ids(request: Request) -> list[int]:
    match request:
        case Generate():
            return request.prompt.ids.tolist()
        case LogLikelihood():
            return [*request.context.ids.tolist(), *request.continuation.ids.tolist()]
        case Rolling():
            return request.document.ids.tolist()


def test_short_continuations_are_stepped_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token form up to a length, chunk form beyond: the request's length alone decides, so nothing else moves it."""
    rng = random.Random(11)
    context = prompt(rng, 70)
    asked: list[Request] = [LogLikelihood(context, prompt(rng, n)) for n in (1, 2, 3, 4, 3, 2, 40, 3)]
    asked += [LogLikelihood(prompt(rng, n), prompt(rng, 3)) for n in (1, 64, 99)]
    backend = make()
    steps: list[int] = []
    step = backend.model.step

    def counted(ids: torch.Tensor, state: object) -> torch.Tensor:
        steps.append(len(ids))
        return step(ids, state)

    monkeypatch.setattr(backend.model, "step", counted)
    together = answers(backend, asked)
    assert sum(steps) == 2 * 1 + 6 * 2  # of the continuations of two and of three tokens, all but the last
    assert together == [answers(make(), [request])[0] for request in asked]
    assert together == answers(make(128, 2), asked) == answers(make(share_prefixes=False), asked)
    monkeypatch.setattr(native, "STEPPED", {})
    for (_, stepped, *_), (_, chunked, *_) in zip(together, answers(make(), asked), strict=True):
        assert stepped == pytest.approx(chunked, abs=1e-4)
