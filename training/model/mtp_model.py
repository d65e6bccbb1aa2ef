"""A Hugging Face language model with multi-token-prediction heads that computes its own weighted loss.

`forward` computes the loss because wrappers (DDP, FSDP, autocast) expect it to use all parameters, including the
unembedding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import GENERATION_CONFIG_NAME

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import MOST_REASON, UserError, first_line
from weighted_mtp.schemas.pretrained import load_error, quiet_transformers
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.schemas.storage.locations import local_copy, locate
from weighted_mtp.schemas.storage.training_run import HEADS, MODEL, trained_model
from weighted_mtp.training.loss.multi_head import HeadGroup, HeadLosses, HeadTargets, multi_head_cross_entropy
from weighted_mtp.training.loss.normalizer import mean_if_labelled
from weighted_mtp.training.loss.objectives import Objective
from weighted_mtp.training.loss.shifted_targets import select_targets
from weighted_mtp.training.loss.token_order import TokenOrder, make_order_head
from weighted_mtp.training.model.direct_decoding import check_split, decoding_cycle
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.model.heads import Heads, TrunkOutput, make_heads
from weighted_mtp.training.model.trainable_parameters import merge_adapters
from weighted_mtp.training.model.trunk import (
    ON_GPU_ONLY,
    LayerCall,
    check_trunk,
    choose_factors_by_document,
    decoder_of,
    decoder_parts,
    load_trunk,
    random_trunk,
    recorded_call,
    softcap,
)
from weighted_mtp.training.weighting.batch import LiveWeighting

HEADS_CONFIG = "config.json"
HEADS_WEIGHTS = "heads.safetensors"
TOP = "top."
"""Prefix of tensor names for token order prediction. Tensor names of heads start with a number."""


class MTPModel(nn.Module):
    """A trunk (`AutoModelForCausalLM`) and one extra head for every offset after the first.

    Its state dict has tied parameters once, as safetensors and the checkpoints of `Trainer` require.

    Attributes:
        trunk: the Hugging Face model.
        heads: the extra heads.
        heads_config: their settings.
        top: the second unembedding for token order prediction, or None.
    """

    trunk: Any  # a PreTrainedModel; nn.Module's own __getattr__ would hide its methods from the type checker

    accepts_loss_kwargs = True
    """Makes `Trainer` give `num_items_in_batch` to `forward`."""

    def __init__(self, trunk: nn.Module, heads: Heads, config: HeadsConfig, top: nn.Linear | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self.top = top
        self.heads_config = config
        self.register_state_dict_post_hook(_drop_tied)
        self.register_load_state_dict_pre_hook(_restore_tied)

    @property
    def config(self) -> Any:
        """The trunk's Hugging Face config, which `Trainer` and its trackers read."""
        return self.trunk.config

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the activations of the trunk's layers in the backward pass, as `Trainer` asks for."""
        self.trunk.gradient_checkpointing_enable(**settings)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        weights: Tensor,
        coefficients: Tensor | None = None,
        live: LiveWeighting | None = None,
        objective: Objective | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        by_document: bool = False,
    ) -> tuple[Tensor, HeadSums]:
        """Weighted loss of all heads over packed rows.

        With `labels` it follows transformers: the loss is a mean. Everything in a batch of `packed_rows` can be given.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, restarting at 0 in every document, 0 for padding.
            weights: (B, T) float32, the weight of each token as a target; with `live` (B, T, components), NaN where a
                token has no score.
            coefficients: (C,) factor of each offset's loss and of token order prediction; from the config by default.
            live: computes weights from current losses and the components.
            objective: the loss of a target; by default its negative log-likelihood.
            labels: (B, T) int64, -100 for tokens that are no targets. The loss is then divided by the number of the
                others; the weights alone decide what is learnt.
            num_items_in_batch: number of targets of the optimizer step, to divide by instead.
            by_document: return sums (P, N) float64 of the N documents of the batch, which start where `position_ids`
                are 0, in order; each padding token is one of them.

        Returns:
            The sum over offsets k and positions t of `c_k * weights[t+k] * -log P_k(x[t+k] | x[..t])`, a scalar, and
            the sums (P,) for the `predictions` of the heads' config, without gradients and never divided. Token order
            prediction adds its loss with the weights of offset 1.
        """
        # Before the trunk: the number of selected targets sets tensor shapes, so a GPU must synchronise here.
        targets = [
            select_targets(input_ids, position_ids, weights, offset, scored=live is not None)
            for offset in self.heads_config.offsets
        ]
        trunk = self._run_trunk(input_ids, position_ids)
        if coefficients is None:
            coefficients = torch.tensor(self.heads_config.loss_coefficients, device=input_ids.device)
        offsets = len(targets)
        unembedding = self.trunk.get_output_embeddings()
        result = multi_head_cross_entropy(
            trunk.inputs,
            [HeadGroup([0], _own_hidden_states), *self.heads.groups(trunk)],
            targets,
            unembedding.weight,
            coefficients[:offsets],
            bias=unembedding.bias,
            softcap=softcap(self.trunk),
            live=live.for_batch(position_ids) if live else None,
            objective=objective,
        )
        total = result.total
        counts = [len(of_head.rows) for of_head in targets]
        by_head = [HeadLosses(total, *rows) for rows in zip(*(rows.split(counts) for rows in result[1:]), strict=True)]
        documents = (position_ids == 0).flatten().cumsum(0) - 1 if by_document else None  # (B * T,)
        sums = [_sums(losses, of_head.rows, documents) for losses, of_head in zip(by_head, targets, strict=True)]
        if self.top is not None:
            rows, used = targets[0].rows, by_head[0].weights
            selected = used != 0 if live else slice(None)  # stored weights are nonzero here
            order = self._predict_order(
                self.top, trunk, input_ids, rows[selected], used[selected], coefficients[offsets:]
            )
            total = total + order.total
            sums.append(_sums(order, rows[selected], documents))
        if self.heads_config.dmtd.cycle > 1:
            sums += self._phase_sums(by_head[0], targets[0].rows, position_ids, documents)
        return mean_if_labelled(total, labels, num_items_in_batch), HeadSums.stack(sums)

    def _predict_order(
        self,
        top: nn.Linear,
        trunk: TrunkOutput,
        input_ids: Tensor,
        rows: Tensor,
        weights: Tensor,
        coefficient: Tensor,
    ) -> HeadLosses:
        """Losses of token order prediction for rows (R,) and their weights (R,)."""
        return multi_head_cross_entropy(
            trunk.inputs[:1],
            [HeadGroup([0], _own_hidden_states)],
            [HeadTargets(rows, rows + 1, weights)],
            top.weight,
            coefficient,
            objective=TokenOrder(input_ids, trunk.position_ids, self.heads_config.top_window),
        )

    def _phase_sums(
        self, losses: HeadLosses, rows: Tensor, position_ids: Tensor, documents: Tensor | None
    ) -> list[HeadSums]:
        """Sums of each phase of the decoding cycle, from the losses and rows (R,) of offset 1."""
        cycle = self.heads_config.dmtd.cycle
        phases = position_ids.flatten()[rows] % cycle
        by_phase = [losses._replace(weights=losses.weights * (phases == phase)) for phase in range(cycle)]
        return [_sums(of_phase, rows, documents) for of_phase in by_phase]

    def _run_trunk(self, input_ids: Tensor, position_ids: Tensor) -> TrunkOutput:
        decoder = decoder_of(self.trunk)
        last, norm = LayerCall(), LayerCall()
        with ExitStack() as stack:
            if self.heads.reads:
                layers, final_norm = decoder_parts(self.trunk)
                last, norm = (stack.enter_context(recorded_call(module)) for module in (layers[-1], final_norm))
            if self.heads_config.dmtd.cycle > 1:
                stack.enter_context(decoding_cycle(self.trunk, self.heads_config.dmtd, position_ids))
            output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        inputs = [output.last_hidden_state]
        for name in self.heads.reads:
            if name == "embeddings":
                inputs.append(self.trunk.get_input_embeddings()(input_ids))
            else:
                inputs.append((last if name == "last_layer_input" else norm).hidden_states)
        return TrunkOutput(tuple(inputs), position_ids, last)

    def save(self, directory: Path | str, state: dict[str, Tensor] | None = None) -> None:
        """Write the trunk, with adapters merged, to `model/` as a Hugging Face checkpoint, and the heads to `heads/`.

        Args:
            directory: target directory.
            state: the whole state dict; required if this module holds only a shard.
        """
        directory = Path(directory)
        state = self.state_dict() if state is None else state
        trunk = _under("trunk.", state)
        heads = _under("heads.", state) | {name: value for name, value in state.items() if name.startswith(TOP)}
        with quiet_transformers(), _generation_settings_kept(self.trunk, directory / MODEL):
            self.trunk.save_pretrained(directory / MODEL, state_dict=merge_adapters(self.trunk, trunk))
        (directory / HEADS).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in heads.items()}, directory / HEADS / HEADS_WEIGHTS)
        write_text(directory / HEADS / HEADS_CONFIG, self.heads_config.model_dump_json(indent=2) + "\n")


def _sums(losses: HeadLosses, rows: Tensor, documents: Tensor | None) -> HeadSums:
    """Sums of one prediction over its rows (R,), or over those of each document; `documents` are (B * T,)."""
    if documents is None:
        return HeadSums.of_rows(*losses[1:])
    return HeadSums.of_documents(*losses[1:], documents[rows], int(documents[-1]) + 1)


@contextmanager
def _generation_settings_kept(trunk: Any, directory: Path) -> Iterator[None]:
    """Write the generation settings of a trunk as they are after the block, which saves it to `directory`.

    transformers loads settings that contradict each other, such as a temperature without sampling, but does not save
    them.
    """
    settings = getattr(trunk, "generation_config", None)
    if settings is None:
        yield
        return
    trunk.generation_config = type(settings)()
    try:
        yield
    finally:
        trunk.generation_config = settings
    settings.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a state dict whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _tied_names(module: nn.Module) -> dict[str, str]:
    """The first name of each parameter that has several, by its other names."""
    first: dict[nn.Parameter, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[value] for name, value in named if first.setdefault(value, name) != name}


def _drop_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Remove the other names of tied parameters from a state dict."""
    for name in _tied_names(module):
        del state[prefix + name]


def _restore_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add the other names of tied parameters to a state dict that is being loaded."""
    for name, first in _tied_names(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def _own_hidden_states(inputs: Any, rows: Any) -> list[Tensor]:
    """The final hidden states (R, D) of the trunk at the rows (R,) of offset 1."""
    return [inputs[0].flatten(0, 1)[rows[0]]]


def build_model(
    name: str,
    config: HeadsConfig | None,
    *,
    from_scratch: bool,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> MTPModel:
    """Build the model for training in float32, from pretrained weights or from the config alone.

    With decoder heads, a pretrained trunk keeps all layers, and each extra head starts as a copy of the last layer.
    From scratch, the trunk has a layer less for each extra head, which is a layer like its last one. That leaves the
    number of parameters unchanged (arXiv 2404.19737, section 2). If `name` is a training run, its heads are loaded;
    `config` None uses the heads of the run, or none.

    Raises:
        UserError: the model cannot be loaded, has too few layers, computes its logits in an unsupported way, or is a
            run with different heads.
    """
    saved = saved_heads(name)
    config = config or saved or HeadsConfig(offsets=(1,))
    source = name if saved is None else str(locate(name) / MODEL)
    trunk = load_trunk(
        source,
        from_scratch=from_scratch,
        less=moved_layers(config, from_scratch=from_scratch),
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    choose_factors_by_document(trunk)
    check_trunk(trunk, name)
    model = add_heads(trunk, config, from_scratch=from_scratch)
    check_heads(model, name)
    if saved is not None and not from_scratch:
        if _structure(saved) != _structure(config):
            raise UserError(
                f"--model {name}: has other heads ({', '.join(map(str, _structure(saved)))}); repeat its --heads, or "
                f"use {source} to start with new ones"
            )
        directory = locate(name) / HEADS
        try:
            weights = load_file(local_copy(directory) / HEADS_WEIGHTS)
            if model.top is not None:
                model.top.load_state_dict(_under(TOP, weights))
            model.heads.load_state_dict({n: value for n, value in weights.items() if not n.startswith(TOP)})
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = shorten(str(error), MOST_REASON, placeholder="...")
            raise UserError(f"{directory}: cannot be loaded ({reason}); train the run again") from error
    return model


def build_untrained(
    name: str, config: HeadsConfig, *, from_scratch: bool, attention: str | None, trust_remote_code: bool
) -> MTPModel:
    """Build the model of `build_model` with random weights, without reading any and without running it.

    Raises:
        UserError: the config cannot be read, or the model has too few layers.
    """
    source = trunk_source(name)
    less = moved_layers(config, from_scratch=from_scratch)
    try:
        trunk = random_trunk(source, less=less, attention=attention, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:
        hint = "give the directory or id of a causal language model"
        raise load_error(error, source, f"{name}: cannot build the model", hint) from error
    choose_factors_by_document(trunk)
    return add_heads(trunk, config, from_scratch=from_scratch)


def trunk_source(name: str) -> str:
    """Directory, address or id of the trunk of a model: of a training run, the model in it."""
    return name if saved_heads(name) is None else str(locate(name) / MODEL)


def moved_layers(config: HeadsConfig, *, from_scratch: bool) -> int:
    """Number of layers that the trunk has less, because they are heads."""
    return len(config.offsets) - 1 if from_scratch and config.block == "decoder" else 0


def add_heads(trunk: Any, config: HeadsConfig, *, from_scratch: bool) -> MTPModel:
    """The model of a trunk and new heads.

    Raises:
        UserError: the trunk has too few layers, or hides them.
    """
    heads = make_heads(trunk, config.kind, config.block, config.offsets, from_scratch=from_scratch)
    if config.dmtd.cycle > 1:
        check_split(trunk, config.dmtd)
    top = make_order_head(trunk, from_scratch=from_scratch) if config.predicts_order else None
    return MTPModel(trunk, heads, config, top)


@torch.no_grad()
def check_heads(model: MTPModel, name: str) -> None:
    """Run the heads on short artificial documents, unless the trunk's attention needs a GPU.

    Raises:
        UserError: they do not run, because the layers of the trunk need more than their arguments in a call.
    """
    trunk = model.trunk
    if trunk.config._attn_implementation in ON_GPU_ONLY:
        return
    positions = torch.arange(model.heads_config.offsets[-1] + 5)[None] % 5
    training = model.training
    model.eval()
    try:
        model(positions % trunk.config.get_text_config().vocab_size, positions, torch.ones(positions.shape))
    except Exception as error:  # of any type, from the code of an architecture
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{name}: the layers of {type(trunk).__name__} do not run as heads ({reason}); use --heads.kind parallel "
            "with --heads.block residual, without --heads.dmtd, or another architecture"
        ) from error
    model.train(training)


def _structure(config: HeadsConfig) -> tuple[str, ...]:
    """Settings that determine the saved parameters, as text."""
    order = ("token order prediction",) * config.predicts_order
    dmtd = config.dmtd
    split = f"dmtd cycle {dmtd.cycle} with {dmtd.encoding_layers} encoding, {dmtd.decoding_layers} decoding layers"
    return config.kind, config.block, f"offsets {list(config.offsets)}", *order, *(split,) * (dmtd.cycle > 1)


def load_model(name: str | Path, heads: HeadsConfig | None = None, *, trust_remote_code: bool = False) -> MTPModel:
    """Load a Hugging Face causal language model with new heads, or a training run with its own, in float32.

    Args:
        name: directory, address in an object store, or Hugging Face id; or the directory of a run or of
            `MTPModel.save`, whose heads are loaded.
        heads: the heads; by default those that are saved, or none. New ones start from torch's random state.
        trust_remote_code: whether Python code of the model may run.

    Raises:
        UserError: the model cannot be loaded, has too few layers, computes its logits in an unsupported way, or was
            saved with other heads; or the heads need the number of steps of a run.
    """
    if heads is not None and heads.warmup_ratio:
        raise UserError("heads: warmup_ratio needs the number of steps of a run; leave it out, or use train()")
    return build_model(str(name), heads, from_scratch=False, trust_remote_code=trust_remote_code)


def saved_heads(name: str) -> HeadsConfig | None:
    """The heads of a finished training run; None for any other model.

    Raises:
        UserError: their config file is damaged or missing, or the run is not finished.
    """
    place = locate(name)
    file = place / HEADS / HEADS_CONFIG
    if not file.exists():
        if trunk := trained_model(place, "--model"):
            raise UserError(f"{file}: is missing; restore it, or use {trunk}, which has no heads")
        return None
    try:
        return HeadsConfig.model_validate_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); train the run again") from error
