"""Direct multi-token decoding: the last layers learn to predict several tokens from one pass of those before them.

The layers of the trunk are split into encoding, thinking and decoding layers (DMTD, arXiv 2510.11958). In a cycle of
tau positions only the first passes what the thinking layers found on: the decoding layers read

    h_enc[t] + h_think[t] * [t mod tau == 0]

with h_enc the hidden states after the encoding layers (the embeddings if there are none) and h_think those after the
thinking layers. Both are the residual stream, so h_think contains h_enc, which counts twice at the start of a cycle, as
in the authors' code. All positions pass all layers, and every one predicts its next token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from weighted_mtp.schemas.configs import DirectDecodingConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.trunk import LayerCall, decoder_parts, recorded_call


class FirstDecodingLayer(nn.Module):
    """Stands where a trunk has its first decoding layer, and hands that layer what it is to read.

    A hook of the layer itself would run inside activation checkpointing, and so again in the backward pass, when the
    encoding layers' output of that moment is another.
    """

    def __init__(self, layer: nn.Module, encoding: LayerCall, starts: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.encoding = encoding
        self.starts = starts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # architectures ask layers for what they are

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with the output of the encoding layers, and at `starts` that of the thinking layers added."""
        mixed = self.encoding.hidden_states + hidden_states * self.starts[..., None].to(hidden_states.dtype)
        return self.layer(mixed, *args, **kwargs)


def check_split(trunk: Any, config: DirectDecodingConfig) -> None:
    """Make sure that a trunk has encoding, decoding and some thinking layers.

    Raises:
        UserError: it has too few layers, or hides them.
    """
    total = len(decoder_parts(trunk)[0])
    if config.encoding_layers + config.decoding_layers >= total:
        raise UserError(
            f"--heads.dmtd: {config.encoding_layers} encoding and {config.decoding_layers} decoding layers leave none "
            f"of the model's {total} to think; give fewer"
        )


@contextmanager
def decoding_cycle(trunk: Any, config: DirectDecodingConfig, position_ids: Tensor) -> Iterator[None]:
    """Inside, a pass of the trunk over packed rows follows the cycle; position_ids (B, T) int64 give the phases."""
    layers, _ = decoder_parts(trunk)
    first = len(layers) - config.decoding_layers
    layer = layers[first]
    with recorded_call(layers[config.encoding_layers]) as encoding:
        layers[first] = FirstDecodingLayer(layer, encoding, position_ids % config.cycle == 0)
        try:
            yield
        finally:
            layers[first] = layer
