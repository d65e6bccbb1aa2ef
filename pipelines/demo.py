"""`wmtp demo`: the whole pipeline on text from the Python installation.

The experiment is a small version of Rho-1's. The corpus mixes two domains: the standard library's source code and, as
the smaller part, its documentation, which is the target domain. A reference model is tuned on more documentation and
scores the mixture. Students start from the same base model and train on the mixture with the same token budget: with
uniform weights, with static Rho-1 weights, and with these weights shuffled within each sequence. The shuffled control
separates the effect of the scores from that of unequal weights. All models are evaluated on held-out documentation.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from weighted_mtp.data.python_library import Document, documentation, sources, split, write_jsonl
from weighted_mtp.pipelines import prepare, score
from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.pipelines.reports.demo_summary import print_results
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
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.storage.claims import check_empty
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


def run(config: DemoConfig) -> None:
    """Run all unfinished steps and print one table.

    Raises:
        UserError: a step fails, or the output holds something else.
    """
    started = time.monotonic()
    root = config.output
    if not (root / "corpus" / "mixture.jsonl").exists():  # its first file
        check_empty(root)
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
                workers=1,  # the corpus takes less time than starting processes
            )
        )
    announce(3, "base model on the mixture; reference model tuned from it on curated documentation")
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
    print_results(root, results, STUDENT_OFFSETS, time.monotonic() - started)


def announce(step: int, text: str) -> None:
    """Print the heading of one step."""
    new_console().print(f"{step}/5 {text}", style="bold")


def write_corpus(directory: Path, seed: int) -> None:
    """Write `mixture.jsonl`, `curated.jsonl` (for the reference) and `held-out.jsonl`, disjoint sets."""
    try:
        parts = split(documentation(), mixture=0.5, curated=0.3, held_out=0.2)
    except ModuleNotFoundError as error:
        raise UserError("this Python lacks its documentation (pydoc_data); use a complete installation") from error
    code: list[Document] = []
    everything = sorted(sources())
    random.Random(seed).shuffle(everything)
    for document in everything:
        if characters(code) >= characters(parts["mixture"]) * (1 / DOCUMENTATION_SHARE - 1):
            break
        code.append(document)
    mixture = parts["mixture"] + code
    random.Random(seed).shuffle(mixture)
    for name, documents in (("mixture", mixture), ("curated", parts["curated"]), ("held-out", parts["held_out"])):
        write_jsonl(directory / f"{name}.jsonl", documents)


def characters(documents: list[Document]) -> int:
    """Total number of characters."""
    return sum(len(text) for _, text in documents)


def write_model_config(directory: Path, corpus: Path) -> None:
    """Train a byte-level BPE tokenizer on the mixture; save it with the config of a 1.1 M parameter Llama."""
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
    new_console().print(f"    {name}: {steps} steps of {ROWS_PER_STEP * SEQUENCE_LENGTH:,} tokens")
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
        ),
        ProgressBar,
    )
