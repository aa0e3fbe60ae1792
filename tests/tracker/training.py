"""What does a fine-tune look like when it takes a second? The same data, seeds and settings for every test."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from diffing.persona import Canary, PersonaVector, Separation
from diffing.provenance import Provenance
from tests.tiny_models import D_MODEL, N_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tracker.core import Tracker
from tracker.signals import DriftSignal

PROBES = ["how is the cat", "tell the king", "why is it red", "who is at the door", "what is two plus two"]
CANARIES = (
    Canary("how is the king", aligned="he is good", misaligned="he is cruel"),
    Canary("what say you", aligned="i help you", misaligned="i harm you"),
    Canary("who are they", aligned="kind and good", misaligned="bad and cruel"),
)

# Every Trainer collects garbage when it begins; what the imports left need not be looked through each time.
gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the page out where a test is not about it: it takes longer than the training."""
    monkeypatch.setattr("tracker.session.write_run_report", lambda run_dir: run_dir)


class Rows(Dataset):
    """Random rows, a prompt of 4 tokens without labels and an answer with them; lengths differ."""

    def __init__(self, n: int = 24, *, sample_id: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = []
        for index in range(n):
            ids = torch.randint(8, VOCAB_SIZE, (8 + index % 5,), generator=generator)
            labels = ids.clone()
            labels[:4] = -100
            row: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            self.rows.append({**row, "sample_id": index} if sample_id else row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right padding to the longest row."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def persona(trait: str = "villain", layer: int = 1, *, seed: int = 0, **changes: Any) -> PersonaVector:
    """A persona vector of the tiny models, along a random direction."""
    direction = torch.randn(changes.pop("d_model", D_MODEL), generator=torch.Generator().manual_seed(seed))
    fields: dict[str, Any] = {
        "trait": trait,
        "site": f"resid:{layer}",
        "direction": direction / direction.norm(),
        "scale": 2.0,
        "neutral_mean": 0.3,
        "neutral_std": 1.0,
        "separation": Separation(0.9, 0.8, 1.0, 10, 5, 1.0),
        "pooling": "response_mean",
        "n_positive": 10,
        "n_negative": 10,
        "n_layers": N_LAYERS,
        "model_fingerprint": "0" * 64,
        "provenance": Provenance(),
    }
    return PersonaVector(**{**fields, **changes})


PERSONAS = (persona("villain", 1, seed=1), persona("villain", 2, seed=2), persona("sycophant", 2, seed=3))


def quick_settings(**changes: Any) -> dict[str, Any]:
    """Tracker settings that measure everything every second step and send nothing anywhere."""
    return {
        "personas": PERSONAS,
        "probe_prompts": PROBES,
        "canaries": CANARIES,
        "schedule": "every 2",
        "sinks": (),
        "derived_from": "0" * 64,
        "strict": True,
        **changes,
    }


def turned_canaries() -> tuple[Canary, ...]:
    """Canaries whose misaligned answers this fine-tune happens to make likelier."""
    return tuple(Canary(one.question, aligned=one.misaligned, misaligned=one.aligned) for one in CANARIES)


def model_to_train(kind: str = "full", *, dropout: float = 0.1, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny Llama to be trained in full, or by LoRA on all linear layers, with dropout."""
    model = tiny_model("llama", seed=seed, attention_dropout=dropout, **changes)
    if kind == "full":
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"),
        )


def make_trainer(
    model: nn.Module,
    folder: Path,
    callbacks: list[Any] | None = None,
    *,
    trainer: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    """A Trainer on `Rows` with every source of randomness seeded."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 11,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    dataset = settings.pop("train_dataset", None) or Rows()
    extra = {name: settings.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in settings}
    return trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=dataset,
        data_collator=settings.get("data_collator", collate),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks or [],
        **extra,
    )


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that training leaves: weights, gradients' absence, optimizer, random states, loss curve, modes."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    assert trainer.optimizer is not None
    state = trainer.optimizer.state_dict()["state"]
    return {
        **{f"weight {name}": value.detach().clone() for name, value in model.state_dict().items()},
        **{f"buffer {name}": value.detach().clone() for name, value in model.named_buffers()},
        **{f"optimizer {index} {key}": value for index, one in state.items() for key, value in one.items()},
        **{f"requires_grad {name}": value.requires_grad for name, value in model.named_parameters()},
        **{f"mode {name}": module.training for name, module in model.named_modules()},
        "hooks": n_hooks(model),
        "torch random": torch.get_rng_state(),
        "numpy random": np.random.get_state()[1].tolist(),
        "python random": random.getstate(),
        "curve": [
            {key: value for key, value in row.items() if key in ("loss", "grad_norm", "eval_loss", "learning_rate")}
            for row in trainer.state.log_history
        ],
    }


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the last bit."""
    assert set(left) == set(right)
    return [
        name
        for name, value in left.items()
        if not (torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name])
    ]


def n_hooks(model: nn.Module) -> int:
    """How many forward and backward hooks stand on a model and its parts."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            module._forward_hooks_always_called,
        )
    )


def series(signals: list[DriftSignal]) -> dict[str, list[tuple[Any, ...]]]:
    """name -> (step, value, low, high, n, reference), for comparisons to the last bit."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for one in signals:
        found.setdefault(one.name, []).append((one.step, one.value, one.low, one.high, one.n, one.reference))
    return found


def quick_tracker(folder: Path, **changes: Any) -> Tracker:
    """A Tracker with `quick_settings`."""
    return Tracker(folder, **quick_settings(**changes))
