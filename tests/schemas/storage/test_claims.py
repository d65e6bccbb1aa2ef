import json
from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.claims import claim_output, release_output
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.schemas.storage.locks import exclusive


def test_claim_output_continues_the_same_request_and_refuses_another(tmp_path: Path) -> None:
    assert claim_output(tmp_path, json.dumps({"x": 1})) is False
    assert claim_output(tmp_path, json.dumps({"x": 1})) is True
    (tmp_path / PROGRESS / "shard.parquet").touch()
    with pytest.raises(UserError, match=r"unfinished run with other settings \(x\).*--output"):
        claim_output(tmp_path, json.dumps({"x": 2}))
    release_output(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert claim_output(tmp_path, json.dumps({"x": 2})) is False


def test_a_claim_without_finished_work_is_replaced(tmp_path: Path) -> None:
    claim_output(tmp_path, json.dumps({"x": 1}))
    assert claim_output(tmp_path, json.dumps({"x": 2})) is False
    assert claim_output(tmp_path, json.dumps({"x": 2})) is True
    (tmp_path / PROGRESS / "request.json").unlink()  # as a kill between making the folder and the file leaves it
    assert claim_output(tmp_path, json.dumps({"x": 3})) is False


def test_claim_output_leaves_foreign_things_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already holds something else"):
        claim_output(tmp_path, "{}")
    with pytest.raises(UserError, match="is, or lies below, a file"), exclusive(tmp_path / "thesis.tex"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
