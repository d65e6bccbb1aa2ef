"""Models and tokenizers of strangers: their code does not run unasked, and their faults take one line."""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weighted_mtp.schemas.configs import PrepareConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import OwnCodeError, load_config, load_tokenizer
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import read_json_file
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer
from weighted_mtp.scoring.conditions.models import check_model
from weighted_mtp.scoring.conditions.prompts import make_prompt
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.training.model.mtp_model import build_model, load_model
from weighted_mtp.training.run.compatibility import check_model as check_fits
from weighted_mtp.training.run.compatibility import check_tokenizer
from weighted_mtp.training.run.train import train

MakeModel = Callable[..., Path]
MakeSet = Callable[..., ShardSet]


class Trap:
    """An object that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def edit(path: Path, **changes: Any) -> None:
    """Change the JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message_of(attempt: Callable[[], Any]) -> str | None:
    """The message of the user error that it raises; None if it works."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture
def stranger(tmp_path: Path, make_model: MakeModel) -> Path:
    """A checkpoint whose classes are in its own Python file, which leaves a mark when it runs."""
    path = tmp_path / "stranger"
    shutil.copytree(make_model(), path)
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    classes = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own", "AutoTokenizer": ["code.Own", "code.Own"]}
    edit(path / "config.json", model_type="own", auto_map=classes)
    edit(path / "tokenizer_config.json", tokenizer_class="Own", auto_map=classes)
    return path


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_runs_only_with_the_flag(
    answer: str, stranger: Path, tmp_path: Path, make_shard_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a question on the terminal would be answered."""
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    shards = make_shard_set([[1, 2]])
    attempts: list[Callable[[], Any]] = [
        lambda: load_tokenizer(stranger, "--tokenizer stranger: cannot be loaded", "use another"),
        lambda: build_model(str(stranger), None, from_scratch=False),
        lambda: build_model(str(stranger), None, from_scratch=True),
        lambda: check_model(str(stranger), "--reference", shards),
        lambda: check_tokenizer(str(stranger), shards, trust_remote_code=False),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"stranger: .*\(it needs Python code of its own\)") as error:
            attempt()
        assert str(error.value).endswith("; if you trust it, add --trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_shard_set_never_runs(stranger: Path, tmp_path: Path, make_shard_set: MakeSet) -> None:
    shards = make_shard_set([[1, 2]])
    shutil.copytree(stranger, shards.tokenizer_path, dirs_exist_ok=True)
    with pytest.raises(OwnCodeError, match=r"/set/tokenizer: .* which never runs from a shard set"):
        load_corpus_tokenizer(shards)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0, "num_key_value_heads": 0},
        {"num_attention_heads": -1},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"hidden_size": 0},
        {"intermediate_size": -1},
        {"hidden_act": "none"},
        {"vocab_size": 10**30},
        {"architectures": -1, "model_type": "bert"},
        {"model_type": []},
        {"dtype": "no such"},
        {"attention_bias": 0},
        {"rope_parameters": 1},
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_impossible_configs_take_one_line(
    change: dict[str, Any], make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path
) -> None:
    path, shards = tmp_path / "odd", make_shard_set([[1, 2]])
    shutil.copytree(make_model(), path)
    edit(path / "config.json", **change)
    messages = [
        message_of(lambda: check_model(str(path), "--reference", shards)),
        message_of(lambda: build_model(str(path), None, from_scratch=False)),
        message_of(lambda: build_model(str(path), None, from_scratch=True)),
    ]
    assert any(messages)
    for message in filter(None, messages):
        assert re.search("/odd: .*; [^;]+$", message), message


def test_a_config_without_heads_is_named_before_the_tokenizer(
    make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path
) -> None:
    """Loading a tokenizer reads the config, too."""
    path = tmp_path / "odd"
    shutil.copytree(make_model(), path)
    edit(path / "config.json", num_attention_heads=0, num_key_value_heads=0)
    message = r"/odd: config.json cannot be read \(ZeroDivisionError: integer .*\); restore the checkpoint"
    with pytest.raises(UserError, match=f"--model .*{message}"):
        check_tokenizer(str(path), make_shard_set([[1, 2]]), trust_remote_code=False)
    with pytest.raises(UserError, match=f"--base .*{message}"):
        check_model(str(path), "--base", make_shard_set([[1, 2]]))


def test_a_kernel_that_is_not_installed(make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    shutil.copytree(make_model(), path)
    edit(path / "config.json", _attn_implementation="flash_attention_2")
    attempts: list[Callable[[], Any]] = [
        lambda: check_model(str(path), "--reference", make_shard_set([[1, 2]])),
        lambda: build_model(str(path), None, from_scratch=False),
    ]
    for attempt in attempts:
        with pytest.raises(
            UserError, match=r"/odd: .*FlashAttention2.*; install what it needs, or remove that from its"
        ):
            attempt()
    with pytest.raises(UserError, match=r"^--attention flash_attention_2: cannot be used \(Flash.*\); choose another$"):
        build_model(str(path), None, from_scratch=False, attention="flash_attention_2")


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "kernels-community/flash\n-attn2"},
        {"attn_implementation": {"": "else/where@main:name"}},
        {"experts_implementation": "sonicmoe"},
    ],
)
def test_kernels_from_the_hub_need_trust(
    change: dict[str, Any], make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    shutil.copytree(make_model(), path)
    edit(path / "config.json", **change)
    attempts: list[Callable[[], Any]] = [
        lambda: check_model(str(path), "--reference", make_shard_set([[1, 2]])),
        lambda: build_model(str(path), None, from_scratch=False),
        lambda: build_model(str(path), None, from_scratch=True),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"/odd: config.json wants the kernel .*; if you trust it, add --trust_re"):
            attempt()
    assert load_config("--model", path, trust_remote_code=True).num_hidden_layers == 2


def test_a_negative_limit_of_positions_is_none(make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path) -> None:
    """As in XLNet."""
    path = tmp_path / "odd"
    shutil.copytree(make_model(), path)
    edit(path / "config.json", max_position_embeddings=-1)
    assert check_model(str(path), "--reference", make_shard_set([[1, 2]])).max_length is None
    check_fits(load_model(str(path)), str(path), make_shard_set([[1, 2]]), 2)


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_take_one_line(whole: bool, make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path) -> None:
    """transformers would load the base model that an adapter names, or apply the adapter."""
    path = tmp_path / "adapter"
    shutil.copytree(make_model(), path)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(make_model(seed=1))}))
    if whole:
        with pytest.raises(UserError, match=r"--base .*/adapter: is an adapter .*; merge it into its base model"):
            check_model(str(path), "--base", make_shard_set([[1, 2]]))
    else:
        (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"/adapter: is an adapter \(adapter_config.json\); merge it into its base"):
        build_model(str(path), None, from_scratch=False)


@pytest.mark.parametrize("content", ["trap", "garbage", "empty"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_not_executed(content: str, make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    shutil.copytree(make_model(), path)
    (path / "model.safetensors").unlink()
    pickles = {"trap": pickle.dumps(Trap(tmp_path / "ran")), "garbage": b"\x80garbage", "empty": b""}
    (path / "pytorch_model.bin").write_bytes(pickles[content])
    with pytest.raises(UserError, match=r"/pickled: cannot load the model .*; give") as error:
        build_model(str(path), None, from_scratch=False)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"/pickled: its weights cannot be read .*; restore the checkpoint"):
        check_model(str(path), "--reference", make_shard_set([[1, 2]]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["gone", "models/gone", "/gone/model", "./gone"])
def test_a_directory_that_is_gone(name: str, make_shard_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such directory.*; check"):
        build_model(name, None, from_scratch=False)
    with pytest.raises(UserError, match=r"--model .*no such directory.*; check"):
        check_tokenizer(name, make_shard_set([[1, 2]]), trust_remote_code=False)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deep_nesting(depth: int, make_model: MakeModel, make_shard_set: MakeSet, tmp_path: Path) -> None:
    nested = "[" * depth + "]" * depth
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        shutil.copytree(make_model(), path)
        (path / name).write_text(f'{{"model_type": "llama", "x": {nested}}}')
        with pytest.raises(UserError, match=f"--reference {path}: "):
            check_model(str(path), "--reference", make_shard_set([[1, 2]]))
    record = tmp_path / "run.json"
    record.write_text(nested)
    if depth > 10_000:
        with pytest.raises(UserError, match=r"run.json: is damaged"):
            read_json_file(record)


@pytest.mark.parametrize("token_id", [1 << 22, 1 << 31])
def test_a_token_id_that_no_model_has(token_id: int, tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = token_id
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "corpus.txt").write_text("a")
    settings = PrepareConfig(input=str(tmp_path / "corpus.txt"), tokenizer=str(tokenizer), output=tmp_path / "set")
    with pytest.raises(
        UserError, match=f"--tokenizer .*has the token id {token_id:,}(; use one with ids below|, and at)"
    ):
        prepare(settings)


def test_a_tokenizer_that_fails_on_a_prompt(make_shard_set: MakeSet) -> None:
    """Its regular expression takes too many steps, so its library panics."""
    shards = make_shard_set([[1, 2]])
    content = json.loads((shards.tokenizer_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (shards.tokenizer_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^--prompt: the corpus's tokenizer fails on a text \(Onig.*\); use another"):
        make_prompt("x" * 60, "--prompt", shards)


def test_files_of_a_shard_set_stay_out_of_the_trained_model(
    make_own_code: Callable[..., Path], make_shard_set: MakeSet, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The user trusts the code of the model, not that of the set, which is stored beside the set's tokenizer."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    (tokenizer / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        (tokenizer / name).write_text("{}")
    classes = {"AutoTokenizer": [None, "somebody/code--modeling_own.Evil"]}
    edit(tokenizer / "tokenizer_config.json", auto_map=classes)
    shards = make_shard_set([list(range(9)), [1, 2, 3]], tokenizer=tokenizer)
    own = make_own_code()
    settings = {"max_steps": 1, "batch_size": 1, "heads": {"offsets": [1]}, "trust_remote_code": True}
    train(TrainConfig(input=shards.path, model=str(own), output=tmp_path / "run", **settings))
    saved = tmp_path / "run" / "model"
    assert (saved / "modeling_own.py").read_text() == (own / "modeling_own.py").read_text()
    assert not (saved / "adapter_config.json").exists()
    assert "Evil" not in "".join(file.read_text() for file in saved.glob("*.json"))
    load_model(str(tmp_path / "run"), trust_remote_code=True)
    load_tokenizer(saved, "saved", "", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
