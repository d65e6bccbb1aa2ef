"""The examples of `docs/python.md` run, in order, on a tiny corpus."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from weighted_mtp.schemas.shard_set.shard_set import ShardSet

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture
def workplace(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the files that the page asks for."""
    for name, documents in (("corpus", 40), ("held-out", 8)):
        lines = [json.dumps({"text": f"Document {number} of the {name}: foxes jump."}) for number in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for seed, name in enumerate(("reference", "base")):
        shutil.copytree(make_model(seed), tmp_path / "models" / name)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # TRL would send telemetry
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _settings_of_libraries() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger("weighted_mtp").setLevel(logging.NOTSET)


def examples() -> Iterator[tuple[int, str]]:
    """Line number and source of every example."""
    text = PAGE.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: block.start(1)].count("\n"), block[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Trainer without a GPU
@pytest.mark.usefixtures("workplace", "score_here")
def test_the_examples_run_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, object] = {}
    printed = []
    capfd.readouterr()
    for line, source in examples():
        exec(compile("\n" * line + source, str(PAGE), "exec"), variables)
        printed.append(capfd.readouterr())
    assert len(printed) == 16
    assert printed[0] == ("", ""), "prepare and score show nothing"
    assert re.match(r"ShardSet\('scored', [\d,]+ tokens in 40 sequences, columns: ", printed[1].out)
    assert float(printed[2].out) > 0
    sized = variables["sized"]
    assert isinstance(sized, ShardSet)
    assert sized.manifest.corpus.sequence_columns == {"size": "number", "group": "label"}
    assert {sequence.columns["group"] for sequence in sized.sequences(["group"])} == {"long", "short"}
    assert re.match(r"(59|60|61)% of the targets have weight\n", printed[4].out)
    assert re.search(r"'weights': \(2, \d\d\)", printed[11].out)
    assert printed[14].out.count("nats per target") == 2
    assert "evaluate:" in printed[15].err
    assert "tokens: not a shard set" in printed[15].out
