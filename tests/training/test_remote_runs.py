"""Training from an object store, and into one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from pipelines.evaluate import run as evaluate
from schemas.configs import EvaluateConfig, TrainConfig
from schemas.files import copy_files
from schemas.locations import Location
from schemas.shard_set import ShardSet
from training.trainer import train

LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70] * 2
SETTINGS: dict[str, Any] = {
    "weights": {"preset": "dense"},
    "heads": {"offsets": (1, 2)},
    "optimizer": {"learning_rate": 1e-2},
    "sequence_length": 64,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 6,
    "checkpoint_every": 2,
    "log_every": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weighted-mtp"


@pytest.fixture
def config(
    s3: UPath, tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(output, place, **changes)` are the settings of a short run that reads everything from `place`."""
    shards = scored_set(LENGTHS)
    model = model_dir()
    for name, source in {"set": shards.path, "set/tokenizer": shards.tokenizer_path, "model": model}.items():
        copy_files(source, s3 / name)
    places: dict[str, tuple[Location, Location]] = {"disk": (shards.path, model), "store": (s3 / "set", s3 / "model")}

    def build(output: Location, place: str = "disk", **changes: Any) -> TrainConfig:
        given, trunk = places[place]
        return TrainConfig(**(SETTINGS | {"input": given, "model": str(trunk), "output": output} | changes))

    return build


def test_a_remote_set_and_model_train_as_local_ones_do(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    local = config(tmp_path / "local")
    remote = config(tmp_path / "remote", "store")
    assert train(local)["loss"] == train(remote)["loss"]
    assert train(local.model_copy(update={"input": remote.input, "model": remote.model}))["already_complete"]
    assert evaluate(EvaluateConfig(model=remote.model, input=remote.input))[0].loss == pytest.approx(
        evaluate(EvaluateConfig(model=local.model, input=local.input))[0].loss
    )
