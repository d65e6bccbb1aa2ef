import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weighted_mtp.pipelines.reports.tokens.marked_text import Excerpt, mark_style, marked


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def show(
    tokenizer: PreTrainedTokenizerBase, text: str, weights: list[float], typical: float = 1.0, **ends: bool
) -> Text:
    ids = np.array(tokenizer(text)["input_ids"])
    settings = {"begins": True, "ends": True} | ends
    return marked(Excerpt("doc", 0, ids, np.array(weights, np.float32), **settings), tokenizer, typical)


def test_dropped_tokens_stand_in_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    text = show(tokenizer, "ab cd ef", [np.nan, 1, 1, 0, 0, 1, 1, 1])
    assert text.plain == "ab ‹cd› ef"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["c"] == "dim"
    assert styles["f"].startswith("black on #")


def test_spaces_that_are_all_that_is_dropped_stay_inside(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show(tokenizer, "a  b", [1, 0, 0, 1]).plain == "a‹  ›b"


def test_the_space_before_a_word_stays_outside() -> None:
    vocabulary = {symbol: index for index, symbol in enumerate(["a", "b", "\u0120", "\u0120b"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert show(words, "a b b b", [1, 0, 0, 1]).plain == "a ‹b b› b"


def test_weights_that_differ_are_marked_as_light_heavy_and_negative(tokenizer: PreTrainedTokenizerBase) -> None:
    weights = [0.4999, 0.5, 1, 1.9999, 2, 8, -0.1, -9]
    assert show(tokenizer, "abcdefgh", weights).plain == "‹a›bcd«ef»-‹gh›-"
    assert show(tokenizer, "abcdefgh", [10 * w for w in weights], 10).plain == "‹a›bcd«ef»-‹gh›-"


def test_equal_weights_are_plain_whatever_rounding_made_of_their_mean(tokenizer: PreTrainedTokenizerBase) -> None:
    weight = float(np.float32(1 / 0.6))
    for typical in (weight * (1 - 1e-9), weight, weight * (1 + 1e-9)):
        assert show(tokenizer, "ab", [weight, weight], typical).plain == "ab"
        assert mark_style(weight, typical) == mark_style(weight, weight)


def test_line_breaks_are_kept_and_control_characters_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show(tokenizer, "a\nb\t\x1b", [1, 1, 1, 0, 1]).plain == "a↵\nb‹\\t›\\x1b"


def test_bytes_of_one_character_are_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show(tokenizer, "aéb", [1, 0, 0, 1]).plain == "a‹é›b"
    assert show(tokenizer, "aéb", [1, 0, 1, 1]).plain == "aéb"
    cut = np.array(tokenizer("aé")["input_ids"][:2])
    assert marked(Excerpt("doc", 0, cut, np.ones(2, np.float32), True, True), tokenizer, 1).plain == "a\ufffd"


def test_what_is_cut_off_is_hinted_at(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show(tokenizer, "ab", [1, 0], begins=False, ends=False).plain == "… a‹b› …"


def test_marks_are_readable_without_colours(tokenizer: PreTrainedTokenizerBase) -> None:
    page = Console(file=io.StringIO(), width=80)
    page.print(show(tokenizer, "ab [bold]cd", [1, 0] + [1] * 9))
    assert page.file.getvalue() == "a‹b› [bold]cd\n"
