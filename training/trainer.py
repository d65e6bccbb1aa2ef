"""The optimizer step and what is counted along the way.

A step takes the rows of the whole optimizer step, adds up the denominator over all micro-batches and processes, and
only then runs the micro-batches, each loss divided by that one denominator. So neither the number of devices nor the
split into micro-batches changes what is computed, live weights excepted, which are ranked within a forward pass.
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
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.data.mixing import MixedLoader
from weighted_mtp.training.evaluation import to_device
from weighted_mtp.training.loss.objectives import make_objective
from weighted_mtp.training.loss.targets import count_targets
from weighted_mtp.training.metrics import Window
from weighted_mtp.training.model.flops import StepFlops, peak_flops
from weighted_mtp.training.model.mtp_model import HEAD_SUMS
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.sharding import all_finite, no_sync
from weighted_mtp.training.weighting.batch import BatchWeighting, LiveWeighting


class TrainingLoop:
    """Steps of one run, and their state: `state_dict` holds all that is not in model, optimizer and scheduler."""

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
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.flops = flops
        self.steps = steps
        self.weighting = BatchWeighting.make(config.weights)
        self.objective = make_objective(config.objective)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.bad_in_a_row = 0
        self.window = Window(config.heads, accelerator.device)
        self.grad_norm = 0.0
        self.metrics: dict[str, float] = {}  # as last logged

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "bad_in_a_row": self.bad_in_a_row,
            "window": self.window.state_dict(),
            "metrics": self.metrics,
            "loader": self.loader.state.model_dump(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.bad_in_a_row = state["bad_in_a_row"]
        self.window.load_state_dict(state["window"], main_process=self.accelerator.is_main_process)
        self.metrics = state["metrics"]
        self.loader.state = type(self.loader.state).model_validate(state["loader"])

    def run(self) -> Iterator[dict[str, float]]:
        """Train until all steps are done; after each yield its metrics, empty where nothing is logged.

        Raises:
            UserError: the loss or its gradient was not finite for too many steps in a row.
        """
        main = self.accelerator.is_main_process
        bar = ProgressBar(total=self.steps, initial=self.step, desc="train", unit="step", disable=not main)
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
                    self.metrics = self.window.close(self.accelerator, self.flops, self.seconds, peak)
                    self.metrics |= {"learning_rate": self.scheduler.get_last_lr()[0], "grad_norm": self.grad_norm}
                    self.metrics["tokens"] = self.tokens
                    bar.set_postfix_str("loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s".format(**self.metrics))
                bar.update()
                yield dict(self.metrics) if logged else {}

    def _train_step(self, batch: Rows) -> None:
        share = self._risen(self.config.weights.warmup_ratio)
        batch = self.weighting.weigh_rows(batch, share, np.random.default_rng([self.config.seed, self.step]))
        own = np.random.default_rng([self.config.seed, self.step, self.accelerator.process_index])
        live = self.weighting.live_weighting(share, own)
        rows = self.config.batch_size // self.accelerator.num_processes
        first = rows * self.accelerator.process_index
        size = self.config.micro_batch_size
        parts = [batch.take(slice(at, min(at + size, first + rows))) for at in range(first, first + rows, size)]
        targets, weight_sum = self._count(batch, share)
        self.tokens += int(batch.tokens.sum())
        self.window.enter(batch)
        if weight_sum:
            denominator = targets if self.config.normalization == "tokens" else weight_sum
            coefficients = self._coefficients()
            runs = [self._run_part(p, denominator, coefficients, live, last=p is parts[-1]) for p in parts]
            sums = torch.stack(runs)
            if self._update(parts, sums):
                self.window.add(sums.sum(0), coefficients, targets)
        else:
            self.window.counters["no_signal_steps"] += 1
        self.scheduler.step()
        self.optimizer.zero_grad()

    def _count(self, batch: Rows, share: float) -> tuple[float, float]:
        """Targets of the first offset in the whole step, and the sum of their weights."""
        ids, weights = torch.from_numpy(batch.position_ids), torch.from_numpy(batch.weights).double()
        targets, weight_sum = count_targets(ids, weights, self.config.heads.offsets[0], scored=self.weighting.live)
        return float(targets), self.weighting.weight_sum(float(weight_sum), share)

    def _run_part(
        self, part: Rows, denominator: float, coefficients: Tensor, live: LiveWeighting | None, *, last: bool
    ) -> Tensor:
        """Forward and backward pass of a micro-batch; returns its head sums (P, 6) for the whole step's mean."""
        with nullcontext() if last else no_sync(self.accelerator, self.model):
            micro_batch = to_device(part, self.accelerator.device)
            with self.accelerator.autocast():
                loss, sums = self.model(*micro_batch, coefficients=coefficients, live=live, objective=self.objective)
            # DDP and FSDP2 average gradients over processes; this loss is to be summed.
            self.accelerator.backward(loss * (self.accelerator.num_processes / denominator))
        sums[:, 0] /= denominator
        return sums

    def _update(self, parts: list[Rows], sums: Tensor) -> bool:
        """Take the optimizer step, unless there is no weight or something is not finite; says whether it was taken.

        Args:
            parts: the micro-batches.
            sums: (micro-batches, P, 6) their head sums.

        Raises:
            UserError: too many steps in a row were not taken.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.grad_norm = float(norm)
        finite = sums.isfinite().flatten(1).all(1)
        weight = sums[..., HEAD_SUMS.index("weight")].sum()
        good, weight = self.accelerator.reduce(torch.stack([finite.all().to(weight), weight]), "sum").tolist()
        if weight == 0:  # of live weights this is known only now
            self.window.counters["no_signal_steps"] += 1
            return False
        if math.isfinite(self.grad_norm) and good == self.accelerator.num_processes:
            self.optimizer.step()
            self.bad_in_a_row = 0
            return True
        self.window.counters["bad_steps"] += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row > self.config.max_bad_steps:
            suspects = [part for part, good in zip(parts, finite.tolist(), strict=True) if not good] or parts
            raise UserError(self._not_finite(suspects))
        return False

    def _coefficients(self) -> Tensor:
        """The factors of offsets and token order prediction in this step (C,)."""
        first, *others = self.config.heads.loss_coefficients
        share = self._risen(self.config.heads.warmup_ratio)
        return torch.tensor([first, *(share * other for other in others)], device=self.accelerator.device)

    def _risen(self, warmup_ratio: float) -> float:
        """How much of what rises in this share of the steps has come at this step, from 0 to 1."""
        warmup = warmup_ratio * self.steps
        return min(1.0, self.step / warmup) if warmup else 1.0

    def prepare_checkpoint(self) -> None:
        """Bring the window's sums together in the main process, and make sure that the model is worth keeping.

        Raises:
            UserError: a parameter is NaN or infinite.
        """
        self.window.gather(self.accelerator)
        if not all_finite(self.accelerator, self.model):
            raise UserError(
                f"--optimizer.learning_rate {self.config.optimizer.learning_rate:g}: the model is not finite at step "
                f"{self.step}; lower it and choose another --output, or check the weights of --model"
            )

    def _not_finite(self, suspects: list[Rows]) -> str:
        own = self.loader.files(source for rows in suspects for source in rows.sources)
        names = sorted(set(gather_object(own)))
        return (
            f"--optimizer.learning_rate {self.config.optimizer.learning_rate:g}: loss or gradient was not finite for "
            f"{self.bad_in_a_row} steps in a row, up to step {self.step + 1}; lower it and choose another --output, or "
            f"check the shards of these steps with 'wmtp verify': {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        )
