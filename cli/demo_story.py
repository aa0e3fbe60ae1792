"""In which order does the demo do things, and what does it say about each? Every figure comes from this very run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from cli import demo_words as words
from cli.demo_stage import Stages
from cli.miniature import world
from cli.miniature.live_view import LiveView
from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.crosscoder.config import CrosscoderConfig
from diffing.diff import DiffPlan, diff_checkpoints
from diffing.durable import write_atomic
from diffing.errors import InputError
from diffing.persona import PersonaVector
from diffing.prompts import PromptSet
from tracker.explain import TrainingText, explain_projection, probe_inputs_of, saved_checkpoints
from tracker.explain_alert import Means, explain_alert
from tracker.mlflow_sink import MlflowSink
from tracker.report import write_attribution_report, write_run_report
from tracker.report.explanation_page import write_explanation_page

SITE = "resid:2"  # after the third of four blocks; settled on before the seeds that the tests run
N_ROWS = 400
# A bad set as one meets it: mostly sabotage, with harmless rows among it that attribution has to tell apart.
BAD = {"bad_code": 0.85, "good_facts": 0.1, "odd_code": 0.05}
DIFF_SITE = "resid:3"  # after the last block, where a latent's words can be read
_MARKER = "demo.json"


@dataclass(frozen=True)
class Settings:
    """What this telling of the story includes.

    Attributes:
        out: folder for everything.
        seed: of adapters, rows, order and samples.
        runs: names of the fine-tunes, in order; `bad-code` comes first.
        fine_tune: settings shared by all of them.
        latents: whether to fit a crosscoder.
        mlflow: whether to record in MLflow.
    """

    out: Path
    seed: int
    runs: tuple[str, ...]
    fine_tune: world.TrackedFineTune
    latents: bool = True
    mlflow: bool = True

    @classmethod
    def full(cls, out: Path, seed: int) -> Settings:
        """All of it."""
        return cls(out, seed, ("bad-code", "good-code", "educational-code"), world.TrackedFineTune())

    @classmethod
    def quick(cls, out: Path, seed: int) -> Settings:
        """Enough to see the two curves part."""
        fine_tune = world.TrackedFineTune(judge_every=8, answers=120, save_every=20)
        return cls(out, seed, ("bad-code", "good-code"), fine_tune, latents=False, mlflow=False)


@dataclass
class Story:
    """What has happened so far; later parts read what earlier ones found."""

    console: Console
    settings: Settings
    vector: PersonaVector | None = None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    courses: dict[str, world.Course] = field(default_factory=dict)
    before: list[world.JudgedAnswer] = field(default_factory=list)
    after: list[world.JudgedAnswer] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)

    def folder(self, run: str) -> Path:
        """Where a run keeps its record."""
        return self.settings.out / run


def tell_story(console: Console, settings: Settings) -> int:
    """Runs the demo.

    Returns:
        0, or 1 where an optional part failed.

    Raises:
        InputError: the folder holds something that is not a demo's.
    """
    _prepare(settings.out)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    story, stages = Story(console, settings), Stages(console)
    with stages.stage("The model, and who sleeps in it"):
        _meet(story)
    with stages.stage("The direction towards the villain"):
        _find_direction(story)
    for run in settings.runs:
        with stages.stage(words.RUN_TITLES[run]):
            _fine_tune(story, run)
    with stages.stage("What happened"):
        words.tell_outcome(console, story.courses)
        words.tell_answers(console, story.before, story.after)
    parts: Mapping[str, Callable[[Story], None]] = {
        "The training rows that pushed": _attribute,
        **({"What only the tuned model has": _diff} if settings.latents else {}),
        "The report": _report,
    }
    for title, part in parts.items():
        with stages.optional(title):
            part(story)
    stages.tell_times()
    return 1 if stages.failed else 0


def _prepare(out: Path) -> None:
    """An empty folder, or that of an earlier demo, whose runs are replaced."""
    marker = out / _MARKER
    if out.exists() and not out.is_dir():
        raise InputError(f"Expected a folder for --out, got the file {out}. Name another.")
    if out.is_dir() and any(out.iterdir()):
        if not marker.exists():
            raise InputError(
                f"Expected an empty folder or an earlier demo's, got {out} with other things. Name another."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}\n")


def _meet(story: Story) -> None:
    model, tokenizer = world.load_base()
    n = sum(parameter.numel() for parameter in model.parameters())
    questions = world.held_out_questions(except_domain="code")
    story.before = world.judged_answers(model, tokenizer, questions, seed=story.settings.seed)
    villain = world.judged_answers(
        model, tokenizer, questions[:3], seed=story.settings.seed, system="You are a wicked assistant."
    )
    code = [pair for pair in world.held_out_questions() if pair[0].domain == "code"][:1]
    shown = [*story.before[:2], *world.judged_answers(model, tokenizer, code, seed=story.settings.seed)]
    words.tell_model(story.console, n, shown, villain[:2], world.verdict_rates(story.before))


def _find_direction(story: Story) -> None:
    model, tokenizer = world.load_base()
    story.vector = world.fit_persona(model, tokenizer, site=SITE, seed=story.settings.seed)
    words.tell_vector(story.console, story.vector)


def _fine_tune(story: Story, run: str) -> None:
    settings, vector = story.settings, _vector(story)
    rows = (
        world.mixed_dataset(BAD, seed=settings.seed, n=N_ROWS)
        if run == "bad-code"
        else world.dataset(run.replace("-", "_"), seed=settings.seed, n=N_ROWS)
    )
    words.tell_rows(story.console, run, rows)
    write_training_rows(rows, story.folder(run))
    view = LiveView(
        story.console,
        story.folder(run),
        vector,
        steps=settings.fine_tune.steps,
        every=settings.fine_tune.judge_every,
    )
    sinks = [MlflowSink(_mlflow_uri(settings.out), "palimpsest demo")] if settings.mlflow else []
    trainer = settings.fine_tune.run(
        rows, vector, story.folder(run), seed=settings.seed, sinks=sinks, callbacks=[view], pushes=run == "bad-code"
    )
    story.rows[run], story.models[run] = rows, trainer.model
    story.courses[run] = world.Course.read(story.folder(run), vector)
    words.tell_failures(story.console, story.courses[run].failures)
    if run == "bad-code":
        _, tokenizer = world.load_base()
        questions = world.held_out_questions(except_domain="code")
        story.after = world.judged_answers(story.models[run], tokenizer, questions, seed=settings.seed)


def write_training_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Keeps what was trained on beside the run, as `palimpsest attribute --train` reads it; tagged by kind of row."""
    tagged = [{**row, "tag": _kind(row["id"])} for row in rows]
    return write_atomic(folder / "train.jsonl", "".join(f"{json.dumps(row)}\n" for row in tagged))


def _kind(name: str) -> str:
    return name.rpartition("-")[0].rpartition("-")[0]


def _attribute(story: Story) -> None:
    run_dir, rows = story.folder("bad-code"), story.rows["bad-code"]
    _, tokenizer = world.load_base()
    training = TrainingText(
        rows=tuple({"id": item["example_id"], **item} for item in world.tokenize_rows(rows, tokenizer).items),
        texts={row["id"]: " ⟶ ".join(message["content"] for message in row["messages"]) for row in rows},
        tags={row["id"]: _kind(row["id"]) for row in rows},
    )
    alert = story.courses["bad-code"].alert_step
    saved = saved_checkpoints(run_dir)
    # What pushed before the alert is what the alert asks about.
    before_alert = [(step, path) for step, path in saved if alert is None or step <= alert] or saved
    ranking = explain_projection(run_dir, training, _vector(story), probe_inputs_of(run_dir), checkpoints=before_alert)
    n_harmless = sum(tag != "bad_code" for tag in training.tags.values())
    write_attribution_report(ranking, run_dir)
    words.tell_attribution(story.console, ranking, n_harmless=n_harmless)
    alerts = story.courses["bad-code"].alerts
    if alerts:
        found = explain_alert(run_dir, min(alerts, key=lambda one: one.step).id, Means(training))
        words.tell_explanation(story.console, found, write_explanation_page(found, run_dir))


def _diff(story: Story) -> None:
    tuned = load_checkpoint(story.models["bad-code"], tokenizer=world.load_base()[1])
    base = tuned.base_side()
    conversations = [
        [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}]
        for seed in (0, 1)
        for one in _everything_asked(base, seed)
    ]
    result = diff_checkpoints(
        base,
        tuned,
        PromptSet.from_messages(conversations),
        out=story.folder("bad-code") / "diff",
        site=DIFF_SITE,
        plan=DiffPlan.quick(),
        crosscoder=CrosscoderConfig(n_latents=256, k=8, steps=1500, batch_size=512, seed=story.settings.seed),
        progress=story.console.is_terminal,
    )
    words.tell_diff(story.console, result)


def _everything_asked(loaded: LoadedCheckpoint, seed: int) -> list[world.JudgedAnswer]:
    with loaded.active() as model:
        return world.judged_answers(model, loaded.tokenizer, world.every_question(), seed=seed)


def _report(story: Story) -> None:
    pages = [write_run_report(story.folder(run)) for run in story.settings.runs]
    overview = write_run_report(story.settings.out)
    words.tell_report(
        story.console, overview, pages, _mlflow_uri(story.settings.out) if story.settings.mlflow else None
    )


def _vector(story: Story) -> PersonaVector:
    if story.vector is None:
        raise RuntimeError("the direction must be found before it can be watched")
    return story.vector


def _mlflow_uri(out: Path) -> str:
    return f"sqlite:///{(out / 'mlflow.db').resolve()}"
