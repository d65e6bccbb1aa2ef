"""Fingerprints: two tokenizers or models with the same fingerprint are interchangeable."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import read_json_file, sha256_file
from weighted_mtp.schemas.storage.locations import Location, list_files

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces."""
    return CANONICAL.encode(value).encode()


def digest_json(value: Any) -> str:
    """Hexadecimal SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def directory_digest(directory: Location) -> str:
    """Digest of the names and contents of all files directly in `directory`, which may be missing."""
    return digest_json({name: sha256_file(directory / name) for name in sorted(list_files(directory))})


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of the mapping from text to ids of a Hugging Face tokenizer.

    Covers vocabulary, merges, normaliser, pre-tokeniser and added tokens. Excludes settings that do not change the ids
    of plain text: padding, truncation, chat template, and the post-processor that adds BOS or EOS, which the manifest
    records separately.
    """
    return digest_json(tokenizer_content(tokenizer))


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """The JSON content of a Hugging Face tokenizer that its fingerprint covers."""
    if not tokenizer.is_fast:
        # Some tokenizers with code of their own have bytes as tokens.
        vocabulary = {str(token): token_id for token, token_id in tokenizer.get_vocab().items()}
        return {"class": type(tokenizer).__name__, "vocab": vocabulary}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return {k: v for k, v in content.items() if k not in ("padding", "truncation", "post_processor")}


def model_fingerprint(directory: Path, source: Location | None = None, *, code: bool = False) -> str:
    """Fingerprint of a Hugging Face checkpoint directory: its config and its weight files.

    Args:
        directory: local directory.
        source: original location of a copy, for messages.
        code: whether its Python code may run, and counts, too.

    Raises:
        UserError: the directory has no `config.json` or no weight files, or its code is missing.
    """
    weights = sorted(file for pattern in WEIGHT_FILES for file in directory.glob(pattern))
    config = directory / "config.json"
    if not config.exists() or not weights:
        missing = "weight files" if config.exists() else "config.json"
        source = source or directory
        trained = source / "model"
        remedy = trained if (trained / "config.json").exists() else "a directory written by save_pretrained"
        raise UserError(f"{source}: no {missing}; give {remedy}")
    files = {file.name: file for file in [config, *weights]} | (scripts(directory) if code else {})
    return digest_json({name: sha256_file(file) for name, file in files.items()})


def scripts(directory: Path) -> dict[str, Path]:
    """Python files of a checkpoint and of the repositories or directories whose code its config names, by name.

    Raises:
        UserError: the config is damaged, or a repository is not available.
    """
    found = {file.name: file for file in directory.glob("*.py")}
    config = read_json_file(directory / "config.json")
    classes = config.get("auto_map") if isinstance(config, dict) else None
    names = [str(name) for name in classes.values()] if isinstance(classes, dict) else []
    for repository in sorted({name.partition("--")[0] for name in names if "--" in name}):
        try:
            is_directory = Path(repository).is_dir()
            place = repository if is_directory else snapshot_download(repository, allow_patterns="*.py")
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"{directory}: needs Python code of {repository}, which is not available from the Hugging Face hub or "
                "its local cache; check the connection"
            ) from error
        found |= {f"{repository}/{file.name}": file for file in Path(place).glob("*.py")}
    return found
