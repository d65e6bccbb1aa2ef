"""Activation checkpointing and compilation of every decoder layer, including those in heads."""

from typing import Any

import torch

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.model.trunk import decoder_parts


def trunk_layers(model: MTPModel) -> list[Any]:
    """The decoder layers of the trunk.

    Raises:
        UserError: the architecture uses unknown names for its layers.
    """
    return list(decoder_parts(model.trunk)[0])


def all_layers(model: MTPModel) -> list[Any]:
    """The decoder layers of the trunk and the heads."""
    layers = trunk_layers(model)
    return layers + [module for module in model.heads.modules() if isinstance(module, type(layers[0]))]


def checkpoint_activations(model: MTPModel) -> None:
    """Store only the input of each decoder layer, and recompute the layer in the backward pass.

    Raises:
        UserError: the architecture does not support activation checkpointing.
    """
    settings = {"use_reentrant": False}
    try:
        model.trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}; train it without --activation_checkpointing") from error
    first = trunk_layers(model)[0]
    for layer in all_layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = first._gradient_checkpointing_func


def compile_layers(model: MTPModel) -> None:
    """Compile the forward method of every decoder layer, but not the hooks for sharding and recording."""
    for layer in all_layers(model):
        layer.forward = torch.compile(layer.forward)
