"""Token sequences of three short texts, and random scores for them."""

from pathlib import Path

import numpy as np
import pytest

TEXTS = ["first\nline", "second one", "third"]


@pytest.fixture
def sequences(tokenizer_dir: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def scores_of(sequences: list[list[int]], seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [[np.nan, *rng.normal(size=len(ids) - 1)] for ids in sequences]
