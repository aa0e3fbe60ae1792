"""What did the Trainer leave beside a checkpoint's weights? Learning rates, and Adam's second moments.

`optimizer.pt` is a pickle file. It is read with `weights_only=True`, which unpickles tensors and plain containers and
refuses everything that could run code; nothing else in the package opens a pickle.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffing.checkpoint_files import read_json
from diffing.errors import CheckpointError, PathMissingError

_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.pt"


def learning_rate_at(folder: Path | str) -> float:
    """The rate logged nearest to the checkpoint's step; 1.0 where none was logged, so that checkpoints weigh alike.

    A schedule that ends at nothing logs its last checkpoint with next to no rate: that checkpoint then counts for
    little, as it should, since no step was taken from there.
    """
    path = Path(folder) / _STATE
    if not path.exists():
        return 1.0
    state = read_json(path)
    step = state.get("global_step", 0)
    rates = [
        (abs(entry["step"] - step), entry["learning_rate"])
        for entry in state.get("log_history", [])
        if "learning_rate" in entry and "step" in entry
    ]
    return float(min(rates)[1]) if rates else 1.0


def second_moments(folder: Path | str, model: nn.Module) -> dict[str, Tensor]:
    """Adam's running mean of squared gradients for every trainable parameter, by its name in the model.

    Args:
        folder: a Trainer checkpoint.
        model: the model that was trained, its trainable parameters requiring gradients as they did then.

    Raises:
        PathMissingError: no optimizer state was saved.
        CheckpointError: the file holds more than tensors, another optimizer, or other parameters.
    """
    found = {}
    for index, one in enumerate(optimizer_entries(folder, model)):
        moment = one.state.get("exp_avg_sq")
        if not isinstance(moment, Tensor) or moment.shape != one.parameter.shape:
            shape = "none" if moment is None else tuple(moment.shape)
            raise CheckpointError(
                f"Expected Adam's second moment of {one.name} {tuple(one.parameter.shape)} at place {index} in "
                f"{Path(folder) / _OPTIMIZER}; got {shape}. Make the same parameters trainable as in the run."
            )
        found[one.name] = moment
    return found


@dataclass(frozen=True, eq=False)
class OptimizerEntry:
    """What a saved optimizer holds of one parameter.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter itself.
        state: the optimizer's, by key; empty where it never had a gradient.
        group: settings of its group.
    """

    name: str
    parameter: nn.Parameter
    state: Mapping[str, Any]
    group: Mapping[str, Any]


def optimizer_entries(folder: Path | str, model: nn.Module) -> list[OptimizerEntry]:
    """The saved optimizer, parameter by parameter.

    Args:
        folder: a Trainer checkpoint.
        model: as for `second_moments`.

    Raises:
        PathMissingError: no optimizer state was saved.
        CheckpointError: the file holds more than tensors, or other parameters.
    """
    path = Path(folder) / _OPTIMIZER
    if not path.exists():
        raise PathMissingError(f"Expected {path}; it does not exist. Train with save_only_model=False, or do without.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"Expected tensors only in {path}; got {reason}. Do not use this file.") from error
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = _names_in_order(state, named, model)
    groups = {index: group for group in state["param_groups"] for index in group["params"]}
    return [
        OptimizerEntry(name, parameter, dict(state["state"].get(index) or {}), groups[index])
        for (name, parameter), index in zip(names, sorted(groups), strict=True)
    ]


def _names_in_order(
    state: dict, named: list[tuple[str, nn.Parameter]], model: nn.Module
) -> list[tuple[str, nn.Parameter]]:
    """The Trainer puts decayed parameters first, then biases and norms; a plain optimizer keeps the model's order."""
    groups = state.get("param_groups", [])
    sizes = [len(group["params"]) for group in groups]
    if sum(sizes) != len(named):
        raise CheckpointError(
            f"Expected optimizer state of {len(named)} trainable parameters; got {sum(sizes)}. "
            "Make the same parameters trainable as in the run."
        )
    if len(sizes) != 2:
        return named
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    plain = [pair for pair in named if pair[0].endswith("bias") or id(pair[1]) in norms]
    kept = {name for name, _ in plain}
    return [pair for pair in named if pair[0] not in kept] + plain
