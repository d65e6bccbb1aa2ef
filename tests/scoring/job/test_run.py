"""`wmtp score` as a whole: real engines, real shards, and real Ray where it matters."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA, PROGRESS, TOKENIZER
from weighted_mtp.scoring.conditions.models import check_model

BOS = 256
SIZE, STRIDE = 48, 36
LENGTHS = [256, 1, 70, 48, 49, 2, 130, 256]
HALF_STEP = 2.0**-11
"""Largest relative error of rounding to float16."""


@pytest.fixture
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    for row in (0, 2, 4):
        sequences[row][0] = BOS
    return sequences


@pytest.fixture
def tokens(make_shard_set: Callable[..., ShardSet], sequences: list[list[int]]) -> ShardSet:
    carried = {"reward": [row / 4 for row in range(len(sequences))], "group": list("aabbccdd")}
    return make_shard_set(sequences, rows_per_shard=3, name="tokens", sequence_columns=carried)


@pytest.fixture
def config(tokens: ShardSet, reference_model: Path, tmp_path: Path) -> Callable[..., ScoreConfig]:
    def make(**settings: object) -> ScoreConfig:
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "reference": str(reference_model)}
        return ScoreConfig.model_validate(defaults | {"engine": "transformers"} | settings)

    return make


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray must not start")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    """One Ray for the tests that need not see it start."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def model_losses(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    losses = -log_probabilities(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return np.concatenate([[np.nan], losses.numpy()])


def model_entropies(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    log_p = log_probabilities(model, ids)
    return np.concatenate([[np.nan], -(log_p.exp() * log_p).sum(-1).numpy()])


def short_losses(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """Each token's loss from the window that scores it, one forward pass for each token."""
    losses = model_losses(model, ids[:SIZE])
    for token in range(SIZE, len(ids)):
        start = next(s for s in range(0, len(ids), STRIDE) if s + SIZE - STRIDE <= token < s + SIZE)
        window = ids[start : token + 1]
        if ids[0] == BOS:
            window = [BOS, *window[1:]]
        losses = np.append(losses, model_losses(model, window)[-1])
    return losses


@pytest.mark.integration
def test_scores_of_a_corpus_equal_the_definitions(
    request, config, tokens, sequences, reference_model, base_model, capfd
):
    """The main job, with vLLM where it is installed: reference, base and short context, in Ray started for the run."""
    request.getfixturevalue("vllm_installed")
    settings = {"base": str(base_model), "short_context": SIZE, "engine": "auto", "entropy": True}
    scored = run(config(**settings))
    assert not ray.is_initialized()

    reference, base = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (reference_model, base_model))
    expected = {
        "loss_reference": [model_losses(reference, ids) for ids in sequences],
        "entropy_reference": [model_entropies(reference, ids) for ids in sequences],
        "loss_base": [model_losses(base, ids) for ids in sequences],
        "loss_short": [short_losses(reference, ids) for ids in sequences],
    }
    expected["excess_loss"] = [a - b for a, b in zip(expected["loss_base"], expected["loss_reference"], strict=True)]
    expected["long_short"] = [a - b for a, b in zip(expected["loss_short"], expected["loss_reference"], strict=True)]
    assert list(scored.manifest.columns) == list(expected)
    assert [check for check in verify(scored.path, scored.manifest) if check.fault] == []
    for name, rows in expected.items():
        stored = [row for index in range(3) for row in scored.read(index)[name].to_pylist()]
        for row, wanted in zip(stored, rows, strict=True):
            np.testing.assert_allclose(np.asarray(row, np.float64), wanted, rtol=HALF_STEP, atol=1e-4 + 2.0**-10)
        finite = np.concatenate(rows)[np.isfinite(np.concatenate(rows))]
        assert scored.manifest.columns[name].statistics.mean == pytest.approx(finite.mean(), abs=1e-3)
        assert scored.manifest.columns[name].statistics.missing == len(sequences)

    manifest = scored.manifest
    assert manifest.derived_from == tokens.manifest.digest
    assert (manifest.corpus, manifest.tokenizer) == (tokens.manifest.corpus, tokens.manifest.tokenizer)
    assert [shard.name for shard in manifest.shards] == [shard.name for shard in tokens.manifest.shards]
    origin = manifest.columns["loss_short"].origin
    assert (origin.engine, origin.dtype, origin.window.size, origin.window.stride) == ("vllm", "float32", 48, 36)
    assert (origin.engine_method, origin.quantity) == ("pooler", "loss")
    assert manifest.columns["entropy_reference"].origin.quantity == "entropy"
    assert manifest.columns["long_short"].origin.minuend == "loss_short"
    AutoTokenizer.from_pretrained(scored.path / TOKENIZER)
    assert not (scored.path / PROGRESS).exists()

    printed = capfd.readouterr()
    assert "excess_loss" in printed.out
    assert "wmtp train --input" in printed.out.replace("\n", " ")
    assert "WARNING" not in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.integration
def test_no_cluster_at_the_address(config):
    with pytest.raises(UserError, match=r"--ray_address 127\.0\.0\.1:1: cannot connect") as caught:
        run(config(ray_address="127.0.0.1:1"))
    assert "\n" not in str(caught.value)


def test_finished_run_is_left_alone(config, score_here, capfd):
    first = run(config())
    modified = [file.stat().st_mtime_ns for file in sorted(first.path.iterdir())]
    again = run(config(workers=2, batch_tokens=64))
    assert again.manifest == first.manifest
    assert "already complete" in capfd.readouterr().out
    assert [file.stat().st_mtime_ns for file in sorted(first.path.iterdir())] == modified
    with pytest.raises(UserError, match=r"other inputs or settings \(columns\.long_short, columns\.loss_short\)"):
        run(config(short_context=SIZE))


@pytest.mark.slow
def test_killed_run_is_continued_and_gives_the_same_bytes(
    config, score_in_process, make_shard_set, reference_model, tmp_path, monkeypatch
):
    rng = np.random.default_rng(1)
    tokens = make_shard_set([rng.integers(0, 256, 256).tolist() for _ in range(400)], name="many", rows_per_shard=10)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = ["--input", tokens.path, "--output", killed, "--reference", reference_model, "--engine", "transformers"]
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from weighted_mtp.pipelines.cli.main import main; main()",
            "score",
            *map(str, settings),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (done := sorted((killed / PROGRESS).glob("*.parquet"))):
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # the worker notices that its driver is gone
    before = {file.name: file.stat().st_mtime_ns for file in (killed / DATA).glob("*.parquet")}
    assert not (killed / "manifest.json").exists()
    assert done[0].name in before
    (killed / ".shard-00039-of-00040.parquet.1.tmp").write_bytes(b"half")

    resumed = run(config(input=tokens.path, output=killed))
    monkeypatch.setattr("weighted_mtp.scoring.job.run.score_missing", score_in_process)
    fresh = run(config(input=tokens.path, output=whole))
    untouched = [name for name, modified in before.items() if (killed / DATA / name).stat().st_mtime_ns == modified]
    assert done[0].name in untouched
    assert resumed.manifest.digest == fresh.manifest.digest
    assert len(resumed.manifest.timings.score_seconds) == 40
    for file in (whole / DATA).glob("*.parquet"):
        assert (killed / DATA / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}


def test_only_missing_parts_are_scored(config, score_here, tmp_path):
    """A run that was stopped before its manifest, with the record of one shard gone."""
    settings = {"output": tmp_path / "parts"}
    scored = run(config(**settings))
    shutil.copytree(scored.path, tmp_path / "copy")
    shutil.rmtree(scored.path)
    shards = [shard.name for shard in scored.manifest.shards]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weighted_mtp.scoring.job.run.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(**settings))
    (scored.path / PROGRESS / shards[1]).unlink()
    modified = [(scored.path / DATA / name).stat().st_mtime_ns for name in shards]
    assert run(config(**settings)).manifest.digest == scored.manifest.digest
    again = [(scored.path / DATA / name).stat().st_mtime_ns for name in shards]
    assert [old == new for old, new in zip(modified, again, strict=True)] == [True, False, True]
    for name in shards:
        assert (scored.path / DATA / name).read_bytes() == (tmp_path / "copy" / DATA / name).read_bytes()


def test_a_model_with_code_of_its_own(config, running_ray, make_own_code):
    """It has the weights of the reference, and workers run its code, too."""
    own = make_own_code()
    with pytest.raises(UserError, match=r"--base .*: config.json cannot be read \(it needs Python code of its own\)"):
        run(config(base=str(own)))
    scored = run(config(base=str(own), trust_remote_code=True))
    table = scored.read(0)
    np.testing.assert_array_equal(flat_values(table["loss_base"]), flat_values(table["loss_reference"]))
    before = scored.manifest.columns["loss_base"].origin.fingerprint
    (own / "modeling_own.py").write_text((own / "modeling_own.py").read_text() + "# changed\n")
    assert model_fingerprint(own, code=True) != before


def test_model_without_finite_losses(config, running_ray, make_model):
    path = make_model(seed=5)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[:] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(
        UserError, match=r"llama-5: no sequence of shard-\S+ can be scored \(token 1 has the score nan\); check"
    ):
        run(config(reference=str(path)))


def test_scores_are_added_to_a_scored_corpus(config, score_here, reference_model, base_model, tmp_path):
    """What is there is carried over or read; the rest equals scoring everything at once, up to float16."""
    first = run(config())
    more = {"base": str(base_model), "short_context": SIZE}
    added = run(config(input=first.path, output=tmp_path / "added", **more))
    at_once = run(config(output=tmp_path / "at-once", **more))
    assert list(added.manifest.columns) == list(at_once.manifest.columns)
    assert added.manifest.columns["loss_reference"] == first.manifest.columns["loss_reference"]
    assert added.manifest.derived_from == first.manifest.digest
    assert [check for check in verify(added.path, added.manifest) if check.fault] == []
    assert added.manifest.corpus.sequence_columns == {"reward": "number", "group": "label"}
    for index in range(len(first.manifest.shards)):
        table, expected = added.read(index), at_once.read(index)
        assert table["reward"].to_pylist() == [row / 4 for row in range(8)][3 * index : 3 * index + 3]
        assert table["group"].to_pylist() == list("aabbccdd")[3 * index : 3 * index + 3]
        for name in ("input_ids", "loss_reference", "loss_base", "loss_short"):
            np.testing.assert_array_equal(flat_values(table[name]), flat_values(expected[name]))
        for name in ("excess_loss", "long_short"):
            difference = flat_values(table[name]) - flat_values(expected[name])
            assert np.nanmax(np.abs(difference)) <= 2.0**-7, "the spacing of float16 below 16 nats"
    counts = added.value_counts()
    assert list(counts) == list(added.manifest.columns)
    assert counts["loss_reference"].statistics() == first.manifest.columns["loss_reference"].statistics

    other = config(input=added.path, output=tmp_path / "other", reference=str(base_model), base=str(reference_model))
    with pytest.raises(UserError, match=r"loss_reference with another origin \(dtype, fingerprint, model differ\)"):
        run(other.model_copy(update={"dtype": "bfloat16"}))
    swapped = run(other.model_copy(update={"suffix": "_swapped"}))
    assert list(swapped.manifest.columns)[-1:] == ["excess_loss_swapped"]
    total = flat_values(swapped.read(0)["excess_loss_swapped"]) + flat_values(added.read(0)["excess_loss"])
    assert np.nanmax(np.abs(total)) <= 2.0**-7


def test_damaged_shard(config, score_here, tokens):
    shard = tokens.path / DATA / tokens.manifest.shards[1].name
    content = bytearray(shard.read_bytes())
    content[200:260] = bytes(60)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name}: content differs from the manifest"):
        run(config())


def test_damaged_weights_end_in_one_line(config, running_ray, make_model):
    path = make_model(seed=6)
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"llama-6: its weights cannot be read \(.*; restore the checkpoint") as caught:
        run(config(reference=str(path)))
    assert "\n" not in str(caught.value)


def test_missing_weights(config, make_model):
    """vLLM would score with what is in memory: it misses neither the head nor a part of a fused projection."""
    path = make_model(seed=7)
    model = AutoModelForCausalLM.from_pretrained(path)
    for missing in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
        model.save_pretrained(path, state_dict=weights)
        with pytest.raises(UserError, match=rf"--reference .*llama-7: checkpoint lacks {missing}"):
            run(config(reference=str(path)))


def test_more_workers_than_the_cluster_has(config, running_ray):
    with pytest.raises(
        UserError, match=r"--workers 2: each needs 2 CPUs on one node, .*\(3 CPUs, 0 GPUs\) can hold 1;"
    ):
        run(config(workers=2, cpus_per_worker=2))


@pytest.mark.usefixtures("no_ray")
class TestRefusedBeforeAnyWork:
    def test_output_is_the_input(self, config, tokens):
        with pytest.raises(UserError, match=r"--output .*: is also the --input; choose another"):
            run(config(output=tokens.path))

    def test_gpus_where_there_are_none(self, config):
        if not torch.cuda.is_available():
            with pytest.raises(UserError, match="--gpus_per_worker 1: no GPU usable by transformers here"):
                run(config(gpus_per_worker=1))

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not (tmp_path / "scored" / PROGRESS).exists()

    def test_truncated_shard(self, config, tokens):
        shard = tokens.path / DATA / tokens.manifest.shards[0].name
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(UserError, match=rf"{shard.name}: shard has \d+ bytes instead of \d+ \(truncated"):
            run(config())

    def test_output_holds_something_else(self, config, tmp_path):
        (tmp_path / "scored").mkdir()
        (tmp_path / "scored" / "notes.txt").touch()
        with pytest.raises(UserError, match="holds something else"):
            run(config())

    def test_a_contrast_called_as_a_column_of_the_corpus(self, config, base_model):
        contrasts = {"reward": "loss_base - loss_reference"}
        with pytest.raises(UserError, match="already has a corpus column 'reward'; give the new columns other names"):
            run(config(base=str(base_model), contrasts=contrasts))

    def test_other_tokenizer(self, config, make_model):
        path = make_model(seed=1)
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        PreTrainedTokenizerFast.from_pretrained(path)
        with pytest.raises(UserError, match=r"--base .*llama-1: its tokenizer differs from the corpus's \(bytes\)"):
            run(config(base=str(path)))

    def test_no_tokenizer(self, config, make_model):
        path = make_model(seed=1)
        for file in path.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match="llama-1: has no usable tokenizer"):
            run(config(reference=str(path)))

    def test_too_few_token_ids(self, config, make_model):
        path = make_model(seed=1, vocab_size=250)
        with pytest.raises(UserError, match="has 250 token ids, but the corpus has the id 256"):
            run(config(reference=str(path)))

    def test_no_weights(self, config, make_model):
        path = make_model(seed=1)
        (path / "model.safetensors").unlink()
        with pytest.raises(UserError, match="llama-1: no weight files"):
            run(config(reference=str(path)))

    def test_no_config(self, config, make_model):
        path = make_model(seed=1)
        (path / "config.json").unlink()
        with pytest.raises(UserError, match=r"llama-1: no config\.json"):
            run(config(reference=str(path)))

    def test_not_a_causal_language_model(self, config, tmp_path, tokenizer_dir):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        shutil.copytree(tokenizer_dir, tmp_path / "bert")
        BertForMaskedLM(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path / "bert")
        with pytest.raises(UserError, match="BertForMaskedLM is not a causal language model"):
            run(config(reference=str(tmp_path / "bert")))

    def test_settings_of_another_engine(self, config):
        with pytest.raises(UserError, match=r"--tensor_parallel_size are settings of vLLM; leave them out"):
            run(config(engine_args={"seed": 1}))

    def test_entropies_of_the_public_api(self, request, config):
        request.getfixturevalue("vllm_installed")
        with pytest.raises(UserError, match="--entropy: prompt_logprobs returns no entropies"):
            run(config(engine="vllm", engine_method="prompt_logprobs", entropy=True))

    def test_unknown_model(self, config, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="--reference nobody/nothing: no such directory, and not available"):
            run(config(reference="nobody/nothing"))

    def test_context_shorter_than_the_sequences(self, config, make_model):
        path = make_model(seed=1, max_position_embeddings=128)
        with pytest.raises(
            UserError, match=r"at most 128 tokens, but the corpus has a sequence of 256; .* --max_length 128"
        ):
            run(config(reference=str(path)))


def test_pinned_revision_of_a_model_from_the_hub(tokens, reference_model, tmp_path, monkeypatch):
    """From the local cache, which has two commits of the model."""
    cache = tmp_path / "hub" / "models--team--small"
    commits = {"v1": "1" * 40, "main": "2" * 40}
    for revision, commit in commits.items():
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        shutil.copytree(reference_model, cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, commit in {"team/small@v1": "1" * 40, "team/small": "2" * 40, f"team/small@{'1' * 40}": "1" * 40}.items():
        model = check_model(name, "--reference", tokens)
        assert (model.name, model.revision, model.directory.name) == (name, commit, commit)
    assert check_model(str(reference_model), "--reference", tokens).revision is None
    with pytest.raises(UserError, match="--reference team/small@v2: no such directory, and not available"):
        check_model("team/small@v2", "--reference", tokens)
