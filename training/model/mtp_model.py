"""A Hugging Face language model with multi-token-prediction heads that computes its own weighted loss.

The loss is computed inside `forward` because that is where wrappers (DDP, FSDP, autocast) expect the parameters of the
unembedding to be used.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.schemas.storage.locations import local_copy, locate
from weighted_mtp.training.loss.multi_head import HeadGroup, HeadLosses, HeadRows, multi_head_cross_entropy
from weighted_mtp.training.loss.objectives import Objective
from weighted_mtp.training.loss.targets import target_rows
from weighted_mtp.training.loss.token_order import TokenOrder, make_order_head
from weighted_mtp.training.model.direct_decoding import check_split, decoding_cycle
from weighted_mtp.training.model.heads import Heads, TrunkPass, make_heads
from weighted_mtp.training.model.trainable import merge_adapters
from weighted_mtp.training.model.trunk import LayerCall, check_trunk, decoder_parts, load_trunk, recorded_call, softcap
from weighted_mtp.training.weighting.batch import LiveWeighting

HEADS_CONFIG = "config.json"
HEADS_WEIGHTS = "heads.safetensors"
TOP = "top."
"""What begins the names of the tensors of token order prediction; those of heads begin with a number."""
HEAD_SUMS = ("weighted_loss", "plain_loss", "selected", "correct", "weight", "squared_weight")
"""What `MTPModel` adds up for each head: over the targets with weight, what the objective minimises times the weight,
losses (nats), how many they are, how many of them are the most likely token, the magnitudes of their weights, and the
squares of these."""


class MTPModel(nn.Module):
    """A trunk (`AutoModelForCausalLM`) and one extra head for every offset after the first.

    `top` is the further unembedding of token order prediction, if that is wanted.
    """

    trunk: Any  # a PreTrainedModel; nn.Module's own __getattr__ would hide its methods from the type checker

    def __init__(self, trunk: nn.Module, heads: Heads, config: HeadsConfig, top: nn.Linear | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self.top = top
        self.config = config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        weights: Tensor,
        coefficients: Tensor | None = None,
        live: LiveWeighting | None = None,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of all heads over packed rows.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, restarting at 0 in every document, 0 for padding.
            weights: (B, T) float32, the weight of each token as a target; with `live` (B, T, parts), what its weight
                is made from, NaN where there is no score.
            coefficients: (C,) factor of each offset's loss and of token order prediction, by default those of the
                config.
            live: makes weights from current losses and stored scores.
            objective: what is minimised for a target; by default its negative log-likelihood.

        Returns:
            The sum over offsets k and positions t of `c_k * weights[t+k] * -log P_k(x[t+k] | x[..t])`, a scalar, and
            (P, 6) float32 sums without gradients: `HEAD_SUMS` of each of the config's `parts`. Token order prediction
            adds its losses with the weights of offset 1.
        """
        # Before the trunk: what has weight decides shapes, for which a GPU has to be waited for.
        tasks = [
            target_rows(input_ids, position_ids, weights, offset, scored=live is not None)
            for offset in self.config.offsets
        ]
        trunk = self._run_trunk(input_ids, position_ids)
        if coefficients is None:
            coefficients = torch.tensor(self.config.loss_coefficients, device=input_ids.device)
        offsets = len(tasks)
        unembedding = self.trunk.get_output_embeddings()
        result = multi_head_cross_entropy(
            trunk.inputs,
            [HeadGroup([0], _own_hidden_states), *self.heads.groups(trunk)],
            tasks,
            unembedding.weight,
            coefficients[:offsets],
            bias=unembedding.bias,
            softcap=softcap(self.trunk),
            live=live.for_batch(position_ids) if live else None,
            objective=objective,
        )
        counts = [len(task.rows) for task in tasks]
        per_head = zip(*(values.split(counts) for values in result[1:]), strict=True)
        sums = [_add_up(*rows) for rows in per_head]
        total = result.total
        if self.top is not None:
            used = result.weights[: counts[0]]
            kept = used != 0 if live else slice(None)  # of stored weights none is 0 here
            order = self._predict_order(
                self.top, trunk, input_ids, tasks[0].rows[kept], used[kept], coefficients[offsets:]
            )
            total = total + order.total
            sums.append(_add_up(*order[1:]))
        if self.config.dmtd.cycle > 1:
            values, losses, correct, used = (rows[: counts[0]] for rows in result[1:])
            phases = position_ids.flatten()[tasks[0].rows] % self.config.dmtd.cycle
            masks = [phases == phase for phase in range(self.config.dmtd.cycle)]
            sums += [_add_up(values, losses, correct, used * mask) for mask in masks]
        return total, torch.stack(sums)

    def _predict_order(
        self,
        top: nn.Linear,
        trunk: TrunkPass,
        input_ids: Tensor,
        rows: Tensor,
        weights: Tensor,
        coefficient: Tensor,
    ) -> HeadLosses:
        """Losses of token order prediction for rows (R,) and their weights (R,)."""
        return multi_head_cross_entropy(
            trunk.inputs[:1],
            [HeadGroup([0], _own_hidden_states)],
            [HeadRows(rows, rows + 1, weights)],
            top.weight,
            coefficient,
            objective=TokenOrder(input_ids, trunk.position_ids, self.config.top_window),
        )

    def _run_trunk(self, input_ids: Tensor, position_ids: Tensor) -> TrunkPass:
        decoder = self.trunk.get_decoder()
        last, norm = LayerCall(), LayerCall()
        with ExitStack() as stack:
            if self.heads.reads:
                layers, final_norm = decoder_parts(self.trunk)
                last, norm = (stack.enter_context(recorded_call(module)) for module in (layers[-1], final_norm))
            if self.config.dmtd.cycle > 1:
                stack.enter_context(decoding_cycle(self.trunk, self.config.dmtd, position_ids))
            output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        inputs = [output.last_hidden_state]
        for name in self.heads.reads:
            if name == "embeddings":
                inputs.append(self.trunk.get_input_embeddings()(input_ids))
            else:
                inputs.append((last if name == "last_layer_input" else norm).hidden_states)
        return TrunkPass(tuple(inputs), position_ids, last)

    def save(self, directory: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the trunk as an ordinary Hugging Face checkpoint to `model/`, adapters merged, the heads to `heads/`.

        Args:
            directory: where to.
            state: the whole state dict, needed where this module holds a shard of it.
        """
        state = self.state_dict() if state is None else state
        trunk = _under("trunk.", state)
        heads = _under("heads.", state) | {name: value for name, value in state.items() if name.startswith(TOP)}
        self.trunk.save_pretrained(directory / "model", state_dict=merge_adapters(self.trunk, trunk))
        (directory / "heads").mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in heads.items()}, directory / "heads" / HEADS_WEIGHTS)
        write_text(directory / "heads" / HEADS_CONFIG, self.config.model_dump_json(indent=2) + "\n")


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _add_up(values: Tensor, losses: Tensor, correct: Tensor, weights: Tensor) -> Tensor:
    """`HEAD_SUMS` (6,) of a head, from values, losses, hits and weights (R,)."""
    carries = weights != 0
    plain = torch.where(carries, losses, 0)
    magnitudes = weights.abs()
    return torch.stack(
        [weights @ values, plain.sum(), carries.sum(), (correct & carries).sum(), magnitudes.sum(), weights @ weights]
    )


def _own_hidden_states(inputs: Any, rows: Any) -> list[Tensor]:
    return [inputs[0].flatten(0, 1)[rows[0]]]


def build_model(name: str, config: HeadsConfig | None, *, from_scratch: bool, attention: str | None = None) -> MTPModel:
    """Build the model to train, in float32, from pretrained weights or from the config alone.

    With decoder heads a pretrained trunk stays whole and every extra head starts as a copy of its last layer. From
    scratch the trunk gives up as many layers as there are extra heads, so that the parameters match those of the
    model without heads (arXiv 2404.19737, section 2). A training run brings its heads along; with None for `config` the
    heads are those that it has, or none.

    Raises:
        UserError: the model cannot be loaded, has too few layers, computes its logits in an unsupported way, or is a
            run with other heads.
    """
    saved = saved_heads(name)
    config = config or saved or HeadsConfig(offsets=(1,))
    source = name if saved is None else str(locate(name) / "model")
    trunk = load_trunk(source, from_scratch=from_scratch, attention=attention)
    heads = make_heads(trunk, config.kind, config.block, config.offsets, from_scratch=from_scratch)
    check_trunk(trunk, name)
    if config.dmtd.cycle > 1:
        check_split(trunk, config.dmtd)
    top = make_order_head(trunk, from_scratch=from_scratch) if config.predicts_order else None
    model = MTPModel(trunk, heads, config, top)
    if saved is not None and not from_scratch:
        if _structure(saved) != _structure(config):
            raise UserError(
                f"--model {name}: has other heads ({', '.join(map(str, _structure(saved)))}); repeat its --heads, or "
                f"give {source} to begin with new ones"
            )
        directory = locate(name) / "heads"
        try:
            weights = load_file(local_copy(directory) / HEADS_WEIGHTS)
            if model.top is not None:
                model.top.load_state_dict(_under(TOP, weights))
            model.heads.load_state_dict({n: value for n, value in weights.items() if not n.startswith(TOP)})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{directory}: cannot be loaded ({first_line(error)}); train the run again") from error
    return model


def _structure(config: HeadsConfig) -> tuple[str, ...]:
    """What must be the same for saved parameters to mean the same."""
    order = ("token order prediction",) * config.predicts_order
    dmtd = config.dmtd
    split = f"dmtd cycle {dmtd.cycle} with {dmtd.encoding_layers} encoding, {dmtd.decoding_layers} decoding layers"
    return config.kind, config.block, f"offsets {list(config.offsets)}", *order, *(split,) * (dmtd.cycle > 1)


def load_model(name: str) -> MTPModel:
    """Load a training run with its heads, or any Hugging Face causal language model, in float32.

    Raises:
        UserError: it cannot be loaded.
    """
    return build_model(name, None, from_scratch=False)


def saved_heads(name: str) -> HeadsConfig | None:
    """The heads of a training run; None for what is not a finished run.

    Raises:
        UserError: the file that describes them is damaged.
    """
    file = locate(name) / "heads" / HEADS_CONFIG
    if not file.exists():
        return None
    try:
        return HeadsConfig.model_validate_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); train the run again") from error
