"""Which judge does a word on the command line stand for?

rules:FILE[#RUBRIC]      a rule file, JSON or YAML
hf:MODEL                 a local model, read by label probabilities; a folder or hub name
endpoint:MODEL@URL       an OpenAI-compatible server, such as endpoint:gpt-4o@https://api.openai.com/v1
mlflow:MODULE:NAME       an MLflow scorer, such as mlflow.genai.scorers:Safety
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.judging import Judge, Rubric

JUDGE_HELP = "rules:FILE[#RUBRIC], hf:MODEL, endpoint:MODEL@URL, or mlflow:MODULE:NAME."


@dataclass
class JudgeRoom:
    """Opens judges and closes what they hold; a model or server that two judges share is opened once.

    Attributes:
        api_key_env: environment variable with an endpoint's key; empty for none.
        folder: where an endpoint's replies are kept; None for nowhere.
        device: for local judges.
        dtype: likewise.
        samples: replies an exchange of endpoints without usable log-probabilities.
        orders: option orders of local judges.
        scale: lowest and highest number of an MLflow scorer.
    """

    api_key_env: str = ""
    folder: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"
    samples: int = 5
    orders: int = 2
    scale: tuple[float, float] = (0.0, 1.0)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _models: dict[str, LoadedCheckpoint] = field(default_factory=dict)

    def open(self, spec: str, rubric: Rubric) -> Judge:
        """The judge that a word stands for.

        Args:
            spec: see the top of this file.
            rubric: for judges that are models; of rules and scorers only the name counts.

        Raises:
            InputError: no such kind, or it cannot be opened.
        """
        from diffing.errors import InputError

        kind, _, rest = spec.partition(":")
        openers = {"rules": self._rules, "hf": self._local, "endpoint": self._endpoint, "mlflow": self._mlflow}
        if kind not in openers or not rest:
            raise InputError(f"Expected a judge as {JUDGE_HELP} Got {spec!r}. Write it like one of these.")
        return openers[kind](rest, rubric)

    def close(self) -> None:
        """Closes connections and caches."""
        self._held.close()

    def __enter__(self) -> JudgeRoom:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rules(self, rest: str, rubric: Rubric) -> Judge:
        from diffing.judging.rules import RulesJudge

        path, _, name = rest.partition("#")
        return RulesJudge.load(path, name or rubric.name)

    def _local(self, rest: str, rubric: Rubric) -> Judge:
        from diffing.checkpoint import load_checkpoint
        from diffing.judging.local import LocalJudge

        if rest not in self._models:
            self._models[rest] = load_checkpoint(rest, dtype=self.dtype, device=self.device)
        return LocalJudge(self._models[rest], rubric, orders=min(self.orders, len(rubric.choices)))

    def _endpoint(self, rest: str, rubric: Rubric) -> Judge:
        from diffing.endpoint import Endpoint, EndpointConfig
        from diffing.errors import InputError
        from diffing.judging.endpoint_judge import EndpointJudge

        # A model's name may hold an @ (a revision), a URL after its scheme seldom does.
        model, _, url = rest.rpartition("@")
        if not model:
            raise InputError(f"Expected endpoint:MODEL@URL, got endpoint:{rest}. Add the server's address.")
        config = EndpointConfig(url, model, api_key_env=self.api_key_env)
        cache = None if self.folder is None else self.folder / "replies.sqlite"
        endpoint = self._held.enter_context(Endpoint(config, cache=cache))
        return EndpointJudge(endpoint, rubric, samples=self.samples)

    def _mlflow(self, rest: str, rubric: Rubric) -> Judge:
        from tracker.mlflow_judge import MlflowJudge, load_scorer

        return MlflowJudge(load_scorer(rest), rubric.name, scale=self.scale)
