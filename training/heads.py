"""Parallel multi-token-prediction heads: modules that turn the trunk's work into hidden states for later tokens.

The unembedding is shared by all heads and is the trunk's own, and offset 1 is the trunk's own path, so a model without
extra heads is an ordinary language model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from schemas.errors import UserError

LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class ResidualHead(nn.Module):
    """`x + SiLU(W x)` on the trunk's output, W = 0 at the start (Medusa, arXiv 2401.10774, section 2.1.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) to (..., D); rows are independent."""
        return hidden_states + nn.functional.silu(self.linear(hidden_states))


def decoder_parts(decoder: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layers and the final norm of a Hugging Face trunk.

    Raises:
        UserError: the architecture names them otherwise than all known ones do.
    """
    layers = next((getattr(decoder, name) for name in LAYER_NAMES if hasattr(decoder, name)), None)
    norm = next((getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name)), None)
    if layers is None or norm is None:
        raise UserError(f"{type(decoder).__name__}: decoder layers or final norm not found; use --heads.block residual")
    return layers, norm


@contextmanager
def recorded_call(layer: nn.Module) -> Iterator[dict[str, Any]]:
    """Record the arguments of the next call of `layer`: `args` and `kwargs`, the hidden states among them."""
    call: dict[str, Any] = {}
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: call.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    try:
        yield call
    finally:
        hook.remove()


def run_layer(layer: nn.Module, call: dict[str, Any]) -> Tensor:
    """Run `layer` in the place of the recorded one; returns hidden states (B, T, D)."""
    output = layer(*call["args"], **call["kwargs"])
    return output[0] if isinstance(output, tuple) else output
