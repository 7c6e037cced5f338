"""A source of documents that needs no tasks: copy a digit string seen before. Workers import it by name."""

import random

import numpy as np

from gdn2.errors import UserError

TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


class Copies:
    def __init__(self, seed: int, split: str, length: tuple[int, int]) -> None:
        self.seed, self.split, self.length = seed, split, length

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        n = rng.randint(*self.length)
        secret = [rng.randrange(4, 14) for _ in range(3)]
        filler = [rng.randrange(14, 20) for _ in range(n - 9)]
        ids = [0, 1, *secret, *filler, 2, *secret]
        weights = np.full(len(ids), 0.1, dtype=np.float32)
        weights[0], weights[-3:] = 0, 1
        return np.array(ids, dtype=np.int32), weights


def open_copies(tokenizer: object, mixture: dict, seed: int, split: str) -> Copies:
    if mixture["bare"]:
        raise UserError("copies cannot be bare")
    return Copies(seed, split, mixture["length"])
