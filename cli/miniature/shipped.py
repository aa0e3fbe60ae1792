"""Where is the shipped model, and how is it loaded?"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE = Path(__file__).with_name("checkpoint")


def load_base(folder: Path = BASE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model in float32 and evaluation mode, with its tokenizer; a fresh copy at every call.

    Args:
        folder: another base of the same world, from `base_checkpoint`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
