"""Batches for `Trainer` from packed rows or from separate sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.rows import IGNORED


def collate_rows(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Batch rows of `packed_rows`, or sequences with weights, as a `data_collator` of Hugging Face's `Trainer`.

    Args:
        features: B rows. Each has `input_ids` and `weights`, sequences or tensors (T,); `weights[t]` is the weight of
            token t as a target. `position_ids` (T,) restart at 0 in every document; without them, the row is one
            document. `labels` (T,) are -100 for tokens that are no targets; without them, every token is a target.
            Rows may have different T. Other keys are ignored.

    Returns:
        `input_ids`, `position_ids`, `labels` and `weights` (B, L) as in `packed_rows`, where L is the longest T.

    Raises:
        UserError: a row has no weights, weights that are NaN or infinite for a target, or values of unequal lengths.
    """
    rows = [_tensors(feature) for feature in features]
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
    ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
    given = {"position_ids": torch.arange(len(ids)), "labels": ids, **feature}
    positions, labels = (torch.as_tensor(given[name], dtype=torch.int64) for name in ("position_ids", "labels"))
    weights = torch.as_tensor(given["weights"], dtype=torch.float32)
    if len({len(values) for values in (ids, positions, labels, weights)}) > 1:
        raise UserError("collate_rows: the values of a row differ in length; give one of each for every token")
    labels = labels.masked_fill(positions == 0, IGNORED)
    weights = weights.masked_fill(labels == IGNORED, 0.0)
    if not weights.isfinite().all():
        raise UserError("collate_rows: a weight is NaN or infinite; use token_weights(), or give such tokens 0")
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights}
