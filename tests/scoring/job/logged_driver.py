"""`wmtp` with engines that log each row they score, identified by its first two tokens, but not the probe.

Run as a script, so that Ray sends what is defined here by value. Arguments: the log, seconds that a shard takes at
least, constants of `scoring.job.fleet` as JSON, the arguments of `wmtp`. Engines wait while the log has a sibling
`.hold`. While it has a sibling `.busy` they compute the rows again and again; each time they write their process to
`.computed`.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.job import fleet, run
from weighted_mtp.scoring.job.driver import ScoringJob
from weighted_mtp.scoring.job.scorer import PROBE_REQUEST, load_scoring_engine


class LoggedEngine:
    def __init__(self, engine: Engine, log: Path, seconds: float) -> None:
        self.engine = engine
        self.log = log
        self.seconds = seconds

    @property
    def computed_tokens(self) -> int:
        return self.engine.computed_tokens

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        if [request.input_ids.tolist() for request in requests] == [PROBE_REQUEST.input_ids.tolist()]:
            return self.engine.score(requests)
        rows = [int(request.input_ids[0]) * 250 + int(request.input_ids[1]) for request in requests]
        with open(self.log, "ab", buffering=0) as file:
            file.write("".join(f"{row} {os.getpid()}\n" for row in rows).encode())
        time.sleep(self.seconds)
        while self.log.with_suffix(".hold").exists():
            time.sleep(0.05)
        while self.log.with_suffix(".busy").exists():
            self.engine.score(requests)
            self.log.with_suffix(".computed").write_text(str(os.getpid()))
        return self.engine.score(requests)


def load_logged(model: ScoringModel, config: EngineConfig, *, log: Path, seconds: float) -> Engine:
    return LoggedEngine(load_scoring_engine(model, config), log, seconds)


if __name__ == "__main__":
    log, seconds, constants, *arguments = sys.argv[1:]
    vars(fleet).update(json.loads(constants))
    load = partial(load_logged, log=Path(log), seconds=float(seconds))
    run.ScoringJob = partial(ScoringJob, load=load)
    sys.exit(main(arguments))
