"""Floating point operations of a training step, and what devices can do."""

import torch
from torch import Tensor, nn

from weighted_mtp.training.model.mtp_model import HEAD_SUMS, MTPModel

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Dense bfloat16 peak of a device whose name contains the key, in 10^12 operations a second (vendors' data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of a GPU in dense bfloat16, None where they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


class StepFlops:
    """Counts what forward and backward passes need, two operations for each multiplication of a matrix product.

    Recomputation does not count (model FLOPs, as in PaLM, arXiv 2204.02311, appendix B), nor do rows that never reach
    the unembedding. A matrix that learns counts three times: for the output, and for the gradients of input and matrix.
    """

    def __init__(self, model: MTPModel) -> None:
        trunk, config = model.trunk, model.trunk.config
        modules = [module for module in trunk.get_decoder().modules() if not isinstance(module, nn.Embedding)]
        matrices = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2]
        learning = sum(p.requires_grad for p in matrices)
        # With adapters alone no frozen matrix needs a gradient of its own, but its input does.
        passes = 3 if learning == len(matrices) else 2 if learning else 1
        self.token = 2.0 * passes * sum(p.numel() for p in matrices)
        unembedding = trunk.get_output_embeddings().weight
        self.row = 2.0 * (3 if unembedding.requires_grad else 2) * unembedding.numel()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pair = 4.0 * (3 if learning else 1) * config.num_hidden_layers * config.num_attention_heads * head_dim
        self.order_row = 0.0 if model.top is None else 2.0 * (3 if learning else 2) * model.top.weight.numel()
        self.offsets = len(model.config.offsets)
        self.head_row = 0.0
        if len(model.heads):
            head = 6.0 * sum(p.numel() for p in model.heads.parameters() if p.ndim == 2)
            if model.config.kind == "parallel" and model.config.block == "residual":
                self.head_row = head / len(model.heads)
            else:
                self.token += head
                self.pair += 12.0 * len(model.heads) * config.num_attention_heads * head_dim

    def __call__(self, tokens: float, pairs: float, head_sums: Tensor) -> float:
        """Operations for `tokens` tokens that see `pairs` tokens in all, and sums (P, 6) of the heads (`HEAD_SUMS`)."""
        selected = head_sums[:, HEAD_SUMS.index("selected")]
        rows, further = selected[: self.offsets], selected[self.offsets :]
        heads = rows.sum() * self.row + rows[1:].sum() * self.head_row
        if self.order_row:
            heads = heads + further[0] * self.order_row
        return tokens * self.token + pairs * self.pair + float(heads)
