"""`wmtp demo`: the whole job on text that every Python installation has.

The setting is Rho-1's in small. A corpus mixes two domains, the standard library's sources and, as the smaller part,
its documentation. The documentation is what we care about: a reference model is tuned on more of it, the mixture is
scored with that, and students are trained on the mixture from one base model with the same token budget: with uniform
weights, with static Rho-1 weights, and with the same weights shuffled inside each sequence, so that an effect of the
scores can be told from an effect of uneven weights. All are evaluated on documentation that none was trained on.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from weighted_mtp.data.python_library import Document, documentation, sources, split, write_jsonl
from weighted_mtp.pipelines import prepare, score
from weighted_mtp.schemas.configs import (
    DemoConfig,
    HeadsConfig,
    OptimizerConfig,
    PrepareConfig,
    ScoreConfig,
    TrainConfig,
    WeightsConfig,
)
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.run.train import train

VOCABULARY = 2048
SEQUENCE_LENGTH = 256
ROWS_PER_STEP = 16
DOCUMENTATION_SHARE = 0.2
STUDENT_OFFSETS = (1, 2)
ARMS = {
    "uniform": WeightsConfig(),
    "static Rho-1": WeightsConfig(preset="rho1-static"),
    "shuffled control": WeightsConfig(preset="rho1-static", control="shuffled"),
}

console = Console(highlight=False, markup=False)


def run(config: DemoConfig) -> None:
    """Run all steps, those that are done already excepted, and print one table."""
    started = time.monotonic()
    root = config.output
    seed = config.seed
    announce(1, "corpus: the Python standard library's documentation and sources")
    write_corpus(root / "corpus", seed)
    announce(2, f"tokenizer of {VOCABULARY} ids, token shards")
    write_model_config(root / "config", root / "corpus" / "mixture.jsonl")
    for name in ("mixture", "curated", "held-out"):
        prepare.run(
            PrepareConfig(
                input=str(root / "corpus" / f"{name}.jsonl"),
                tokenizer=str(root / "config"),
                output=root / "tokens" / name,
                id_field="id",
                max_length=SEQUENCE_LENGTH,
                workers=1,  # the corpus is smaller than what starting processes costs
            )
        )
    announce(3, "base model on the mixture, reference model from it on the curated documentation")
    plain = HeadsConfig(offsets=(1,))
    mixture, curated = root / "tokens" / "mixture", root / "tokens" / "curated"
    results = {
        "base": train_model(
            root, "base", mixture, root / "config", config.base_steps, 3e-3, seed, heads=plain, from_scratch=True
        )
    }
    base = root / "models" / "base" / "model"
    results["reference"] = train_model(
        root, "reference", curated, base, config.reference_steps, 1e-3, seed, heads=plain
    )
    announce(4, "scores of the mixture: loss_base, loss_reference, excess_loss")
    scored = root / "scored"
    score.run(
        ScoreConfig(
            input=mixture,
            output=scored,
            reference=str(root / "models" / "reference" / "model"),
            base=str(base),
            engine=config.engine,
        )
    )
    announce(5, f"{len(ARMS)} students from the base model, {config.student_steps} steps on the scored mixture each")
    heads = HeadsConfig(offsets=STUDENT_OFFSETS)
    for arm, weights in ARMS.items():
        results[arm] = train_model(
            root, arm, scored, base, config.student_steps, 1e-3, seed, heads=heads, weights=weights
        )
    print_results(root, results, time.monotonic() - started)


def announce(step: int, text: str) -> None:
    """Head one step of the demo."""
    console.print(f"{step}/5 {text}", style="bold")


def write_corpus(directory: Path, seed: int) -> None:
    """Write `mixture.jsonl`, `curated.jsonl` (for the reference) and `held-out.jsonl`, no document in two of them."""
    try:
        parts = split(documentation(), mixture=0.5, curated=0.3, held_out=0.2)
    except ModuleNotFoundError as error:
        raise UserError("this Python was stripped of its documentation (pydoc_data); use a complete Python") from error
    code: list[Document] = []
    everything = sorted(sources())
    random.Random(seed).shuffle(everything)
    for document in everything:
        if size(code) >= size(parts["mixture"]) * (1 / DOCUMENTATION_SHARE - 1):
            break
        code.append(document)
    mixture = parts["mixture"] + code
    random.Random(seed).shuffle(mixture)
    for name, documents in (("mixture", mixture), ("curated", parts["curated"]), ("held-out", parts["held_out"])):
        write_jsonl(directory / f"{name}.jsonl", documents)


def size(documents: list[Document]) -> int:
    """Characters in all documents."""
    return sum(len(text) for _, text in documents)


def write_model_config(directory: Path, corpus: Path) -> None:
    """Train a byte-level BPE tokenizer on the mixture and write it with the config of a Llama of 1.1 M parameters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus) as file:
        backend.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>").save_pretrained(directory)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(directory)


def train_model(
    root: Path, name: str, shards: Path, model: Path, steps: int, learning_rate: float, seed: int, **settings: Any
) -> dict[str, Any]:
    """Train one model of the demo and return its summary."""
    console.print(f"    {name}: {steps} steps of {ROWS_PER_STEP * SEQUENCE_LENGTH:,} tokens")
    return train(
        TrainConfig(
            input=shards,
            model=str(model),
            output=root / "models" / name.replace(" ", "-").lower(),
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            sequence_length=SEQUENCE_LENGTH,
            batch_size=ROWS_PER_STEP,
            micro_batch_size=ROWS_PER_STEP,
            max_steps=steps,
            seed=seed,
            eval_input=root / "tokens" / "held-out",
            **settings,
        )
    )


def print_results(root: Path, results: dict[str, dict[str, Any]], seconds: float) -> None:
    """Print what every model lost on the held-out documentation, and what to try next."""
    table = Table(title="held-out documentation: loss in nats per token", title_justify="left")
    table.add_column("model", no_wrap=True)
    for offset in STUDENT_OFFSETS:
        table.add_column(f"offset {offset}", justify="right")
    for column in ("tokens", "selected", "time"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        losses = [result.get(f"eval_loss_{offset}") for offset in STUDENT_OFFSETS]
        table.add_row(
            name,
            *("-" if loss is None else f"{loss:.4f}" for loss in losses),
            f"{result['tokens']:,}",
            f"{result['selected_share']:.0%}",
            f"{result['seconds']:.0f} s",
            end_section=name == "reference",
        )
    console.print()
    console.print(table)
    loss = {name: result["eval_loss_1"] for name, result in results.items()}
    console.print(
        f"static Rho-1 against uniform: {loss['static Rho-1'] - loss['uniform']:+.4f} nats, "
        f"against its shuffled control: {loss['static Rho-1'] - loss['shuffled control']:+.4f} nats "
        "(negative is better; one seed)"
    )
    console.print(f"all files are in {root}; this run took {seconds:.0f} s\n")
    console.print(
        "try next:\n"
        f"  wmtp inspect {root / 'scored'} --column excess_loss\n"
        f"  wmtp verify {root / 'scored'}\n"
        f"  wmtp evaluate --model {root / 'models' / 'static-rho-1'} --input {root / 'tokens' / 'held-out'}\n"
        f"  wmtp train --input {root / 'scored'} --model {root / 'models' / 'base' / 'model'} --output runs/mine "
        "--sequence_length 256 --max_steps 100 --weights.preset soft-threshold",
        soft_wrap=True,
    )
