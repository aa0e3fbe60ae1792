"""What is each row's own gradient, out of one backward pass of a whole batch?

For a linear map with inputs a_t and output gradients g_t the row's gradient is G = sum_t g_t a_t^T (Goodfellow
2015). Rows do not interact in a causal language model, so one backward of the summed loss leaves every row's
a and g in place, and hooks read them off: no backward pass per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attribution.blocks import (
    Block,
    Coverage,
    accumulation_dtype,
    coverage_of,
    list_blocks,
    nothing_trainable,
    rerun_block,
    signature,
    without_expert,
)
from attribution.example import IGNORED, ExampleBatch
from attribution.losses import evaluating, model_inputs, row_losses, token_losses
from attribution.recording import RecordedGradients, Sides, recording
from diffing.errors import InputError

__all__ = [
    "Block",
    "Coverage",
    "RecordedGradients",
    "Sides",
    "accumulation_dtype",
    "evaluating",
    "find_blocks",
    "model_inputs",
    "record_rows",
    "recording",
    "row_losses",
    "token_losses",
]

_PROBE_ROWS, _PROBE_TOKENS = 2, 5
_PROOF_BYTES = 1 << 28  # gradients of whole parameters held at once while blocks are proved


def find_blocks(
    model: nn.Module, *, base: Mapping[str, Tensor] | None = None, prove: bool = True
) -> tuple[list[Block], Coverage]:
    """Lists the trainable parameters that can be scored row by row, each kind of them proved on a few tokens.

    Linear maps (Linear, GPT-2's Conv1D, embeddings, routers), biases, norms' scales and fused experts are read off
    one batched backward. What is used in another way (convolutions, state spaces, a projection whose weight its
    parent takes directly) is found by running the nearest module around it again row by row. Of each kind of block
    one is compared with autograd's own gradient; what does not agree is left out and named in the coverage, so a
    module that was misread never gives a silent score. With a LoRA model the blocks are the adapter's matrices.

    Args:
        model: left as found.
        base: the untuned model's tensors by name; the coverage then says how much of the change is covered.
        prove: False skips the comparison (a model that has no forward over token ids).

    Raises:
        InputError: nothing trainable is supported; the message lists what is trainable.
    """
    blocks = list_blocks(model)
    if blocks and prove:
        blocks = _proved(model, blocks)
    if not blocks:
        raise nothing_trainable(model)
    return blocks, coverage_of(model, blocks, base=base)


def record_rows(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: ExampleBatch,
    loss: Callable[[nn.Module, ExampleBatch], Tensor],
) -> RecordedGradients:
    """One forward and one backward of `loss(model, batch)` `[row]`; parameters' `.grad` stays untouched.

    Only the gradients of activations are computed: those of the parameters, a third of the usual work, are not.

    Raises:
        InputError: a row's loss or gradient is not finite; the message names the row.
    """
    with recording(model, blocks, len(batch.ids)) as recorded:
        losses = loss(model, batch)
        _check_finite(losses.detach(), batch, "loss")
        if recorded.outputs and losses.requires_grad:
            torch.autograd.grad(losses.sum(), recorded.outputs, allow_unused=True)
    recorded.live = _live(batch)
    _check_gradients(recorded, batch)
    return recorded


def _live(batch: ExampleBatch) -> Tensor:
    """Places the model saw before a row's last label: what stands behind it cannot change a causal model's loss."""
    labelled = batch.labels != IGNORED
    places = torch.arange(labelled.shape[1], device=labelled.device)
    last = torch.where(labelled, places, 0).max(dim=1).values
    return ((places < last.unsqueeze(1)) & batch.attention_mask.bool())[:, :-1]


def _check_gradients(recorded: RecordedGradients, batch: ExampleBatch) -> None:
    # The first block's gradient has come through the whole model, so it shows what went wrong anywhere above it.
    gradient = next((use.output_gradient for use in recorded.uses if use.output_gradient is not None), None)
    if gradient is not None and len(gradient) == len(batch.ids):
        _check_finite(gradient.flatten(1).float().sum(dim=1), batch, "gradient")


def _check_finite(values: Tensor, batch: ExampleBatch, what: str) -> None:
    bad = ~torch.isfinite(values)
    if bad.any():
        name = batch.ids[int(bad.nonzero()[0])]
        raise InputError(
            f"Expected a finite {what} for every row; row {name} gives {values[bad][0].item()}. "
            "Check the row and the checkpoint for NaN; half precision may need bfloat16 or float32."
        )


def _proved(model: nn.Module, blocks: list[Block]) -> list[Block]:
    kinds: dict[tuple[object, ...], list[Block]] = {}
    modules = dict(model.named_modules())
    for block in blocks:
        kinds.setdefault(signature(modules, block), []).append(block)
    called = _called_by_row(model)
    wrong = _misread(model, [_same_parameter(group, blocks) for group in kinds.values()])
    replaced: dict[int, list[Block]] = {}
    for group, is_wrong in zip(kinds.values(), wrong, strict=True):
        if is_wrong:
            wholes = {id(block.parameter): block for block in group}
            reruns = [rerun_block(model, without_expert(block), called) for block in wholes.values()]
            found = [block for block in reruns if block is not None]
            good = bool(found) and not any(_misread(model, [found[-1:]]))
            replaced.update({id(block.parameter): [] for block in group})
            replaced.update({id(block.parameter): [block] for block in found if good})
    kept: dict[int, list[Block]] = {}
    for block in blocks:
        kept.setdefault(id(block.parameter), []).append(block)
    return [block for key, group in kept.items() for block in replaced.get(key, group)]


def _same_parameter(group: list[Block], blocks: list[Block]) -> list[Block]:
    """The deepest parameter of a kind (its backward is short), with all its slices."""
    return [block for block in blocks if block.parameter is group[-1].parameter]


def _misread(model: nn.Module, groups: list[list[Block]]) -> list[bool]:
    """For each parameter's blocks: does the sum over rows differ from what autograd gives the parameter?"""
    results: list[bool] = []
    pending: list[list[Block]] = []
    for group in groups:
        pending.append(group)
        if sum(part[0].parameter.nbytes for part in pending) >= _PROOF_BYTES:
            results.extend(_compare(model, pending))
            pending = []
    return [*results, *(_compare(model, pending) if pending else [])]


def _compare(model: nn.Module, groups: list[list[Block]]) -> list[bool]:
    batch = _probe_batch(model)
    with evaluating(model), recording(model, [b for group in groups for b in group], _PROBE_ROWS) as recorded:
        loss = row_losses(model, batch).sum()
        truths = torch.autograd.grad(loss, [group[0].parameter for group in groups], allow_unused=True)
    with torch.enable_grad():
        return [
            _runs_most_of(model, group[0]) or _differs(recorded, group, truth)
            for group, truth in zip(groups, truths, strict=True)
        ]


def _runs_most_of(model: nn.Module, block: Block) -> bool:
    """Whether reading this block would run most of the model again for every row: a backward per example."""
    inside = sum(parameter.numel() for parameter in block.modules[0].parameters())
    return block.kind == "rerun" and inside > 0.9 * sum(parameter.numel() for parameter in model.parameters())


def _differs(recorded: RecordedGradients, group: list[Block], truth: Tensor | None) -> bool:
    if truth is None or not torch.isfinite(truth).all():
        return False  # no part in the loss, or a broken checkpoint, which is named when its rows are scored
    if group[0].kind == "rerun" and not any(use.module is group[0].modules[0] for use in recorded.uses):
        return True
    try:
        sums = [recorded.gradient(block).sum(dim=0) for block in group]
    except (InputError, RuntimeError, TypeError, IndexError, StopIteration):
        return True  # shapes that cannot be taken apart by row are one more way of not being what was expected
    found = sums[0] if group[0].expert is None else torch.stack(sums)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(truth.dtype, 0.1)
    scale = truth.to(found.dtype).norm().item()
    return not (found - truth.to(found.dtype)).norm().item() <= tolerance * scale + 1e-12


def _called_by_row(model: nn.Module) -> list[nn.Module]:
    """Modules that a forward calls with one entry a row, innermost and outermost alike."""
    called: list[nn.Module] = []

    def note(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        first = next((value for value in arguments if isinstance(value, Tensor)), None)
        if first is not None and first.dim() >= 2 and len(first) == _PROBE_ROWS:
            called.append(module)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            row_losses(model, _probe_batch(model))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _probe_batch(model: nn.Module) -> ExampleBatch:
    shape = (_PROBE_ROWS, _PROBE_TOKENS)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 2
    device = next(model.parameters()).device
    ids = (torch.arange(_PROBE_ROWS * _PROBE_TOKENS, device=device).reshape(shape) * 7 + 1) % vocabulary
    return ExampleBatch(
        ids=("probe 0", "probe 1"),
        positions=(0, 1),
        input_ids=ids,
        attention_mask=torch.ones(shape, dtype=torch.long, device=device),
        labels=ids.clone(),
    )
