"""Batches for `Trainer` from packed rows or from separate sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.training.rows import IGNORED

DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "weights": torch.float32,
    "attention_mask": torch.bool,
}


def collate_rows(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Batch rows of `packed_rows`, or sequences with weights, as a `data_collator` of Hugging Face's `Trainer`.

    Args:
        features: B rows. Each has `input_ids` and `weights`, sequences or tensors (T,); `weights[t]` is the weight of
            token t as a target. `position_ids` (T,) restart at 0 in every document; without them, the row is one
            document. `labels` (T,) are -100 for tokens that are no targets; without them, every token is a target.
            Tokens whose `attention_mask` is 0 are padding and left out. Rows may have different T. Other keys are
            ignored.

    Returns:
        `input_ids`, `position_ids`, `labels` and `weights` (B, L) as in `packed_rows`, where L is the longest T.

    Raises:
        UserError: there are no tokens, or a row has no ids, no weights, weights that are NaN or infinite for a target,
            values of unequal lengths, or values that are no list of numbers.
    """
    rows = [_tensors(feature) for feature in features]
    if not any(len(row["input_ids"]) for row in rows):
        raise UserError("collate_rows: no tokens; give at least one row that has some")
    padding = {"input_ids": 0, "position_ids": 0, "labels": IGNORED, "weights": 0.0}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def _tensors(feature: Mapping[str, Any]) -> dict[str, Tensor]:
    """The four tensors (T,) of a row; the first token of a document is no target."""
    if "weights" not in feature:
        raise UserError(
            "collate_rows: a row has no 'weights'; name the column so. If Trainer removed it, prepare the model with "
            "add_weighted_loss() or load_model(), or set remove_unused_columns=False"
        )
    if "input_ids" not in feature:
        raise UserError("collate_rows: a row has no 'input_ids'; name the column so")
    given = {name: _values(feature[name], name, dtype) for name, dtype in DTYPES.items() if name in feature}
    if len({len(values) for values in given.values()}) > 1:
        raise UserError("collate_rows: the values of a row differ in length; give one of each for every token")
    if (mask := given.get("attention_mask")) is not None:
        given = {name: values[mask] for name, values in given.items()}
    ids, weights = given["input_ids"], given["weights"]
    positions, labels = given.get("position_ids", torch.arange(len(ids))), given.get("labels", ids)
    labels = labels.masked_fill(positions == 0, IGNORED)
    weights = weights.masked_fill(labels == IGNORED, 0.0)
    if not weights.isfinite().all():
        raise UserError("collate_rows: a weight is NaN or infinite; use token_weights(), or give such tokens 0")
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights}


def _values(given: Any, name: str, dtype: torch.dtype) -> Tensor:
    """The values (T,) of a row under a name."""
    try:
        values = torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"collate_rows: '{name}' of a row is no list of numbers ({first_line(error)})") from error
    if values.ndim != 1:
        raise UserError(f"collate_rows: '{name}' of a row has {values.ndim} dimensions; give a number for every token")
    return values
