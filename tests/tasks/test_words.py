"""Keys and values: upstream's word list by arithmetic, and its two halves."""

import random
from hashlib import md5

import pytest

from gdn2.errors import DataError
from tasks.ruler import words
from tasks.ruler.words import WordPairs, draw, filler, held_out, word_pairs


def test_the_ends_of_the_list() -> None:
    pairs = word_pairs()
    assert len(pairs) == 6_171_620
    assert pairs[0] == "Early-ATM" and pairs[-1] == pairs[6_171_619] == "zonked-zucchini"
    with pytest.raises(IndexError):
        pairs[6_171_620]
    assert pairs[10:13] == [pairs[10], pairs[11], pairs[12]]


@pytest.mark.slow
def test_the_whole_list_is_upstreams() -> None:
    assert md5("\n".join(word_pairs()).encode()).hexdigest() == "4a7f9c3b49fe55cef60c7b06e9746739"


def test_interleaving_families_are_sorted_together() -> None:
    adjectives = ["blue", "blue-eyed", "bluest", "high", "high-pitched", "a", "B", "wide-eyed", "wide"]
    nouns = ["eye", "egg", "zoo", "pit", "eyed-cat", "Ox"]
    want = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
    assert list(WordPairs(adjectives, nouns)) == want


def test_neighbours_are_in_order_around_every_family() -> None:
    pairs = word_pairs()
    nouns = len(pairs) // 910
    for first in ("blue-", "high-", "old-", "teeny-", "wide-"):
        start = next(i for i in range(0, len(pairs), nouns) if pairs[i].startswith(first))
        span = pairs[start - 2 : start + 2 * nouns + 2]
        assert span == sorted(set(span))


def test_choice_draws_what_upstream_draws() -> None:
    """`random.choice` needs a length and an item, so the same index comes out as from a list."""
    assert random.Random(42).choice(word_pairs()) == word_pairs()[random.Random(42).choice(range(6_171_620))]


def test_other_word_lists_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(words.LIST_DIGESTS, "nounlist.txt", "0" * 64)
    word_pairs.cache_clear()
    with pytest.raises(DataError, match=r"3\.0\.1"):
        word_pairs()
    word_pairs.cache_clear()


def test_halves() -> None:
    rng = random.Random(1)
    texts = [words.DRAW[kind](rng) for kind in words.KINDS for _ in range(1000)]
    share = sum(map(held_out, texts)) / len(texts)
    assert 0.46 < share < 0.54
    assert all(held_out(text) for text in texts if filler(text))
    assert held_out("1234567") == held_out("1234567")
    assert all(held_out(draw(kind, rng, held_out)) for kind in words.KINDS)


def test_shapes_of_values() -> None:
    rng = random.Random(2)
    assert all(len(words.number(rng)) == 7 for _ in range(100))
    made = words.uuid(rng)
    assert len(made) == 36 and made[14] == "4" and made == made.lower()
