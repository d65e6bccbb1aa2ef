"""From losses of real engines to weights: stored scores, thresholds and weights are what NumPy makes of the losses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weighted_mtp.schemas.configs import PrepareConfig, ScoreConfig
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.scoring.engines.base import Request
from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine
from weighted_mtp.scoring.job.run import score
from weighted_mtp.training.weighting.token_weights import token_weights

pytestmark = pytest.mark.integration


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest multiple of 1/512 below 4, the nearest float16 above; float32."""
    return np.where(np.abs(values) < 4, np.round(values * 512) / 512, values.astype(np.float16)).astype(np.float32)


@pytest.mark.usefixtures("score_here")
def test_scores_thresholds_and_weights_are_those_of_the_losses_rounded_in_numpy(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[bytes, list[np.ndarray]] = {}  # float32 losses of both models, by token ids
    measure = TransformersEngine.score

    def recording(self: TransformersEngine, requests: list[Request]) -> list[np.ndarray]:
        results = measure(self, requests)
        for request, result in zip(requests, results, strict=True):
            losses.setdefault(request.input_ids.tobytes(), []).append(result[0])
        return results

    monkeypatch.setattr(TransformersEngine, "score", recording)
    texts = [f"Line {number}: {'foxes ' * (number % 7)}jump over {number * 37} dogs." for number in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    reference, base = str(make_model(0)), str(make_model(1))
    prepare(PrepareConfig(input=str(tmp_path / "corpus.jsonl"), tokenizer=base, output=tmp_path / "tokens", workers=1))
    config = ScoreConfig(
        input=tmp_path / "tokens", output=tmp_path / "scored", reference=reference, base=base, engine="transformers"
    )
    shards = score(config)

    sequences = list(shards.sequences())
    exact = [losses[sequence.input_ids.tobytes()] for sequence in sequences]
    for sequence, (of_reference, of_base) in zip(sequences, exact, strict=True):
        assert of_reference.dtype == of_base.dtype == np.float32
        expected = {"loss_reference": of_reference, "loss_base": of_base, "excess_loss": of_base - of_reference}
        for name, values in expected.items():
            np.testing.assert_array_equal(sequence.columns[name][1:], rounded(values)[1:])
            assert np.isnan(sequence.columns[name][0])
    assert any(np.any(rounded(values)[1:] != values[1:]) for pair in exact for values in pair), "rounding has to matter"

    excess = rounded(np.concatenate([of_base[1:] - of_reference[1:] for of_reference, of_base in exact]))
    threshold = np.sort(excess)[::-1][int(np.ceil(0.6 * len(excess))) - 1]  # ties are kept
    kept = (excess >= threshold).astype(np.float32)
    found = np.concatenate([weights[1:] for weights in token_weights(shards, {"formula": "top(excess_loss, 0.6)"})])
    np.testing.assert_array_equal(found, kept)
    normalised = token_weights(shards, {"formula": "normalise(relu(excess_loss))"})
    positive = np.maximum(excess.astype(np.float64), 0)
    np.testing.assert_allclose(
        np.concatenate([weights[1:] for weights in normalised]), positive / positive.mean(), rtol=1e-6
    )
