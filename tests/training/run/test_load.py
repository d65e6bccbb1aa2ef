"""A trained run as a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import logged, trained

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.training_run import SUMMARY
from weighted_mtp.training.data.packed_rows import packed_rows
from weighted_mtp.training.run.load import load_run
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration


def test_the_model_has_the_parameters_and_heads_of_the_run(config: Callable[..., TrainConfig]) -> None:
    run = config("run", max_steps=2, heads={"offsets": (1, 3)})
    train(run)
    model = load_run(run.output)
    assert not model.training
    assert model.heads_config.offsets == (1, 3)
    own = model.trunk.state_dict() | model.heads.state_dict()
    for name, values in trained(run).items():
        torch.testing.assert_close(own[name], values, rtol=0, atol=0)
    rows = packed_rows(run.eval_input[0], sequence_length=64, batch_size=16)
    with torch.no_grad():  # the held-out set has sequences of up to 120 tokens, which fill fewer rows than these
        _, sums = model(*(next(iter(rows))[name] for name in ("input_ids", "position_ids", "weights")))
    near, far = (sums.plain_loss / sums.selected).tolist()
    last = logged(run)[-1]
    assert near == pytest.approx(last["eval_loss_1"], rel=0.05)
    assert far == pytest.approx(last["eval_loss_3"], rel=0.05)


def test_what_is_no_finished_run_is_refused(config: Callable[..., TrainConfig], model_dir: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="llama-0: not a training run; give the output directory of 'wmtp train'"):
        load_run(model_dir())
    run = config("run", max_steps=1)
    train(run)
    heads = run.output / "heads"
    settings = json.loads((heads / "config.json").read_text())
    for offsets, reason in (
        ([1, 2, 3], r"cannot be loaded \(Error\(s\) in loading state_dict for ResidualHeads: Missing key"),
        (list(range(1, 1000)), r"config.json: cannot be read \(offsets: Tuple should have at most 256 items"),
    ):
        (heads / "config.json").write_text(json.dumps(settings | {"offsets": offsets}))
        with pytest.raises(UserError, match=reason):
            load_run(run.output)
    shutil.rmtree(heads)
    with pytest.raises(
        UserError, match=r"heads/config.json: is missing; restore it, or use .*/run/model, which has no"
    ):
        load_run(run.output)
    (run.output / SUMMARY).unlink()
    with pytest.raises(UserError, match="this training run is not finished"):
        load_run(str(run.output))
