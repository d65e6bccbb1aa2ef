"""Lets Hugging Face's `Trainer`, and trainers derived from it, train a model of transformers with weights.

Models of transformers return their own loss, and `Trainer` gives them `labels` and the number of targets of an
optimizer step. A model keeps this contract here and accepts `weights` in addition. `MTPModel` does so by itself.
"""

import inspect
from types import MethodType
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.loss.multi_head import weighted_linear_cross_entropy
from weighted_mtp.training.loss.normalizer import mean_if_labelled
from weighted_mtp.training.loss.shifted_targets import select_targets
from weighted_mtp.training.model.trunk import check_trunk, choose_factors_by_document, decoder_of, softcap


def add_weighted_loss(model: PreTrainedModel | PeftModel) -> None:
    """Make a causal language model accept `weights`, in place; without them, it works as before.

    `model(input_ids=..., position_ids=..., weights=..., labels=...)` with a batch of `packed_rows` then returns the
    weighted loss of the next token, divided by `num_items_in_batch` or the number of labels. Without labels, the loss
    is a sum. There are no logits in the output: they are never all in memory, and targets of weight 0 have none.
    Documents are kept apart by `position_ids` alone.

    Args:
        model: on its device, before a trainer wraps it. Adapters may have been added or may follow.

    Raises:
        UserError: the model computes its logits in an unsupported way, or mixes packed documents.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    choose_factors_by_document(base)
    check_trunk(base, base.name_or_path or type(base).__name__)
    plain_forward = base.forward.__func__  # unbound: copies of the model must not run this one
    signature = inspect.signature(plain_forward)

    def forward(self: Any, *args: Any, weights: Tensor | None = None, **kwargs: Any) -> Any:
        if weights is None:
            return plain_forward(self, *args, **kwargs)
        return _forward_with_weights(self, *args, weights=weights, **kwargs)

    # Trainer removes columns that the signature does not name. `functools.wraps` would also set `__wrapped__`, through
    # which accelerate restores the forward of a model after training.
    *named, last = signature.parameters.values()
    added = inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None)
    ordered = [*named, added, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [*named, last, added]
    forward.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)


def _forward_with_weights(
    model: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    weights: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **others: Any,
) -> CausalLMOutputWithPast:
    """The loss of packed rows (B, T); further arguments of transformers' models change nothing in it."""
    if attention_mask is not None:
        raise UserError("weights: give position_ids that restart at 0 in every document, without an attention_mask")
    rows, targets, of_rows = select_targets(input_ids, position_ids, weights, 1)
    decoder, unembedding = decoder_of(model), model.get_output_embeddings()
    states = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state  # (B, T, D)
    total, _ = weighted_linear_cross_entropy(
        states.flatten(0, 1)[rows],
        unembedding.weight,
        targets,
        of_rows,
        bias=unembedding.bias,
        softcap=softcap(model),
    )
    return CausalLMOutputWithPast(loss=mean_if_labelled(total, labels, num_items_in_batch))


def weighted_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The weighted loss as a `compute_loss_func`, for trainers that take the labels away from the model.

    Args:
        outputs: of a model prepared with `add_weighted_loss`, or of `MTPModel`, called with weights but no labels.
        labels: (B, T) int64, -100 for tokens that are no targets.
        num_items_in_batch: number of targets of the optimizer step; by default those of the labels.

    Returns:
        The loss to minimise, a scalar.

    Raises:
        UserError: the model returned no loss.
    """
    if isinstance(outputs, dict) and "loss" not in outputs:
        raise UserError("weighted_loss: the model returned no loss; prepare it with add_weighted_loss()")
    return mean_if_labelled(outputs[0], labels, num_items_in_batch)
