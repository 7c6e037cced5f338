"""The generators written down once more, as plainly as their description: one global stream, strings, no classes.

What `tasks.ruler` makes with streams of its own must be what these make with Python's and numpy's global ones. They
follow NVIDIA's code of 2024 (`old`) and its main branch since June 2025 (not `old`).
"""

import json
import random
import string
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tasks.ruler.templates import NOISE
from tasks.ruler.words import single_words
from tests.tasks.test_ruler_originals import MODULES, corpora, lines, made

__all__ = ["corpora"]

Count = Callable[[str], int]
Sample = tuple[str, list[str]]
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above,"
    " 5 variables are {assigned} the value {value}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
QA_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
QA = QA_ORDER + "The following are given documents.\n\n{context}\n\n" + QA_ORDER + "Question: {query} Answer:"


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """The global streams, seeded as the generators seed them and put back."""
    state = random.getstate(), np.random.get_state()
    random.seed(42)
    np.random.seed(42)
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])


def letters(n: int) -> str:
    return "".join(random.choices(string.ascii_uppercase, k=n))


def enumerated(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def grown(size: Callable[[int], int], limit: int, step: int) -> int:
    """The old search: a step more until the limit is passed."""
    n = step
    while True:
        tokens = size(n)
        if tokens > limit:
            return n - step
        n += step
        if tokens == limit:
            return n


def halved(size: Callable[[int], int], limit: int, low: int, high: int) -> int:
    """The new search."""
    best = low
    while low <= high:
        middle = (low + high) // 2
        if size(middle) <= limit:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def chain(n: int, k: int, old: bool) -> Sample:
    names = [letters(k) for _ in range(5)]
    assert len(set(names)) == 5
    value = "12345" if k == 3 and not old else str(np.random.randint(10000, 99999))
    statements = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False)]
    text = [NOISE + "\n" * old] * n
    if old and n <= 5:
        text = [part + "." if part.strip() else part for line in text for part in line.split(".")]
    for j, place in enumerate(sorted(random.sample(range(len(text)), 5))):
        text.insert(place + j, statements[j])
    context = (" " if old else "\n").join(text).replace(". \n", ".\n")
    return VT.format(context=context, value=value, assigned="assgined" if old else "assigned"), names


def renamed(example: str, names: list[str], old: bool) -> str:
    for name in names:
        example = example.replace(name, letters(3))
    return example if old else example.replace("12345", str(np.random.randint(10000, 99999)))


def chains(length: int, count: Count, old: bool, n: int) -> list[Sample]:
    """vt."""

    def fit(k: int, limit: int, step: int, extra: int) -> int:
        def size(m: int) -> int:
            text, names = chain(m, k, old)
            return count(text + f" {names}" * old) + extra

        if old:
            return grown(size, limit, step)
        guess = (
            int(500 / ((size(step) - extra) / step) * 3) if k == 3 else int(length / ((size(step) - extra) / step) * 3)
        )
        return halved(size, limit, step, max(guess, 2 * step))

    example, solved = chain(fit(3, 500 - 30 * old, 5, 0), 3, old)
    shown = f"{example} {' '.join(solved)}" + ("\n\n" if old else "\n")
    step = 10 if old or length >= 4096 else 5
    best = fit(5, length - 30, step, count(shown))
    out = []
    for _ in range(n):
        text, names = chain(best, 5, old)
        out.append((renamed(shown, solved, old) + ("\n\n" if old else "\n") + text, names))
    return out


def common(length: int, count: Count, old: bool, n: int) -> list[Sample]:
    """cwe."""
    words = single_words()
    random.Random(42).shuffle(words)

    def listed(m: int, often: int, seldom: int) -> Sample:
        drawn = random.sample(words, m)
        every = drawn[:10] * often + drawn[10:] * seldom
        random.Random(42).shuffle(every)
        return CWE.format(context=enumerated(every)), drawn[:10]

    def sample(m: int) -> Sample:
        example, solved = listed(40, 10, 3) if length >= 4096 else listed(20, 3, 1)
        text, answer = listed(m, 30, 3) if length >= 4096 else listed(m, 6, 1)
        return example + " " * (not old) + enumerated(solved) + "\n" + text, answer

    def size(m: int) -> int:
        text, answer = sample(m)
        return count(text + f" {enumerated(answer)}" * old)

    if old:
        best = grown(size, length - 120, 10)
    else:
        best = halved(size, length - 120, 10, max(int(length // (size(4096) / 4096)) * 2, 20))
    return _drawn(sample, best, 10, length - 120, count, n)


def _drawn(sample: Callable, best: int, step: int, limit: int, count: Count, n: int) -> list[Sample]:
    out: list[Sample] = []
    while len(out) < n:
        used = best
        made_ = sample(used)
        while count(made_[0]) > limit:
            used -= step if used > step else 0
            made_ = sample(used)
        out.append(made_)
    return out


def frequent(length: int, count: Count, old: bool, n: int) -> list[Sample]:
    """fwe."""
    limit = length if old else length - 50

    def vocabulary() -> list[str]:
        words = [letters(6).lower() for _ in range(limit // 50)]
        assert len(set(words)) == len(words)
        words = sorted(words)
        random.Random(42).shuffle(words)
        return ["...", *words[1:]]

    def text(words: list[str], m: int) -> str:
        every = [w for r, w in enumerate(words, start=1) for _ in range(int(m * r**-2.0 / (np.pi**2 / 6)))]
        random.Random(42).shuffle(every)
        return FWE.format(context=" ".join(every))

    words, m = vocabulary(), limit // 6
    while count(text(words, m)) < limit:
        m += limit // 32
    out = []
    for _ in range(n):
        words, used = vocabulary(), m - limit // 32
        while count(text(words, used)) > limit:
            used -= limit // 32
        out.append((text(words, used), words[1:4]))
    return out


@pytest.mark.parametrize("old", [True, False], ids=["nvidia-2024", "nvidia-main"])
@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("name", MODULES)
def test_the_streams_are_those_of_the_plain_generators(public: Callable, name: str, length: int, old: bool) -> None:
    tokenizer = public("gpt-neox")
    plain = {"vt": chains, "cwe": common, "fwe": frequent}[name]
    want = plain(length, lambda text: len(tokenizer.encode(text)), old, 3)
    profile = "nvidia-2024" if old else "nvidia-main"
    assert [(one.prompt, list(one.answers)) for one in made(name, profile, length, tokenizer, {}, 3)] == want


@pytest.mark.parametrize("old", [True, False], ids=["nvidia-2024", "nvidia-main"])
def test_documents_beyond_the_corpus(public: Callable, corpora: dict, old: bool) -> None:
    """Where the window holds more than all documents: shuffled in place once and for all, or repeated."""
    tokenizer = public("gpt-neox")
    whole = corpora["qa_2"]
    questions = whole.questions[:3]
    documents = sorted({whole.documents[i] for question in questions for i in question.given})
    places = [tuple(documents.index(whole.documents[i]) for i in question.given) for question in questions]
    asked = tuple(type(q)(q.query, q.answers, given, (), ()) for q, given in zip(questions, places, strict=True))
    few = {"qa_2": type(whole)(asked, tuple(documents))}
    profile = "nvidia-2024" if old else "nvidia-main"
    samples = made("qa_2", profile, 16384, tokenizer, few, 3)
    if old:
        assert len(documents) == 30
        random.Random(42).shuffle(documents)  # the search's third probe
        for sample, question in zip(samples, asked, strict=True):
            random.Random(42).shuffle(documents)
            context = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(documents))
            assert sample.prompt == QA.format(context=context, query=question.query)
    else:
        sizes = [sample.prompt.count("\n\nDocument ") for sample in samples]
        assert min(sizes) > len(documents)
        repeated = (documents * -(-sizes[0] // len(documents)))[: sizes[0]]
        random.Random(42).shuffle(repeated)
        assert samples[0].prompt.startswith(QA.partition("{context}")[0] + f"Document 1:\n{repeated[0]}\n\nDocument 2")
    assert json.loads(lines(samples).splitlines()[0])["outputs"] == list(asked[0].answers)
