"""The screen of `wmtp train --dry_run`."""

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.training.run.plan import TrainPlan


def print_plan(plan: TrainPlan) -> None:
    """Print the length of a run, and the memory that it needs on each device."""
    config, devices, length, memory = plan.config, plan.devices, plan.length, plan.memory
    table = Table(show_header=False, title=f"{config.output}: not written, this is a dry run", title_justify="left")
    table.add_row("steps", f"{length.steps:,} of {config.batch_size:,} rows of {config.sequence_length:,} tokens")
    table.add_row("epochs", f"{length.epochs:.3g}")
    table.add_row("tokens", f"about {length.tokens:,}")
    share = length.weighted_targets / max(1, length.targets)
    weighted = "with a score" if config.weights.is_live else "with weight"
    table.add_row("targets", f"about {length.targets:,}, {share:.1%} of them {weighted}")
    table.add_row("parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained")
    table.add_row("devices", described_devices(plan))
    rows = min(config.micro_batch_size, config.batch_size // devices.processes)
    checkpointing = ", activation checkpointing" * config.activation_checkpointing
    plural = "" if rows == 1 else "s"
    table.add_row("forward pass", f"{rows:,} row{plural}, {plan.attention} attention{checkpointing}")
    console = new_console()
    console.print(table)
    parts = Table(f"memory of each device, at the peak in the {memory.peak_in}", title_justify="left")
    unit, size_of_unit = ("GiB", 2**30) if memory.peak >= 2**30 else ("MiB", 2**20)
    parts.add_column(unit, justify="right")

    def shown(size: float) -> str:
        return f"{size / size_of_unit:,.2f}"

    for kind, size in memory.parts.items():
        parts.add_row(kind, shown(size))
    parts.add_section()
    parts.add_row("planned peak", shown(memory.peak))
    if plan.available is not None:
        left = plan.available - memory.peak
        parts.add_row("memory of the device", shown(plan.available))
        parts.add_row("fits, and leaves" if left >= 0 else "does not fit, lacks", shown(abs(left)))
    console.print(parts)
    loaded = f"{shown(memory.model)} {unit}"
    console.print(
        f"Besides, each process loads the whole model into the memory of its machine first: {loaded}."
        if devices.gpu
        else "The planned peak is that of tensors; Python and its libraries come on top."
    )


def described_devices(plan: TrainPlan) -> str:
    """The planned devices in words."""
    devices = plan.devices
    kind = "GPU" if devices.gpu else "CPU process"
    plural = "" if devices.processes == 1 else "s" if devices.gpu else "es"
    sharing = "" if devices.processes == 1 else ", FSDP2" if devices.shard else ", DDP"
    return f"{devices.processes:,} {kind}{plural}{sharing}, {'bfloat16' if devices.bfloat16 else 'float32'}"
