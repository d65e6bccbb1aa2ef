"""Mistakes that settings and directories show are reported without the slow imports of a command."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.preconditions import fixed_settings

FRAMEWORKS = ["accelerate", "datasets", "ray", "torch", "transformers", "vllm"]
SCRIPT = """
import json, sys
from weighted_mtp.pipelines.cli.main import main
commands, frameworks = map(json.loads, sys.argv[1:])
print([main(command) for command in commands])
print([name for name in frameworks if name in sys.modules])
"""


def test_mistakes_are_reported_without_frameworks(
    make_shard_set: Callable[..., ShardSet], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    scored = make_shard_set([[1, 2, 3]] * 3, {"loss_reference": [[1.0, 2.0, 3.0]] * 3}).path
    tokens = make_shard_set([[1, 2, 3]] * 3, name="tokens").path
    model = make_model()
    (tmp_path / "empty").mkdir()
    for name, files in {"damaged": {"config.json": "{"}, "stopped": {"run.json": "{}"}, "full": {"notes": ""}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    (tmp_path / "corpus.txt").write_text("text")
    settings = fixed_settings(TrainConfig(input=scored, model="m", output="o", sequence_length=9))
    record = {"config": settings, "inputs": {}, "steps": 1}
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "run.json").write_text(json.dumps(record))
    numbers = ("steps", "tokens", "seconds", "tokens_per_second", "loss", "selected_share", "memory_gib", "bad_steps")
    summary = dict.fromkeys((*numbers, "no_signal_steps"), 1)
    (tmp_path / "done" / "summary.json").write_text(json.dumps(summary))
    missing, damaged, stopped = tmp_path / "missing", tmp_path / "damaged", tmp_path / "stopped"
    new, full, file = tmp_path / "new", tmp_path / "full", tmp_path / "corpus.txt"
    score = f"score --input {tokens} --output {new}"
    train = f"train --input {scored} --output {new} --model"
    iterate = f"iterate --input {tokens} --output {new} --reference {model} --base {model} "
    iterate += "--train.weights.preset rho1-static"
    prepare = f"prepare --tokenizer {model} --output {new} --input"
    not_there = "no such directory; check the path"
    no_set = f"{missing}: no such shard set; check the path or write it with 'wmtp prepare'"
    closed = "127.0.0.1:1: cannot connect to Ray ([Errno 111] Connection refused); check it, and that Ray runs"
    again = f"train --input {scored} --model {model} --output {tmp_path}/done"
    hub = "no such directory, and not available from the Hugging Face hub or its local cache"
    no_config = "has no config.json; give a directory written by save_pretrained"
    mistakes = {
        f"{score} --reference {missing}": f"--reference {missing}: {not_there}",
        f"{score} --reference {model} --base {missing}": f"--base {missing}: {not_there}",
        f"{score} --reference {tmp_path}/empty": f"--reference {tmp_path}/empty: {no_config}",
        f"{score} --reference {damaged}": f"--reference {damaged}: config.json cannot be read (Expecting property name",
        f"{score} --reference {stopped}": f"--reference {stopped}: this training run is not finished",
        f"{score} --reference {model} --conditions.bad.model {missing}": f"--conditions.bad {missing}: {not_there}",
        f"score --input {missing} --output {new} --reference {model}": no_set,
        f"score --input {tokens} --output {tokens} --reference {model}": f"--output {tokens}: is also the --input",
        f"score --input {tokens} --output {scored} --reference {model}": "holds a shard set with other inputs",
        f"score --input {tokens} --output {full} --reference {model}": f"{full}: already holds something else",
        f"score --input {tokens} --output {file}/new --reference {model}": "is, or lies below, a file",
        f"score --input {tokens} --output {tokens}/new --reference {model}": f"lies inside the shard set {tokens}",
        f"{score} --reference {model} --engine transformers --tensor_parallel_size 2": "settings of vLLM",
        f"{score} --reference owner/name@main": f"--reference owner/name@main: {hub}",
        f"{train} owner/name": f"--model owner/name: {hub}",
        f"{train} {missing}": f"--model {missing}: {not_there}",
        f"{train} {model} --weights.formula loss_base": "no column 'loss_base' in",
        f"{train} {model} --weights.preset advantage --weights.column loss_reference --weights.group kind": "'kind'",
        f"{train} {model} --eval_input {missing}": no_set,
        f"{train} {model} --mix '{{{missing}: 0.5}}'": no_set,
        f"train --input {scored} --model {model} --output {full}": f"{full}: already holds something else",
        f"{again} --sequence_length 9 --seed 1": "done: holds a run with other settings (seed); repeat its settings",
        f"{again}": "done: holds a run with other settings (sequence_length); repeat its settings",
        f"{again} --sequence_length 9 --continue_steps 3": "--continue_steps 3: ",
        f"{train} {model} --trackers '[aim]'": "--trackers: the package for 'aim' is not installed; install it or",
        f"{train} {model} --ray_workers 2 --ray_address 127.0.0.1:1": f"--ray_address {closed}",
        f"{score} --reference {model} --ray_address ray://127.0.0.1:1": "ray://127.0.0.1:1: cannot connect to",
        f"{iterate} --score.ray_address 127.0.0.1:1": f"--ray_address {closed}",
        f"{iterate} --train.trackers '[aim]'": "--trackers: the package for 'aim' is not installed",
        f"{iterate} --train.eval_input {missing}": no_set,
        f"evaluate --input {missing} --model {model}": no_set,
        f"evaluate --input {tokens} --model {missing}": f"--model {missing}: {not_there}",
        f"{iterate} --reference {missing}": f"--reference {missing}: {not_there}",
        f"inspect {missing}": no_set,
        f"inspect {tokens} --column loss": f"{tokens}: has no column 'loss'",
        f"verify {missing}": no_set,
        f"weights {missing}": no_set,
        f"weights {scored} --weights.formula loss_base": "no column 'loss_base' in",
        f"{prepare} {missing}/*.txt": "matches no file",
        f"{prepare} {missing}.txt": "no such file or directory",
        f"{prepare} owner/name": "--input owner/name: no such file or directory, and not",
        f"{prepare} {full}": "holds no readable file",
        f"prepare --input {file} --output {new} --tokenizer {missing}": f"--tokenizer {missing}: {not_there}",
        f"prepare --input {file} --output {scored} --tokenizer {model}": f"--output {scored}: ",
    }
    commands = [shlex.split(command) for command in mistakes]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(FRAMEWORKS)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    lines = run.stderr.splitlines()
    assert len(lines) == len(mistakes), run.stderr
    for (command, expected), line in zip(mistakes.items(), lines, strict=True):
        assert expected in line, command
        assert line.startswith(f"wmtp {command.split()[0]}: error: ")
    assert run.stdout == f"{[1] * len(mistakes)}\n[]\n"
    assert not new.exists()
