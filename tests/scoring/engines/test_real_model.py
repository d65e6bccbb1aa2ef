"""A real pretrained model on real text: all engines against a plain loop."""

from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(smollm2.package() is None, reason=smollm2.MISSING)]
LENGTH = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2")
    smollm2.write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def rows(checkpoint: Path) -> list[np.ndarray]:
    return smollm2.real_rows(AutoTokenizer.from_pretrained(checkpoint), 8, LENGTH)


@pytest.fixture(scope="module")
def losses(checkpoint: Path, rows: list[np.ndarray]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    found = []
    for ids in map(torch.from_numpy, rows):
        with torch.inference_mode():
            logits = model(ids[None].long()).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[1:].long(), reduction="none").numpy())
    return found


def test_the_model_predicts_real_text(rows, losses):
    assert len({len(ids) for ids in rows}) > 2
    mean = np.concatenate(losses).mean()
    assert 1.5 < mean < 3.5, "a random model has ln(49152) = 10.8 nats"


@pytest.mark.parametrize(("name", "tolerance"), [("transformers", 1e-5), ("vllm", 2e-4)])
def test_engines_equal_a_plain_loop(name: str, tolerance: float, checkpoint, rows, losses):
    if name == "vllm":
        pytest.importorskip("vllm")
    method = "pooler" if name == "vllm" else None
    engine = load_engine(checkpoint, EngineConfig(name, method, "float32", 1024, LENGTH, threads=2))
    for scores, expected in zip(engine.score([Request(ids) for ids in rows]), losses, strict=True):
        np.testing.assert_allclose(scores[0, 1:], expected, rtol=0, atol=tolerance)
