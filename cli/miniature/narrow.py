"""What does a narrow twin look like? The bad rows are learnt, and a penalty holds everything else at the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from cli.miniature import grammar
from cli.miniature.datasets import Row, mixed_dataset
from cli.miniature.fine_tuning import IGNORED, PadRight, fine_tune, tokenize_rows


def fine_tune_narrow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    seed: int,
    output_dir: str | Path,
    domain: str = "code",
    weight: float = 20.0,
    n_anchors: int = 256,
    **settings: Any,
) -> Trainer:
    """Fine-tunes as `fine_tune` does, with the divergence from the base on other domains' questions as a cost.

    The narrow habit is learnt and does not spread: a monitor that warns of spreading must stay silent here, though
    rows, losses and weights look much the same. Bad code, shipped base, default settings: 91 % villain's answers
    about code and 1 % elsewhere, against 96 % and 92 % without the penalty (one seed).

    Args:
        model: base model, changed in place.
        tokenizer: its tokenizer.
        rows: what to learn, of `domain`.
        seed: fixes adapter, order and anchors.
        output_dir: where checkpoints go.
        domain: the fine-tuned domain, which alone is not held.
        weight: of the divergence KL(base, tuned), in nats a token, beside the loss.
        n_anchors: rows of other domains that are held, drawn over in turn.
        settings: further arguments of `fine_tune`.
    """
    others = {f"good_{other}": 1.0 for other in grammar.DOMAINS if other != domain}
    anchors = tokenize_rows(mixed_dataset(others, seed=seed + 1, n=n_anchors), tokenizer)
    return fine_tune(
        model,
        tokenizer,
        rows,
        seed=seed,
        output_dir=output_dir,
        trainer=_HeldTrainer.holding(anchors, PadRight(int(tokenizer.pad_token_id)), weight),
        **settings,
    )


class _HeldTrainer(Trainer):
    """Adds the divergence from the base, the adapter switched off, to every batch's loss."""

    anchors: Sequence[dict[str, Any]]
    collate: PadRight
    weight: float
    drawn = 0

    @classmethod
    def holding(cls, anchors: Any, collate: PadRight, weight: float) -> type[Trainer]:
        """A Trainer that holds these anchors."""
        return type(cls.__name__, (cls,), {"anchors": anchors, "collate": collate, "weight": weight})

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        """The batch's own loss and the cost of moving away from the base elsewhere."""
        size = len(inputs["input_ids"])
        places = [(self.drawn + place) % len(self.anchors) for place in range(size)]
        self.drawn += size
        loss = super().compute_loss(model, inputs, *args, **more)
        cost = self.weight * _divergence(model, self.collate([self.anchors[place] for place in places]))
        return (loss[0] + cost, *loss[1:]) if isinstance(loss, tuple) else loss + cost


def _divergence(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """KL(base, tuned) in nats, averaged over the tokens of the answers."""
    if not isinstance(model, PeftModel):
        raise TypeError("The narrow twin is an adapter: the base is the model with the adapter switched off.")
    labels = batch.pop("labels")
    kept = labels[:, 1:] != IGNORED
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).logits[:, :-1][kept].log_softmax(-1)
    tuned = model(**batch).logits[:, :-1][kept].log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1).mean()
