"""A Hugging Face language model with multi-token-prediction heads that computes its own weighted loss.

The loss is computed inside `forward` because that is where wrappers (DDP, FSDP, autocast) expect the parameters of the
unembedding to be used.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.configs import HeadsConfig
from schemas.errors import UserError, first_line
from schemas.files import write_text
from schemas.locations import local_copy, local_name, locate
from training.heads import ResidualHead, decoder_parts, recorded_call, run_layer
from training.losses import weighted_linear_cross_entropy
from training.targets import weighted_rows

HEADS_CONFIG = "config.json"
HEADS_WEIGHTS = "heads.safetensors"


class MTPModel(nn.Module):
    """A trunk (`AutoModelForCausalLM`) and one extra head for every offset after the first."""

    trunk: Any  # a PreTrainedModel; nn.Module's own __getattr__ would hide its methods from the type checker

    def __init__(self, trunk: nn.Module, heads: HeadsConfig, head_layers: list[nn.Module]) -> None:
        """Take a trunk and, for `block="decoder"`, the layers that become its extra heads."""
        super().__init__()
        self.trunk = trunk
        self.config = heads
        if heads.block == "residual":
            head_layers = [ResidualHead(self.trunk.config.hidden_size) for _ in heads.offsets[1:]]
        self.heads = nn.ModuleList(head_layers)

    def forward(self, input_ids: Tensor, position_ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss of all heads over packed rows.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, restarting at 0 in every document, 0 for padding.
            weights: (B, T) float32, the weight of each token as a target.

        Returns:
            The sum over offsets k and positions t of `c_k * weights[t+k] * -log P_k(x[t+k] | x[..t])`, a scalar, and
            a (K, 3) float32 tensor without gradients: for each offset the weighted sum of losses, the plain sum over
            the targets of non-zero weight, and how many these are.
        """
        decoder = self.trunk.get_decoder()
        uses_layers = self.config.block == "decoder" and len(self.heads) > 0
        if uses_layers:
            layers, norm = decoder_parts(decoder)
            with recorded_call(layers[-1]) as call:
                output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        else:
            output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        trunk_hidden = output.last_hidden_state.flatten(0, 1)

        hidden, targets, row_weights = [], [], []
        for i, offset in enumerate(self.config.offsets):
            rows, target, weight = weighted_rows(input_ids, position_ids, weights, offset)
            if i == 0:
                hidden.append(trunk_hidden[rows])
            elif uses_layers:
                hidden.append(norm(run_layer(self.heads[i - 1], call)).flatten(0, 1)[rows])
            else:
                hidden.append(self.heads[i - 1](trunk_hidden[rows]))
            targets.append(target)
            row_weights.append(weight)

        counts = [len(target) for target in targets]
        coefficients = torch.tensor(self.config.loss_coefficients, device=input_ids.device)
        scale = coefficients.repeat_interleave(torch.tensor(counts, device=input_ids.device))
        unembedding = self.trunk.get_output_embeddings()
        loss, token_losses = weighted_linear_cross_entropy(
            torch.cat(hidden),
            unembedding.weight,
            torch.cat(targets),
            torch.cat(row_weights) * scale,
            bias=unembedding.bias,
            softcap=getattr(self.trunk.config, "final_logit_softcapping", None),
        )
        sums = [
            torch.stack([(losses * weight).sum(), losses.sum(), losses.new_tensor(len(losses))])
            for losses, weight in zip(token_losses.split(counts), row_weights, strict=True)
        ]
        return loss, torch.stack(sums).detach()

    def save(self, directory: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the trunk as an ordinary Hugging Face checkpoint to `model/` and the heads to `heads/`.

        Args:
            directory: where to.
            state: the whole state dict, needed where this module holds a shard of it.
        """
        state = self.state_dict() if state is None else state
        trunk, heads = (
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for prefix in ("trunk.", "heads.")
        )
        self.trunk.save_pretrained(directory / "model", state_dict=trunk)
        (directory / "heads").mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in heads.items()}, directory / "heads" / HEADS_WEIGHTS)
        write_text(directory / "heads" / HEADS_CONFIG, self.config.model_dump_json(indent=2) + "\n")


def build_model(name: str, heads: HeadsConfig, *, from_scratch: bool) -> MTPModel:
    """Build the model to train, in float32, from pretrained weights or from the config alone.

    With decoder heads a pretrained trunk stays whole and every extra head starts as a copy of its last layer. From
    scratch the trunk gives up as many layers as there are extra heads, so that the parameters match those of the
    model without heads (arXiv 2404.19737, section 2).

    Raises:
        UserError: the model cannot be loaded, has too few layers, or computes its logits in an unsupported way.
    """
    extra = len(heads.offsets) - 1
    trunk = _load_trunk(name, from_scratch=from_scratch)
    layers: list[nn.Module] = []
    if heads.block == "decoder" and extra:
        decoder_layers, _ = decoder_parts(trunk.get_decoder())
        if not from_scratch:
            layers = [copy.deepcopy(decoder_layers[-1]) for _ in range(extra)]
        elif extra >= len(decoder_layers):
            raise UserError(
                f"{name}: {len(decoder_layers)} layers are too few for {extra} decoder heads; use fewer offsets"
            )
        else:
            layers = list(decoder_layers[-extra:])
            del decoder_layers[-extra:]
            _shorten(trunk.config, len(decoder_layers))
    model = MTPModel(trunk, heads, layers)
    check_trunk(model, name)
    return model


def load_model(path: str) -> MTPModel:
    """Load a trained run (its `model/` and `heads/`) or any Hugging Face causal language model, in float32."""
    run = locate(path)
    heads_directory = run / "heads"
    if not (heads_directory / HEADS_CONFIG).exists():
        return build_model(path, HeadsConfig(offsets=(1,)), from_scratch=False)
    try:
        heads = HeadsConfig.model_validate_json((heads_directory / HEADS_CONFIG).read_text())
        model = build_model(str(run / "model"), heads, from_scratch=False)
        model.heads.load_state_dict(load_file(local_copy(heads_directory) / HEADS_WEIGHTS))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{heads_directory}: cannot be loaded ({first_line(error)}); train the run again") from error
    return model


def _load_trunk(name: str, *, from_scratch: bool) -> Any:
    source = local_name(name)
    try:
        if from_scratch:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        hint = "give the directory or id of a causal language model"
        if Path(source).is_dir() and not from_scratch:
            hint += ", or --from_scratch true to use its config only"
        raise UserError(f"{name}: cannot load the model ({first_line(error)}); {hint}") from error


def _shorten(config: Any, layers: int) -> None:
    """Make a Hugging Face config describe a model with fewer layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


@torch.no_grad()
def check_trunk(model: MTPModel, name: str) -> None:
    """Make sure that what training relies on holds for this architecture, on two short made-up documents.

    Raises:
        UserError: the logits are not `hidden @ unembedding.T` (plus bias, soft-cap), or packed documents are mixed.
    """
    trunk = model.trunk
    training = trunk.training
    trunk.eval()
    ids = torch.arange(12)[None] % trunk.config.vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    hidden = trunk.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    alone = trunk.get_decoder()(input_ids=ids[:, 5:], use_cache=False).last_hidden_state
    logits = trunk(input_ids=ids[:, 5:], use_cache=False).logits
    unembedding = trunk.get_output_embeddings()
    own = nn.functional.linear(alone, unembedding.weight, unembedding.bias)
    if (softcap := getattr(trunk.config, "final_logit_softcapping", None)) is not None:
        own = softcap * torch.tanh(own / softcap)
    trunk.train(training)
    if not logits.isfinite().all():
        raise UserError(f"{name}: predicts NaN or infinity; check its weights")
    if not torch.allclose(own, logits, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{name}: {type(trunk).__name__} rescales its logits, which training cannot do; use another architecture"
        )
    if not torch.allclose(hidden[:, 5:], alone, rtol=1e-3, atol=1e-3):
        raise UserError(f"{name}: {type(trunk).__name__} does not separate packed documents; use another architecture")
