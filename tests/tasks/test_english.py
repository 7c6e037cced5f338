"""The procedural English never repeats itself and never crosses its splits."""

import itertools
import re
from math import gcd

import pytest

from tasks.ruler import english
from tasks.ruler.english import Corpus, templates, word_lists

# Content words of RULER's needles and questions; a haystack that held them would be a distractor.
BANNED = {
    *("special", "magic", "number", "numbers", "word", "words", "uuid", "uuids"),
    *("hidden", "memorize", "quiz", "afterwards", "mentioned", "provided", "text"),
}


def test_lists_are_clean() -> None:
    for name, words in word_lists().items():
        assert len(set(words)) == len(words), name
        assert len({len(word.split(" ")) for word in words}) == 1, name
        assert all(re.fullmatch(r"[A-Za-z]+( [A-Za-z]+)*", word) for word in words), name


def test_every_template_has_room_for_both_splits() -> None:
    for template in templates():
        assert template.capacity >= 2**37
        assert gcd(template.multiplier, template.capacity) == 1


def test_no_two_templates_can_give_one_string() -> None:
    tables = [template.positions() for template in templates()]
    for a, b in itertools.combinations(tables, 2):
        assert len(a) != len(b) or any(x.isdisjoint(y) for x, y in zip(a, b, strict=True)), (a, b)


def test_positions_hold_what_fill_writes() -> None:
    for template in templates():
        table = template.positions()
        for number in range(0, 2**37, 2**34 + 12345):
            words = template.fill(number).split(" ")
            assert len(words) == len(table)
            assert all(word in choices for word, choices in zip(words, table, strict=True))


def test_permutation_is_one_to_one_and_scatters() -> None:
    indices = [*range(50_000), *range(english.N_SENTENCES - 50_000, english.N_SENTENCES)]
    images = [english._permute(i) for i in indices]
    assert len(set(images)) == len(images)
    assert max(images) < english.N_SENTENCES
    counts = [0] * 64
    for image in images:
        counts[image & 63] += 1
    assert min(counts) > 1300 and max(counts) < 1830  # 1562 each, give or take 6 sigma


def test_sentences_differ_within_and_across_splits_and_seeds() -> None:
    sets = [
        {corpus.sentence(i) for i in range(70_000)}
        for corpus in (Corpus("train"), Corpus("eval"), Corpus("train", seed=1))
    ]
    assert all(len(one) == 70_000 for one in sets)
    assert len(set.union(*sets)) == 210_000


def test_sentences_read_like_sentences() -> None:
    corpus = Corpus("eval", seed=3)
    for i in range(20_000):
        sentence = corpus.sentence(i)
        assert re.fullmatch(r"[A-Z][A-Za-z ,;]+[.?]", sentence), sentence
        assert not re.search(r"\ba [aeio]|\ban [bcdfgjklmnpqrstvwxyz]", sentence.lower()), sentence
        assert BANNED.isdisjoint(re.findall("[a-z]+", sentence.lower())), sentence


def test_random_access_is_repeatable_and_bounded() -> None:
    corpus = Corpus("train", seed=2)
    assert corpus.sentence(10**12) == Corpus("train", seed=2).sentence(10**12)
    assert corpus.sentence(0) == Corpus("train", seed=0).sentence(2 * english.SEED_STRIDE)
    for bad in (-1, english.N_SENTENCES):
        with pytest.raises(IndexError, match="not in"):
            corpus.sentence(bad)
    with pytest.raises(ValueError, match="dev"):
        Corpus("dev")  # type: ignore[arg-type]


def test_digest_tells_corpora_apart_and_text_is_frozen() -> None:
    digests = {Corpus(split, seed).digest for split in ("train", "eval") for seed in (0, 1)}  # type: ignore[arg-type]
    assert len(digests) == 4
    assert Corpus("eval").sentence(0) == (
        "The terrace at Greystone, which Lucian visited without any help, stood behind the southern hillside."
    )
    assert Corpus("train").sentence(0) == (
        "The restaurant at Winterton, which Ottilie visited without any delay, stood beyond the inviting slope."
    )
