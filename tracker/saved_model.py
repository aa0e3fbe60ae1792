"""What model does a saved checkpoint hold, and what did its training start from?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn

from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.checkpoint_files import find_checkpoint
from diffing.errors import InputError


def load_saved(folder: Path | str, *, base: Any = None, device: str = "cpu") -> LoadedCheckpoint:
    """A saved checkpoint with its tokenizer; `base` matters to an adapter only, whose own record may be stale."""
    return load_checkpoint(folder, base=base if is_adapter(folder) else None, device=device)


def is_adapter(folder: Path | str) -> bool:
    """Whether a checkpoint holds an adapter rather than a whole model."""
    return find_checkpoint(folder).adapter is not None


def trainable_model(folder: Path | str, *, base: Any = None, device: str = "cpu") -> nn.Module:
    """A saved model with what was trained requiring gradients: the adapter where there is one, else everything."""
    model = load_saved(folder, base=base, device=device).model
    adapted = is_adapter(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not adapted or "lora_" in name or ".modules_to_save." in name)
    return model


def starting_model(folder: Path | str, *, base: Any = None, device: str = "cpu") -> Callable[[], nn.Module]:
    """What makes the model as it was before training: the base with a fresh adapter, or `base` itself.

    Raises:
        InputError: a full fine-tune, and no base is named.
    """
    folder = Path(folder)
    adapted = is_adapter(folder)
    if not adapted and base is None:
        raise InputError(
            f"Expected the model that training started from, since {folder.name} is a full fine-tune; got none. "
            "Name it with --base."
        )

    def start() -> nn.Module:
        if not adapted:
            return load_checkpoint(base, device=device).model.requires_grad_(True)
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        origin = base if base is not None else config.base_model_name_or_path
        config.base_model_name_or_path = str(origin)  # peft warns where it is another
        return get_peft_model(load_checkpoint(origin, device=device).model, config)

    return start
