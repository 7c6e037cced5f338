"""Training episodes: RULER's wording, exact token splices, and nothing of the evaluation half."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

import gdn2
from gdn2.errors import UserError
from tasks.ruler import make_tokenizer
from tasks.ruler.episodes import KINDS, RESTATED, EpisodeStream, JsonTokenizer, Mixture, open_episodes
from tasks.ruler.templates import NIAH_TASKS, NOISE
from tasks.ruler.words import held_out

TOKENIZER = Path(gdn2.__file__).parent / "zoo" / "tokenizer.json"
TASK = dict(zip(("noise", "essay", "uuid"), NIAH_TASKS, strict=False))


@pytest.fixture(scope="module")
def tokenizer() -> JsonTokenizer:
    return JsonTokenizer(TOKENIZER)


@pytest.fixture(scope="module", autouse=True)
def small_pool() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.ruler.episodes.POOL", 2000)
        yield


def stream(tokenizer: JsonTokenizer, kind: str, **fields: object) -> EpisodeStream:
    options: dict = {"kinds": {kind: 1.0}, "length": (260, 400), **fields}
    return EpisodeStream(tokenizer, Mixture(**options), seed=5)


def read(tokenizer: JsonTokenizer, document: tuple) -> tuple[str, list[str]]:
    """The text of a document and of its answers (maximal runs of weight 1)."""
    ids, weights = document
    starts = np.flatnonzero(np.diff(np.concatenate([[False], weights == 1, [False]]).astype(int)))
    return tokenizer.decode(ids), [tokenizer.decode(ids[a:b]) for a, b in starts.reshape(-1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_splices_equal_whole_tokenization(tokenizer: JsonTokenizer, kind: str) -> None:
    episodes = stream(tokenizer, kind, needles=(1, 3), questions=(1, 3))
    for i in range(60):
        ids, weights = episodes.document(i)
        assert ids.dtype == np.int32 and weights.dtype == np.float32 and ids.shape == weights.shape
        assert ids[0] == ids[-1] == tokenizer.eos_id and weights[0] == 0
        body = ids[1:-1].tolist()
        if kind != "text":  # its last sentence may be cut inside a word
            assert tokenizer.encode(tokenizer.decode(body)) == body


@pytest.mark.parametrize("kind", sorted(TASK))
def test_single_question_is_the_evaluation_s_prompt(tokenizer: JsonTokenizer, kind: str) -> None:
    task = TASK[kind]
    episodes = stream(tokenizer, kind)
    for i in range(40):
        text, answers = read(tokenizer, episodes.document(i))
        (answer,) = answers
        key = re.search(r"for (\S+) mentioned", text)[1]
        assert text.startswith(task.introduction + "\n")
        assert text.endswith(f"\n{task.question(key)} {task.answer_prefix(key)}{answer}")
        assert text.count(task.needle(key, answer[1:-1])) == 1


def test_every_question_has_its_own_needle_s_answer(tokenizer: JsonTokenizer) -> None:
    episodes = stream(tokenizer, "essay", length=(500, 600), needles=(4, 4), questions=(4, 4))
    for i in range(40):
        text, answers = read(tokenizer, episodes.document(i))
        needles = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", text))
        asked = re.findall(r"The special magic number for (\S+) mentioned in the provided text is (\d{7})\.", text)
        assert len(needles) == 4 and len(asked) == 4 and dict(asked).items() <= needles.items()
        assert answers == [f" {value}." for _, value in asked]


def test_what_was_asked_before_says_nothing_of_the_next_question(tokenizer: JsonTokenizer) -> None:
    """Else a model could answer by elimination, without a look at the key."""
    episodes = stream(tokenizer, "essay", length=(500, 600), needles=(2, 2), questions=(2, 2))
    texts = [read(tokenizer, episodes.document(i))[0] for i in range(80)]
    pairs = [re.findall(r"number for (\S+) mentioned in the provided text is \d", text) for text in texts]
    assert 25 <= sum(first == second for first, second in pairs) <= 55


@pytest.mark.parametrize("kind", RESTATED)
def test_restated_needles_keep_their_values_and_fill_the_length(tokenizer: JsonTokenizer, kind: str) -> None:
    episodes = stream(tokenizer, kind, length=(400, 400), needles=(3, 3))
    forms = set()
    for i in range(30):
        text, answers = read(tokenizer, episodes.document(i))
        said = re.findall(
            r"(One of the|The) special magic \w+ for (\S+) (is:|mentioned in the provided text is) (\S+)\.", text
        )
        values = {key: value for _, key, _, value in said[:3]}
        assert len(values) == 3 and all(values[key] == value for _, key, _, value in said)
        assert answers == [f" {value}." for *_, value in said[3:]] and len(answers) >= 3
        assert 300 < len(episodes.document(i)[0]) <= 400
        forms |= {form for form, *_ in said[3:]}
    assert forms == {"One of the", "The"}


def test_needles_take_every_place(tokenizer: JsonTokenizer) -> None:
    episodes = stream(tokenizer, "noise", length=(300, 300))
    places, n_lines = set(), []
    for i in range(200):
        lines = read(tokenizer, episodes.document(i))[0].split("\n")[1:-1]
        assert [line for line in lines if line != NOISE] == [next(line for line in lines if "magic" in line)]
        places.add(next(j for j, line in enumerate(lines) if line != NOISE))
        n_lines.append(len(lines) - 1)
        assert lines[-1] == NOISE
    assert places == set(range(max(n_lines)))
    essays = stream(tokenizer, "essay", length=(260, 260))
    texts = [read(tokenizer, essays.document(i))[0] for i in range(200)]
    assert any("\n One of" in text for text in texts), "no needle at depth 0"
    assert any(". \nWhat" in text for text in texts), "no needle at depth 100"


def test_keys_and_values_are_of_the_training_half(tokenizer: JsonTokenizer) -> None:
    for split, wanted in (("train", False), ("eval", True)):
        episodes = EpisodeStream(tokenizer, Mixture({"uuid": 1, "noise": 1}, (300, 400)), 3, split)
        for i in range(60):
            text = tokenizer.decode(episodes.document(i)[0])
            key, value = re.search(r"magic \w+s for (\S+) is: (\S+)\.", text).groups()
            assert held_out(key) == held_out(value) == wanted


def test_haystack_is_of_the_split(tokenizer: JsonTokenizer) -> None:
    texts = {}
    for split in ("train", "eval"):
        episodes = EpisodeStream(tokenizer, Mixture({"text": 1.0}, (400, 400)), 3, split)
        texts[split] = {s for i in range(50) for s in tokenizer.decode(episodes.document(i)[0]).split(". ")[:-1]}
        assert len(texts[split]) > 300
    assert texts["train"].isdisjoint(texts["eval"])


def test_lengths_are_kept_and_drawn_from_the_range(tokenizer: JsonTokenizer) -> None:
    for kind in KINDS:
        episodes = stream(tokenizer, kind, length=(200, 800))
        lengths = [len(episodes.document(i)[0]) for i in range(40)]
        assert max(lengths) <= 800
        assert min(lengths) < 300 and max(lengths) > 500
    fixed = stream(tokenizer, "essay", length=(512, 512), needles=(2, 4), questions=(1, 4))
    assert {len(fixed.document(i)[0]) for i in range(40)} <= {510, 511, 512}


def test_bare_episodes_fit_64_tokens(tokenizer: JsonTokenizer) -> None:
    episodes = stream(tokenizer, "noise", length=(64, 64), bare=1.0)
    text, answers = read(tokenizer, episodes.document(0))
    assert "What is" not in text and "hidden" not in text and len(answers) == 1
    with pytest.raises(UserError, match="length 64 is too short"):
        stream(tokenizer, "noise", length=(64, 64)).document(0)


def test_documents_depend_on_seed_and_index_alone(tokenizer: JsonTokenizer) -> None:
    options = {"kinds": {"essay": 1.0, "noise": 2.0}, "length": (200, 300), "needles": (1, 2)}
    order = list(range(20))
    random.Random(0).shuffle(order)
    a, b = (open_episodes(TOKENIZER, options, 11, "train") for _ in range(2))
    second = {i: b.document(i)[0].tolist() for i in order}
    assert all(a.document(i)[0].tolist() == second[i] for i in range(20))
    assert len({tuple(ids) for ids in second.values()}) == 20
    other = open_episodes(TOKENIZER, options, 12, "train")
    assert other.document(0)[0].tolist() != second[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kinds": {"prose": 1.0}}, "prose"),
        ({"kinds": {"noise": 0.0}}, "weights"),
        ({"length": (300, 200)}, r"\[300, 200\]"),
        ({"needles": (0, 1)}, "needles"),
        ({"text_weight": 1.0}, "text_weight 1.0"),
        ({"length": (100, 10_000_000), "kinds": {"essay": 1.0}}, "half a pool"),
    ],
)
def test_wrong_mixtures_are_refused(tokenizer: JsonTokenizer, fields: dict, words: str) -> None:
    options = {"kinds": {"noise": 1.0}, "length": (100, 200), **fields}
    with pytest.raises(UserError, match=words):
        EpisodeStream(tokenizer, Mixture(**options), 0)


def test_the_committed_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    make_tokenizer.train_tokenizer(tmp_path / "tokenizer.json")
    made, committed = (json.loads(path.read_bytes()) for path in (tmp_path / "tokenizer.json", TOKENIZER))
    assert made == committed


def test_tokenizer_isolates_digits_and_keeps_any_text(tokenizer: JsonTokenizer) -> None:
    assert len(tokenizer.encode("8329475")) == 7
    assert len({tuple(tokenizer.encode(d)) for d in "0123456789"}) == 10
    for text in ("Grüße, 漢字 🙂\t\n x  y", "a1b22", "<|endoftext|>x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
