"""What is counted between two lines of the log, and the numbers made of it."""

import math
import resource
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.training.model.flops import StepFlops
from weighted_mtp.training.model.mtp_model import HEAD_SUMS
from weighted_mtp.training.rows import Rows


class Window:
    """Sums over the steps since the last line, and counters over the whole run.

    Attributes:
        head_sums: (P, 6) `HEAD_SUMS` of this process, the weighted losses divided by the denominators of their steps.
        loss: L of these steps, this process's part.
        steps: how many steps these are; steps without an update are not among them.
        targets: targets of the first offset in these steps and all processes, with weight or without.
        tokens: tokens of all steps and processes.
        pairs: tokens that these see, all together.
        started: seconds of training before the window.
        counters: over the whole run, steps left out because something was not finite or nothing had weight, and
            documents of which nothing had weight.
    """

    SUMS = ("head_sums", "loss")
    COUNTS = ("steps", "targets", "tokens", "pairs", "started", "counters")

    def __init__(self, heads: HeadsConfig, device: torch.device) -> None:
        self.heads = heads
        self.head_sums = torch.zeros(len(heads.parts), len(HEAD_SUMS), device=device)
        self.loss = torch.zeros((), device=device)
        self.counters = {"bad_steps": 0, "no_signal_steps": 0, "no_signal_documents": 0}
        self._begin(0.0)

    def _begin(self, seconds: float) -> None:
        self.head_sums.zero_()
        self.loss.zero_()
        self.steps = 0
        self.targets = self.tokens = self.pairs = 0.0
        self.started = seconds

    def enter(self, batch: Rows) -> None:
        """Count the rows of a whole step."""
        self.counters["no_signal_documents"] += int(batch.silent.sum())
        self.tokens += float(batch.tokens.sum())
        self.pairs += float(batch.position_ids.sum(dtype="int64") + batch.tokens.sum())

    def add(self, head_sums: Tensor, coefficients: Tensor, targets: float) -> None:
        """Count this process's part of a step that was taken, with so many targets in all processes."""
        self.targets += targets
        self.head_sums += head_sums
        self.loss += coefficients @ head_sums[: len(coefficients), 0]
        self.steps += 1

    def close(
        self, accelerator: Accelerator, flops: StepFlops, seconds: float, peak_flops: float | None
    ) -> dict[str, float]:
        """Metrics over all processes after `seconds` of training; the next window begins here.

        What is a mean over nothing is NaN.
        """
        self.gather(accelerator)
        steps = self.steps or math.nan
        metrics = {"loss": self.loss.item() / steps}
        rows = self.head_sums.double().tolist()
        for part, (weighted, plain, selected, correct, _, _) in zip(self.heads.parts, rows, strict=True):
            metrics[f"weighted_loss_{part}"] = weighted / steps
            metrics[f"plain_loss_{part}"] = plain / (selected or math.nan)
            metrics[f"accuracy_{part}"] = correct / (selected or math.nan)
        _, _, selected, _, weight, squared = rows[0]
        metrics["selected_share"] = selected / (self.targets or math.nan)
        metrics["effective_share"] = weight**2 / (squared * self.targets or math.nan)
        elapsed = seconds - self.started
        metrics["tokens_per_second"] = self.tokens / elapsed
        if peak_flops is not None:
            done = flops(self.tokens, self.pairs, self.head_sums) / accelerator.num_processes
            metrics["mfu"] = done / elapsed / peak_flops
        metrics["memory_gib"] = peak_memory() / (1 << 30)
        self._begin(seconds)
        return metrics | self.counters

    def gather(self, accelerator: Accelerator) -> None:
        """Bring the sums of all processes to the main process, and start from zero in the others."""
        for name in self.SUMS:
            total = accelerator.reduce(getattr(self, name), "sum")
            setattr(self, name, total if accelerator.is_main_process else torch.zeros_like(total))

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, after `gather`."""
        return {name: getattr(self, name).cpu() for name in self.SUMS} | {n: getattr(self, n) for n in self.COUNTS}

    def load_state_dict(self, state: dict[str, Any], *, main_process: bool) -> None:
        """Continue from a checkpoint, which has the sums of all processes."""
        for name in self.SUMS:
            getattr(self, name).copy_(state[name] if main_process else torch.zeros_like(state[name]))
        for name in self.COUNTS:
            setattr(self, name, state[name])


def peak_memory() -> int:
    """Bytes: the most that PyTorch had allocated on this process's GPU, or that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
