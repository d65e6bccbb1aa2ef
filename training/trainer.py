"""The training loop: optimizer steps with gradient accumulation.

A step first counts the normalizer Z, the denominator of the loss, over the rows of all micro-batches and processes.
Then it runs the micro-batches and divides each loss by Z. The result therefore does not depend on the number of devices
or the split into micro-batches. Live weights are the exception, because they are ranked within one forward pass.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.data.mixing import MixedLoader
from weighted_mtp.training.evaluation import to_device
from weighted_mtp.training.loss.normalizer import StepNormalizer, count_targets
from weighted_mtp.training.loss.objectives import make_objective
from weighted_mtp.training.metrics import MetricsAccumulator
from weighted_mtp.training.model.flops import StepFlops, peak_flops
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.schedules import linear_warmup
from weighted_mtp.training.sharding import all_finite, no_sync
from weighted_mtp.training.weighting.batch import BatchWeighting, LiveWeighting


class TrainingLoop:
    """The steps of one run. `state_dict` excludes the states of model, optimizer and scheduler.

    `steps` is the length of the schedules; `--continue_steps` follow. `progress` makes the bar of steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loader: RowLoader | MixedLoader,
        flops: StepFlops,
        steps: int,
        progress: MakeBar = hidden_bar,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.flops = flops
        self.scheduled_steps = steps
        self.steps = steps + config.continue_steps
        self.progress = progress
        self.weighting = BatchWeighting.make(config.weights)
        self.objective = make_objective(config.objective)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.bad_in_a_row = 0
        self.accumulator = MetricsAccumulator(config.heads, accelerator.device)
        self.grad_norm = self.learning_rate = 0.0  # of the last step
        self.metrics: dict[str, float] = {}  # as last logged

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "bad_in_a_row": self.bad_in_a_row,
            "window": self.accumulator.state_dict(),
            "metrics": self.metrics,
            "loader": self.loader.state.model_dump(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, after the scheduler.

        Raises:
            Exception: it is damaged, or has more steps than the run.
        """
        for name, own in (self.state_dict() | {"metrics": dict.fromkeys(state["metrics"], 0.0)}).items():
            if name != "loader" and not _same_types(state[name], own):
                raise ValueError(f"{name} has another type")
        if state["step"] != self.scheduler.last_epoch or not 0 < state["step"] <= self.steps:
            raise ValueError(
                f"it is after step {state['step']:,}, and the run has {self.steps:,} steps with --continue_steps "
                f"{self.config.continue_steps}"
            )
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.bad_in_a_row = state["bad_in_a_row"]
        self.accumulator.load_state_dict(state["window"], main_process=self.accelerator.is_main_process)
        self.metrics = state["metrics"]
        self.loader.state = type(self.loader.state).model_validate(state["loader"])

    def run(self) -> Iterator[dict[str, float]]:
        """Run all remaining steps; yield the metrics of each step, empty if it is not logged.

        Raises:
            UserError: the loss or its gradient was not finite for too many steps in a row.
        """
        main = self.accelerator.is_main_process
        bar = self.progress(total=self.steps, initial=self.step, desc="train", unit="steps", disable=not main)
        batches = self.loader.batches(self.config.batch_size)
        peak = peak_flops(self.accelerator.device)
        self.model.train()
        with bar:
            while self.step < self.steps:
                started = time.perf_counter()
                self._train_step(next(batches))
                self.step += 1
                self.seconds += time.perf_counter() - started
                logged = self.step % self.config.log_every == 0 or self.step == self.steps
                if logged:
                    self.metrics = self.accumulator.compute_and_reset(self.accelerator, self.flops, self.seconds, peak)
                    self.metrics |= {"learning_rate": self.learning_rate, "grad_norm": self.grad_norm}
                    self.metrics["tokens"] = self.tokens
                    bar.set_postfix_str("loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s".format(**self.metrics))
                bar.update()
                yield dict(self.metrics) if logged else {}

    def _train_step(self, batch: Rows) -> None:
        warmup = linear_warmup(self.step, self.config.weights.warmup_ratio, self.scheduled_steps)
        batch = self.weighting.weigh_rows(batch, warmup, np.random.default_rng([self.config.seed, self.step]))
        own = np.random.default_rng([self.config.seed, self.step, self.accelerator.process_index])
        live = self.weighting.live_weighting(warmup, own)
        normalizer = self._normalizer(batch, warmup)
        self.tokens += int(batch.tokens.sum())
        self.accumulator.count_rows(batch)
        if not normalizer.weight_sum:
            self.accumulator.counters["no_signal_steps"] += 1
            self._skip_update()
        else:
            coefficients = self._coefficients()
            micro_batches = self._micro_batches(batch)
            sums = self._accumulate_gradients(micro_batches, normalizer.value, coefficients, live)
            if self._should_update(micro_batches, sums):
                self.optimizer.step()
                of_step = HeadSums(*(values.sum(0) for values in sums))
                self.accumulator.add_step(of_step, coefficients, normalizer.targets)
            else:
                self._skip_update()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.optimizer.zero_grad()

    def _normalizer(self, batch: Rows, warmup: float) -> StepNormalizer:
        """Count the targets of the whole step and compute its normalizer."""
        ids, weights = torch.from_numpy(batch.position_ids), torch.from_numpy(batch.weights).double()
        counts = count_targets(ids, weights, self.config.heads.offsets[0], scored=self.weighting.live)
        targets, counted = map(float, counts)
        weight_sum = self.weighting.weight_sum(counted, warmup)
        return StepNormalizer(targets, weight_sum, targets if self.config.normalization == "tokens" else weight_sum)

    def _micro_batches(self, batch: Rows) -> list[Rows]:
        """Split this process's share of the rows."""
        rows = self.config.batch_size // self.accelerator.num_processes
        first = rows * self.accelerator.process_index
        size = self.config.micro_batch_size
        return [batch.take(slice(at, min(at + size, first + rows))) for at in range(first, first + rows, size)]

    def _accumulate_gradients(
        self, micro_batches: list[Rows], normalizer: float, coefficients: Tensor, live: LiveWeighting | None
    ) -> HeadSums:
        """Run forward and backward passes of all micro-batches; returns sums (micro-batches, P)."""
        last = len(micro_batches) - 1
        return HeadSums.stack(
            [
                self._forward_backward(micro_batch, normalizer, coefficients, live, last=number == last)
                for number, micro_batch in enumerate(micro_batches)
            ]
        )

    def _forward_backward(
        self, micro_batch: Rows, normalizer: float, coefficients: Tensor, live: LiveWeighting | None, *, last: bool
    ) -> HeadSums:
        """Run one micro-batch; returns sums (P,), with weighted losses divided by the normalizer."""
        with nullcontext() if last else no_sync(self.accelerator, self.model):
            tensors = to_device(micro_batch, self.accelerator.device)
            with self.accelerator.autocast():
                loss, sums = self.model(*tensors, coefficients=coefficients, live=live, objective=self.objective)
            # DDP and FSDP2 average gradients over processes, but this loss is a sum over them.
            self.accelerator.backward(loss * (self.accelerator.num_processes / normalizer))
        return sums._replace(weighted_loss=sums.weighted_loss / normalizer)

    def _should_update(self, micro_batches: list[Rows], sums: HeadSums) -> bool:
        """Clip the gradient, decide whether to take the optimizer step, and count skipped steps.

        Args:
            micro_batches: the micro-batches of this process.
            sums: (micro-batches, P), the sums of each.

        Returns:
            False if no target in any process has weight, or if losses or gradient are not finite in some process.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.grad_norm = float(norm)
        finite = torch.stack(sums).isfinite().all(-1).all(0)  # (micro-batches,)
        weight = sums.weight.sum()
        good, weight = self.accelerator.reduce(torch.stack([finite.all().to(weight), weight]), "sum").tolist()
        if weight == 0:  # live weights are not known earlier
            self.accumulator.counters["no_signal_steps"] += 1
            return False
        if math.isfinite(self.grad_norm) and good == self.accelerator.num_processes:
            self.bad_in_a_row = 0
            return True
        self.accumulator.counters["bad_steps"] += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row > self.config.max_bad_steps:
            bad = [rows for rows, good in zip(micro_batches, finite.tolist(), strict=True) if not good]
            raise UserError(self._not_finite(bad or micro_batches))
        return False

    def _skip_update(self) -> None:
        """Step without gradients: the scheduler sees a step, but parameters and moments do not change."""
        self.optimizer.zero_grad()
        self.optimizer.step()

    def _coefficients(self) -> Tensor:
        """Loss coefficients (C,) of offsets and token order prediction for this step."""
        first, *others = self.config.heads.loss_coefficients
        warmup = linear_warmup(self.step, self.config.heads.warmup_ratio, self.scheduled_steps)
        return torch.tensor([first, *(warmup * other for other in others)], device=self.accelerator.device)

    def prepare_checkpoint(self) -> None:
        """Gather accumulated metrics in the main process, and check the model.

        Raises:
            UserError: a parameter is NaN or infinite.
        """
        self.accumulator.gather(self.accelerator)
        if not all_finite(self.accelerator, self.model):
            raise UserError(
                f"--optimizer.learning_rate {self.config.optimizer.learning_rate:g}: the model is not finite at step "
                f"{self.step}; lower it and choose another --output, or check the weights of --model"
            )

    def _not_finite(self, bad: list[Rows]) -> str:
        """Error message with the shards of these rows, over all processes."""
        own = self.loader.files(source for rows in bad for source in rows.sources)
        names = sorted(set(gather_object(own)))
        return (
            f"--optimizer.learning_rate {self.config.optimizer.learning_rate:g}: loss or gradient was not finite for "
            f"{self.bad_in_a_row} steps in a row, up to step {self.step + 1}; lower it and choose another --output, or "
            f"check the shards of these steps with 'wmtp verify': {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        )


def _same_types(value: Any, like: Any) -> bool:
    """Whether nested dicts have the same keys, and values of the same types; integers may stand for floats."""
    if isinstance(like, dict):
        return value.keys() == like.keys() and all(_same_types(value[key], like[key]) for key in like)
    return isinstance(value, int | float if isinstance(like, float) else type(like))
