"""The optimizer step and what is counted along the way.

A step takes the rows of the whole optimizer step, adds up the denominator over all micro-batches and processes, and
only then runs the micro-batches, each loss divided by that one denominator. So neither the number of devices nor the
split into micro-batches changes what is computed.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from schemas.configs import TrainConfig
from schemas.errors import UserError
from training.evaluation import to_device
from training.loader import LoaderState, RowLoader, Rows
from training.sharding import all_finite, no_sync
from training.targets import count_targets


class TrainingLoop:
    """Steps of one run, and their state: `state_dict` holds all that is not in model, optimizer and scheduler."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loader: RowLoader,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.window_start = (0, 0.0)  # tokens and seconds when the metrics window began
        self.grad_norm = torch.zeros(())
        # Per offset, summed over the window: weighted loss / denominator, plain loss, targets with weight; then valid
        # targets of the first offset and the number of steps.
        self.head_sums = torch.zeros(len(config.heads.offsets), 3, device=accelerator.device)
        self.targets = torch.zeros((), device=accelerator.device)
        self.window_steps = 0
        self.metrics: dict[str, float] = {}  # as last logged

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "window_start": self.window_start,
            "window_steps": self.window_steps,
            "head_sums": self.head_sums.cpu(),
            "targets": self.targets.cpu(),
            "metrics": self.metrics,
            "loader": self.loader.state.model_dump(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.window_start, self.window_steps = state["window_start"], state["window_steps"]
        self.metrics = state["metrics"]
        if self.accelerator.is_main_process:  # the checkpoint has the sums of all processes
            self.head_sums.copy_(state["head_sums"])
        self.targets.copy_(state["targets"])
        self.loader.state = LoaderState(**state["loader"])

    def run(self, steps: int) -> Iterator[dict[str, float]]:
        """Train until `steps` steps are done; after each yield its metrics, empty where nothing is logged.

        Raises:
            UserError: the loss is not finite.
        """
        bar = tqdm(
            total=steps, initial=self.step, desc="train", unit="step", disable=not self.accelerator.is_main_process
        )
        batches = self.loader.batches(self.config.batch_size)
        self.model.train()
        with bar:
            while self.step < steps:
                started = time.perf_counter()
                self._train_step(next(batches))
                self.step += 1
                logged = self.step % self.config.log_every == 0 or self.step == steps
                metrics = self._window_metrics() if logged else {}
                self.seconds += time.perf_counter() - started
                if logged:
                    self.metrics = metrics | self._window_speed()
                    bar.set_postfix_str("loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s".format(**self.metrics))
                bar.update()
                yield dict(self.metrics) if logged else {}

    def _train_step(self, batch: Rows) -> None:
        share = self.config.batch_size // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        size = self.config.micro_batch_size
        micro_batches = [
            to_device(batch.take(slice(at, min(at + size, first + share))), self.accelerator.device)
            for at in range(first, first + share, size)
        ]
        denominator = self._denominator(micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if last else no_sync(self.accelerator, self.model):
                loss, sums = self.model(*micro_batch)
                # DDP and FSDP2 average gradients over processes; this loss is to be summed.
                self.accelerator.backward(loss * (self.accelerator.num_processes / denominator))
            sums[:, 0] /= denominator
            self.head_sums += sums
        self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.tokens += int(batch.tokens.sum())
        self.window_steps += 1

    def _denominator(self, micro_batches: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The denominator of the whole step; 1 where no target has weight, so that the loss is 0 and not NaN."""
        offset = self.config.heads.offsets[0]
        counts = [torch.stack(count_targets(position_ids, w, offset)) for _, position_ids, w in micro_batches]
        targets, weight_sum = self.accelerator.reduce(torch.stack(counts).sum(0), "sum")
        self.targets += targets
        total = targets if self.config.normalization == "tokens" else weight_sum
        return torch.where(total > 0, total, torch.ones_like(total))

    def _window_metrics(self) -> dict[str, float]:
        """Metrics of the steps since the last call, over all processes; starts a new window."""
        weighted, plain, counts = self.accelerator.reduce(self.head_sums, "sum").T.double().tolist()
        targets = self.targets.item()
        metrics = {"loss": 0.0}
        for i, offset in enumerate(self.config.heads.offsets):
            metrics[f"weighted_loss_{offset}"] = weighted[i] / self.window_steps
            metrics[f"plain_loss_{offset}"] = plain[i] / counts[i] if counts[i] else float("nan")
            metrics["loss"] += self.config.heads.loss_coefficients[i] * weighted[i] / self.window_steps
        metrics["selected_share"] = counts[0] / targets if targets else 0.0
        metrics["grad_norm"] = float(self.grad_norm)
        metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
        metrics["tokens"] = self.tokens
        if not math.isfinite(metrics["loss"]):
            raise UserError(self._not_finite("the loss"))
        self.head_sums.zero_()
        self.targets.zero_()
        self.window_steps = 0
        return metrics

    def _window_speed(self) -> dict[str, float]:
        tokens, seconds = self.tokens - self.window_start[0], self.seconds - self.window_start[1]
        self.window_start = self.tokens, self.seconds
        return {"tokens_per_second": tokens / seconds}

    def prepare_checkpoint(self) -> None:
        """Bring the window's sums together in the main process, and make sure that the model is worth keeping.

        Raises:
            UserError: a parameter is NaN or infinite.
        """
        total = self.accelerator.reduce(self.head_sums, "sum")
        self.head_sums = total if self.accelerator.is_main_process else torch.zeros_like(total)
        if not all_finite(self.accelerator, self.model):
            raise UserError(self._not_finite("the model"))

    def _not_finite(self, what: str) -> str:
        return (
            f"--optimizer.learning_rate {self.config.optimizer.learning_rate:g}: {what} is not finite at step "
            f"{self.step}; lower it and choose another --output, or check the weights of --model"
        )
