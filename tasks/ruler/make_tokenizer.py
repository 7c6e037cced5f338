"""Train the zoo's tokenizer: `python -m tasks.ruler.make_tokenizer gdn2/zoo/tokenizer.json`.

Byte-level BPE whose digits stand alone, so that a number is copied digit by digit. It learns from what the zoo's
models learn from: procedural English, RULER's wording, keys and UUIDs, all of the training half. The same command
writes the same file, byte for byte.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tasks.ruler.english import Corpus
from tasks.ruler.templates import NIAH_TASKS, NOISE, query_of
from tasks.ruler.words import draw, held_out

EOS = "<|endoftext|>"
VOCABULARY = 2048
SENTENCES = 60_000
KEYS = 60_000
WORDINGS = 500  # of each task, so that each word of the templates becomes one token


def corpus() -> Iterator[str]:
    """The texts the merges are learnt from."""
    english = Corpus("train", seed=0)
    yield from (english.sentence(i) for i in range(SENTENCES))
    rng = random.Random("the zoo's tokenizer")

    def train(kind: str) -> str:
        return draw(kind, rng, lambda text: not held_out(text))

    yield from (f"for {train('words')} is" for _ in range(KEYS))
    for task in NIAH_TASKS:
        for _ in range(WORDINGS):
            keys = [train(task.key) for _ in range(task.queries)]
            query = query_of(keys)
            yield from (task.needle(key, train(task.value)) for key in keys)
            yield f"{task.introduction}\n{NOISE}\n{task.question(query)} {task.answer_prefix(query)}"


def train_tokenizer(out: Path) -> None:
    """Write the tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(out))


if __name__ == "__main__":
    train_tokenizer(Path(sys.argv[1]))
