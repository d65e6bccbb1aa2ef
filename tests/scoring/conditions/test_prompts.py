from collections.abc import Callable

import numpy as np

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.conditions.prompts import Prompt, make_prompt

BOS = 256


def test_a_prompt_goes_before_the_sequence_but_after_its_bos():
    prompt = Prompt("ab", (7, 8))
    for ids, bos, prompted, first in (
        ([1, 2], BOS, [7, 8, 1, 2], 2),
        ([1, 2], None, [7, 8, 1, 2], 2),
        ([BOS, 1], BOS, [BOS, 7, 8, 1], 3),
        ([BOS], BOS, [BOS, 7, 8], 3),
    ):
        found, first_scored = prompt.before(np.array(ids, np.int32), bos)
        assert found.dtype == np.int32
        assert (found.tolist(), first_scored) == (prompted, first)


def test_a_prompt_has_the_token_ids_of_its_text_without_special_tokens(make_shard_set: Callable[..., ShardSet]):
    tokens = make_shard_set([[1, 2]])
    prompt = make_prompt("abc", "--conditions.worse.prompt", tokens)
    assert prompt is not None
    assert prompt.text == "abc"
    assert len(prompt.input_ids) == 3
    assert BOS not in prompt.input_ids
    assert make_prompt("", "--conditions.plain.prompt", tokens) is None
