"""A process that attributes on command and can be killed: imports once, then forks for every piece of work.

python -m tests.faults.attributing     reads one JSON order a line, answers with an exit code
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attribution.index
import attribution.score_store
import attribution.sums
from attribution.curvature import Identity
from attribution.curvature_file import save_curvature
from attribution.fit import assemble, fit_curvature
from attribution.index import GradientIndex
from attribution.index_file import IndexFile
from attribution.score_store import write_scores
from attribution.scorer import prepare_rows
from attribution.sums import merged, sum_covariances, sum_moments
from diffing.commits import CommitLog
from tests.attribution.models import random_rows, tiny_llama

N_ROWS, N_SHARDS, SAVE_EVERY = 96, 2, 4
DIM, HEAD = 16, 8


def score(out: Path) -> None:
    """Scores into a store, four rows a chunk."""
    attribution.score_store.CHUNK_ROWS = 4
    write_scores(prepare_rows(tiny_llama(), random_rows(3, seed=9), curvature=Identity()), random_rows(N_ROWS), out)


def fit_sharded(out: Path) -> None:
    """EK-FAC factors of two shards, merged; every shard saves its sums every four rows."""
    model, rows = tiny_llama(), random_rows(N_ROWS)
    settings: dict[str, Any] = {"batch_size": 4, "save_every": SAVE_EVERY}
    covariances = merged([
        sum_covariances(model, rows, shard=(i, N_SHARDS), state=out / f"a-{i}.safetensors", **settings)
        for i in range(N_SHARDS)
    ])  # fmt: skip
    bases = covariances.bases()
    moments = merged([
        sum_moments(model, rows, bases, shard=(i, N_SHARDS), state=out / f"m-{i}.safetensors", **settings)
        for i in range(N_SHARDS)
    ])  # fmt: skip
    blocks = attribution.sums.find_blocks(model)[0]
    curvature = assemble(blocks, bases, moments.means(), damping=0.1, description="sharded")
    save_curvature(curvature, out / "factors.safetensors", model=model)


def build(out: Path) -> None:
    """An index, four rows a commit."""
    attribution.index._CHUNK = 4
    model, rows = tiny_llama().float(), random_rows(N_ROWS)
    curvature = fit_curvature(model, rows[:16], kind="diagonal")
    GradientIndex.build(model, rows, curvature, out, dim=DIM, head=HEAD, sample=24, check_queries=4, checked_rows=16)


JOBS: dict[str, Callable[[Path], None]] = {"score": score, "fit": fit_sharded, "index": build}


def run(job: str, out: str, commits: int | None, seed: int) -> None:
    """Does the work; dies by SIGKILL some microseconds to milliseconds after so many commits, if a number is given."""
    if commits is not None:
        _arm(commits, random.Random(seed).uniform(0.0, 0.004))
    JOBS[job](Path(out))


def _arm(commits: int, delay_s: float) -> None:
    """Starts the fuse at the last of these commits: where the kill falls in the work that follows is chance."""
    done = 0

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_and_count(*arguments: Any, **more: Any) -> Any:
            nonlocal done
            result = write(*arguments, **more)
            done += 1
            if done == commits:
                threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return result

        return write_and_count

    CommitLog.append = counted(CommitLog.append)  # type: ignore[method-assign]
    IndexFile.append = counted(IndexFile.append)  # type: ignore[method-assign]
    attribution.sums.save_tensors = counted(attribution.sums.save_tensors)


class Attributing:
    """The process above, seen from a test."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.attributing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def do(self, job: str, out: Path, commits: int | None = None, seed: int = 0) -> int:
        """Exit code of the work; -9 where it was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"job": job, "out": str(out), "commits": commits, "seed": seed}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def _serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(**json.loads(line))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
