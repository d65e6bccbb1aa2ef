"""Training metrics: sums accumulated between log lines, and metrics computed from them."""

import math
import resource
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.training.model.flops import StepFlops
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.rows import Rows


class MetricsAccumulator:
    """Metrics accumulated between log lines, and counters over the whole run.

    Attributes:
        head_sums: sums (P,) of this process; weighted losses are divided by the normalizers of their steps.
        loss: this process's share of L, summed over these steps.
        steps: number of steps with an update.
        targets: targets of the first offset in these steps, over all processes, including weight 0.
        tokens: tokens of all steps and processes.
        pairs: (query, key) pairs of attention in all steps and processes.
        started: training time before these steps, in seconds.
        counters: numbers over the whole run: nonfinite steps, steps without weight (both are skipped), and documents
            without weight.
    """

    COUNTS = ("steps", "targets", "tokens", "pairs", "started", "counters")

    def __init__(self, heads: HeadsConfig, device: torch.device) -> None:
        self.heads = heads
        self.head_sums = HeadSums.zeros(len(heads.predictions), device)
        self.loss = torch.zeros((), device=device)
        self.counters = {"bad_steps": 0, "no_signal_steps": 0, "no_signal_documents": 0}
        self._reset(0.0)

    def _reset(self, seconds: float) -> None:
        for total in (*self.head_sums, self.loss):
            total.zero_()
        self.steps = 0
        self.targets = self.tokens = self.pairs = 0.0
        self.started = seconds

    def count_rows(self, batch: Rows) -> None:
        """Count tokens, attention pairs and documents without weight in a whole step."""
        self.counters["no_signal_documents"] += int(batch.silent.sum())
        self.tokens += float(batch.tokens.sum())
        self.pairs += float(batch.position_ids.sum(dtype="int64") + batch.tokens.sum())

    def add_step(self, head_sums: HeadSums, coefficients: Tensor, targets: float) -> None:
        """Add a step with an update: this process's sums (P,), coefficients (C,), and the targets of all processes."""
        self.targets += targets
        for total, value in zip(self.head_sums, head_sums, strict=True):
            total += value
        self.loss += (coefficients * head_sums.weighted_loss[: len(coefficients)]).sum()
        self.steps += 1

    def compute_and_reset(
        self, accelerator: Accelerator, flops: StepFlops, seconds: float, peak_flops: float | None
    ) -> dict[str, float]:
        """Compute metrics over all processes after `seconds` of training, and reset. Means over no targets are NaN."""
        self.gather(accelerator)
        steps = self.steps or math.nan
        metrics = {"loss": self.loss.item() / steps}
        sums = HeadSums(*(total.double() for total in self.head_sums))
        for prediction, of_one in zip(self.heads.predictions, zip(*sums, strict=True), strict=True):
            one = HeadSums(*of_one)
            selected = one.selected.item() or math.nan
            metrics[f"weighted_loss_{prediction}"] = one.weighted_loss.item() / steps
            metrics[f"plain_loss_{prediction}"] = one.plain_loss.item() / selected
            metrics[f"accuracy_{prediction}"] = one.correct.item() / selected
        first = HeadSums(*(total[0] for total in sums))
        metrics["selected_share"] = first.selected.item() / (self.targets or math.nan)
        squared = first.squared_weight.item() * self.targets
        metrics["effective_share"] = first.weight.item() ** 2 / (squared or math.nan)
        elapsed = seconds - self.started
        metrics["tokens_per_second"] = self.tokens / elapsed
        if peak_flops is not None:
            done = flops(self.tokens, self.pairs, self.head_sums.selected) / accelerator.num_processes
            metrics["mfu"] = done / elapsed / peak_flops
        metrics["memory_gib"] = peak_memory() / (1 << 30)
        self._reset(seconds)
        return metrics | self.counters

    def gather(self, accelerator: Accelerator) -> None:
        """Sum over all processes in the main process, and reset the sums of the others."""
        sums = {name: accelerator.reduce(total, "sum") for name, total in self._sums().items()}
        self._set_sums(sums, main_process=accelerator.is_main_process)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, after `gather`."""
        return {name: total.cpu() for name, total in self._sums().items()} | {n: getattr(self, n) for n in self.COUNTS}

    def load_state_dict(self, state: dict[str, Any], *, main_process: bool) -> None:
        """Continue from a checkpoint, which holds the sums over all processes."""
        self._set_sums(state, main_process=main_process)
        for name in self.COUNTS:
            setattr(self, name, state[name])

    def _sums(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint: `head_sums` (P, 6), in the order of `HeadSums`, and the scalar `loss`."""
        return {"head_sums": torch.stack(self.head_sums, dim=-1), "loss": self.loss}

    def _set_sums(self, sums: dict[str, Tensor], *, main_process: bool) -> None:
        """Set all sums in the main process; set them to 0 in the others."""
        totals = (*self.head_sums, self.loss)
        for total, value in zip(totals, (*sums["head_sums"].unbind(-1), sums["loss"]), strict=True):
            total.copy_(value if main_process else torch.zeros_like(value))


def peak_memory() -> int:
    """Peak memory in bytes: allocated by PyTorch on this process's GPU, or resident in the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
