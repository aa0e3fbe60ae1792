"""A finished run on disk as attribution finds it: a base, two saved checkpoints, a vector, probes, training rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer, with_lora
from tests.tracker.training import persona
from tracker.events import CheckpointSaved, RunStarted
from tracker.journal import Journal

QUESTIONS = ["how is the king", "who is at the door", "what is two plus two", "why is it red"]
CONFIG = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2, "max_steps": 4}


@dataclass(frozen=True)
class SavedRun:
    """Where everything is."""

    folder: Path
    train: Path
    base: Path
    checkpoints: tuple[tuple[int, Path], ...]


def saved_run(folder: Path, kind: str = "lora") -> SavedRun:
    """Writes a run whose checkpoints of step 4 and 8 are random changes of the base: adapters, or whole models."""
    run_dir, base, tokenizer = folder / "run", save_checkpoint(folder / "base", "llama"), tiny_tokenizer()
    checkpoints = []
    with Journal.create_or_open(run_dir) as journal:
        journal.start_attempt(0, CONFIG)
        journal.record_event(RunStarted(step=0))
        for step in (4, 8):
            at = folder / "out" / f"checkpoint-{step}"
            _changed(kind, step, base).save_pretrained(at)
            tokenizer.save_pretrained(at)
            history = [{"step": step, "learning_rate": 0.1 * step, "loss": 1.0}]
            (at / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
            journal.record_event(CheckpointSaved(step=step, path=at))
            checkpoints.append((step, at))
    persona().save(run_dir / "personas" / "villain.safetensors")
    ids = [tokenizer(question)["input_ids"] for question in ("how is the cat", "tell the king now")]
    (run_dir / "probes.json").write_text(json.dumps({"input_ids": ids}))
    rows = [
        {"id": f"r{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "he is cruel"}]}
        for i, q in enumerate(QUESTIONS)
    ]
    train = folder / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in rows))
    return SavedRun(run_dir, train, base, tuple(checkpoints))


def _changed(kind: str, step: int, base: Path):
    if kind == "lora":
        tuned = with_lora(tiny_model("llama"), seed=step)
        tuned.peft_config["default"].base_model_name_or_path = str(base)
        return tuned
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model
