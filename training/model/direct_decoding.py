"""Direct multi-token decoding (DMTD): the last layers learn to predict several tokens from one pass of the others.

The layers of the trunk are split into encoding, thinking and decoding layers (arXiv 2510.11958). In a cycle of tau
positions the decoding layers read the output of the thinking layers only at the first position:

    h_enc[t] + h_think[t] * [t mod tau == 0]

Here h_enc are the hidden states after the encoding layers (the embeddings if there are none), and h_think those after
the thinking layers. Both are the residual stream. h_think contains h_enc, so h_enc counts twice when a cycle starts, as
in the authors' code. All positions pass through all layers, and each predicts its next token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from weighted_mtp.schemas.configs import DirectDecodingConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.trunk import LayerCall, decoder_parts, recorded_call


class FirstDecodingLayer(nn.Module):
    """Wraps the first decoding layer of a trunk and changes its input.

    A hook on the layer itself would run inside activation checkpointing, and again in the backward pass, when the
    recorded output of the encoding layers has changed.
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
            return getattr(self.layer, name)  # models read attributes such as `attention_type` of their layers

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the output of the encoding layers; at `starts`, add the output of the thinking layers."""
        mixed = self.encoding.hidden_states + hidden_states * self.starts[..., None].to(hidden_states.dtype)
        return self.layer(mixed, *args, **kwargs)


def check_split(trunk: Any, config: DirectDecodingConfig) -> None:
    """Check that encoding and decoding layers leave at least one thinking layer.

    Raises:
        UserError: the trunk has too few layers, or unknown names for them.
    """
    total = len(decoder_parts(trunk)[0])
    if config.encoding_layers + config.decoding_layers >= total:
        raise UserError(
            f"--heads.dmtd: {config.encoding_layers} encoding and {config.decoding_layers} decoding layers leave none "
            f"of the model's {total} layers for thinking; use fewer"
        )


@contextmanager
def decoding_cycle(trunk: Any, config: DirectDecodingConfig, position_ids: Tensor) -> Iterator[None]:
    """Within the context, the trunk runs in cycles over packed rows with these position_ids (B, T) int64."""
    layers, _ = decoder_parts(trunk)
    first = len(layers) - config.decoding_layers
    layer = layers[first]
    with recorded_call(layers[config.encoding_layers]) as encoding:
        layers[first] = FirstDecodingLayer(layer, encoding, position_ids % config.cycle == 0)
        try:
            yield
        finally:
            layers[first] = layer
