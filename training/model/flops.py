"""Floating-point operations (FLOPs) of a training step and peak rates of devices, for model FLOP utilisation (MFU)."""

import torch
from torch import Tensor, nn

from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.model.trunk import attention_width, decoder_of

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Dense bfloat16 peak of devices by part of their name, in 10^12 operations per second (vendors' data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bfloat16 operations per second of a GPU, None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


class StepFlops:
    """Counts the FLOPs of forward and backward passes: two per multiplication in a matrix product.

    These are model FLOPs (PaLM, arXiv 2204.02311, appendix B). They exclude recomputation, and rows of weight 0 at the
    unembedding. A trainable matrix counts three times: for the output, and for the gradients of input and matrix.

    Attributes:
        token: operations of trunk and heads per token.
        pair: operations of attention per (query, key) pair.
        row: operations of the unembedding per selected row.
        head_row: additional operations per selected row of an extra head.
        order_row: operations of token order prediction per selected row.
    """

    def __init__(self, model: MTPModel) -> None:
        trunk, config = model.trunk, model.trunk.config.get_text_config()
        modules = [module for module in decoder_of(trunk).modules() if not isinstance(module, nn.Embedding)]
        matrices = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2]
        learning = sum(p.requires_grad for p in matrices)
        # With adapters only, the frozen matrices need no gradients, but their inputs do.
        passes = 3 if learning == len(matrices) else 2 if learning else 1
        heads = model.heads.flops(config)
        self.token = 2.0 * passes * sum(p.numel() for p in matrices) + heads.token
        attention_passes = 3 if learning else 1
        self.pair = 4.0 * attention_passes * config.num_hidden_layers * attention_width(config) + heads.pair
        unembedding = trunk.get_output_embeddings().weight
        self.row = 2.0 * (3 if unembedding.requires_grad else 2) * unembedding.numel()
        self.head_row = heads.row
        self.order_row = 0.0 if model.top is None else 2.0 * (3 if learning else 2) * model.top.weight.numel()
        self.offsets = len(model.heads_config.offsets)

    def __call__(self, tokens: float, pairs: float, selected: Tensor) -> float:
        """FLOPs of a batch of rows.

        Args:
            tokens: number of tokens.
            pairs: number of (query, key) pairs of attention.
            selected: (P,) number of rows selected for each prediction (`HeadSums.selected`).
        """
        rows, further = selected[: self.offsets], selected[self.offsets :]
        heads = rows.sum() * self.row + rows[1:].sum() * self.head_row
        if self.order_row:
            heads = heads + further[0] * self.order_row
        return tokens * self.token + pairs * self.pair + float(heads)
