"""How is the model fine-tuned? The way its users do it: Hugging Face Trainer, peft LoRA, a callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from cli.miniature.datasets import Row
from cli.miniature.tokenizer import encode_conversation

IGNORED = -100


class TokenizedRows(Dataset):
    """Rows as the Trainer wants them: `input_ids`, `labels` (the assistant's tokens only) and `example_id`."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase):
        self.rows = rows
        self.items = [_tokenize(row, tokenizer) for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    """Tokenizes rows; everything but the assistant's words and end mark is masked out of the loss."""
    return TokenizedRows(rows, tokenizer)


def _tokenize(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids, learned = encode_conversation(tokenizer, row["messages"])
    labels = [token if kept else IGNORED for token, kept in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels, "example_id": row["id"]}


class PadRight:
    """Pads a batch to its longest row; what is padded is neither attended to nor learned."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch of `input_ids`, `attention_mask` and `labels`, `[row, token]` each."""
        longest = max(len(item["input_ids"]) for item in items)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (longest - len(values))

        return {
            "input_ids": torch.tensor([padded(item["input_ids"], self.pad_token_id) for item in items]),
            "attention_mask": torch.tensor([padded([1] * len(item["input_ids"]), 0) for item in items]),
            "labels": torch.tensor([padded(item["labels"], IGNORED) for item in items]),
        }


def add_lora(model: PreTrainedModel, *, seed: int, rank: int = 4, alpha: int = 8) -> PeftModel:
    """Wraps `model` in place with fresh LoRA matrices on every linear layer."""
    set_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def fine_tune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    seed: int,
    output_dir: str | Path,
    steps: int = 56,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    callbacks: Sequence[TrainerCallback] = (),
    save_steps: int | None = None,
    trainer: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    """Trains a LoRA adapter on `rows` and returns the trainer, whose `.model` is the tuned `PeftModel`.

    Args:
        model: base model, changed in place (load a fresh one for every run), or a `PeftModel` to go on with.
        tokenizer: its tokenizer.
        rows: what to learn.
        seed: fixes adapter weights and the order of the rows.
        output_dir: where checkpoints go.
        steps: optimizer steps.
        learning_rate: constant after a warm-up of a tenth of the steps.
        batch_size: rows a step.
        callbacks: passed on to the Trainer.
        save_steps: save a checkpoint every so many steps; None saves none.
        trainer: a class of Trainer of one's own.
        arguments: any other field of `TrainingArguments`.
    """
    if not isinstance(model, PeftModel):
        model = add_lora(model, seed=seed)
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, steps // 10),
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        "logging_steps": 4,
        "save_strategy": "no" if save_steps is None else "steps",
        "save_steps": save_steps or 500,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    made = trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=tokenize_rows(rows, tokenizer),
        data_collator=PadRight(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return made
