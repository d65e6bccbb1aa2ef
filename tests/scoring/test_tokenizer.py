from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.tokenizer import load_tokenizer


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizer_that_cannot_be_loaded(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer .*cannot be loaded") as error:
        load_tokenizer(tmp_path, f"--tokenizer {tmp_path}: cannot be loaded", "give another one")
    assert "\n" not in str(error.value)
