"""What went into each block and what came back for what went out, during one forward and backward?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attribution.blocks import Block, accumulation_dtype
from attribution.experts import expert_sides
from diffing.errors import InputError

_NARROW = 8  # how much shorter one side must be for the product to be taken the other way round


@dataclass
class Use:
    """One call of one module in one forward: what went in, and what came back for what went out."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output_gradient: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sides:
    """One use of a weight: a row's gradient is the sum over tokens of left_t right_t^T.

    Attributes:
        left: `[row, token, d0]`, or token ids `[row, token]` that stand for one-hot vectors.
        right: `[row, token, d1]`.
        source: which of the two is the module's input; modules that share an input share this tensor's storage.
    """

    left: Tensor
    right: Tensor
    source: Tensor

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds ids."""
        return not self.left.is_floating_point()


@dataclass
class RecordedGradients:
    """Inputs and output gradients of every block for one batch, until the next batch.

    Attributes:
        n_rows: rows, or segments where the rows were packed.
        batch_rows: rows of the batch as the model saw it.
        uses: calls of modules, in forward order.
        outputs: what they returned, still in the graph; emptied after the backward.
        places: `[segment, token]` places in the flattened batch of packed rows' segments, -1 behind their ends.
        live: `[row, token]`, where a gradient can be: padding and what comes after the last label take no part.
            None where unknown; then a place is live where its gradient is not zero.
    """

    n_rows: int
    batch_rows: int
    uses: list[Use] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    places: Int[Tensor, "segment token"] | None = None
    live: Tensor | None = None

    def factors(self, block: Block) -> Iterator[tuple[Tensor, Tensor, nn.Module]]:
        """(inputs `[row, token, d_in]` or ids `[row, token]`, output gradients `[row, token, d_out]`, module)."""
        for use in self._uses_of(block):
            assert use.output_gradient is not None
            if block.kind == "expert":
                inputs, gradient = expert_sides(
                    use.module, use.arguments, self._flat(use.output_gradient), block, self._row_of_token(use)
                )
            else:
                inputs, gradient = self._by_row(use.arguments[0]), self._by_row(use.output_gradient)
                if isinstance(use.module, nn.Embedding):
                    gradient = _embedding_gradient(use.module, inputs, gradient)
            yield inputs, gradient, use.module

    def sides(self, block: Block) -> list[Sides]:
        """The two sides of each use of a weight, in the order of the parameter's axes."""
        found = []
        for inputs, gradient, module in self.factors(block):
            swapped = isinstance(module, Conv1D | nn.Embedding) or bool(getattr(module, "is_transposed", False))
            left, right = (inputs, gradient) if swapped else (gradient, inputs)
            found.append(Sides(left, right, inputs))
        return found

    def gradient(self, block: Block) -> Float[Tensor, "row ..."]:
        """Each row's gradient of the summed loss with respect to the block's parameter, fp32, `[row, *shape]`."""
        dtype = accumulation_dtype(block)
        total = torch.zeros((self.n_rows, *block.shape), dtype=dtype, device=block.parameter.device)
        if block.has_sides:
            for sides in self.sides(block):
                add_product(total, sides)
            return total
        for use in self._uses_of(block):
            assert use.output_gradient is not None
            if block.kind == "rerun":
                total += self._rerun(block, use, dtype)
            else:
                gradient = use.output_gradient.to(dtype)
                if block.kind == "scale":
                    gradient = gradient * _normalised(use, dtype)
                total += self._by_row(gradient).reshape(self.n_rows, -1, block.shape[0]).sum(dim=1)
        return total

    def release(self, modules: Collection[nn.Module]) -> set[int]:
        """Lets go of what these modules showed; gives the addresses of the inputs that are still held."""
        self.uses = [use for use in self.uses if not any(use.module is module for module in modules)]
        return {use.arguments[0].data_ptr() for use in self.uses if isinstance(use.arguments[0], Tensor)}

    def _uses_of(self, block: Block) -> Iterator[Use]:
        for use in self.uses:
            if use.output_gradient is not None and any(use.module is module for module in block.modules):
                yield use

    def _by_row(self, tensor: Tensor) -> Tensor:
        """Restores the row axis where a module saw tokens flattened; takes packed rows apart."""
        rows = self.batch_rows
        if tensor.shape[0] != rows:
            if tensor.shape[0] % rows:
                raise InputError(
                    f"Expected activations of {rows} rows; a module saw shape {tuple(tensor.shape)}, so its tokens "
                    "cannot be told apart by row. Freeze that module (requires_grad_(False)) and score the rest."
                )
            tensor = tensor.reshape(rows, -1, *tensor.shape[1:])
        if self.places is None:
            return tensor
        return _gather(tensor.flatten(0, 1), self.places)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    def _row_of_token(self, use: Use) -> tuple[Tensor, int]:
        assert use.output_gradient is not None
        device, n_tokens = use.output_gradient.device, len(self._flat(use.output_gradient))
        if self.places is None:
            return torch.arange(n_tokens, device=device) // (n_tokens // self.batch_rows), self.n_rows
        owner = torch.full((n_tokens,), -1, device=device)
        segment, slot = (self.places >= 0).nonzero(as_tuple=True)
        owner[self.places[segment, slot]] = segment
        return owner, self.n_rows

    def _rerun(self, block: Block, use: Use, dtype: torch.dtype) -> Tensor:
        if self.places is not None:
            raise InputError(
                f"Expected unpacked rows for {block.name}: its module mixes tokens of a packed row. Score rows "
                "apart (attribution.example.split_packed), or freeze it."
            )
        parts = []
        assert use.output_gradient is not None
        for row in range(self.batch_rows):
            arguments = _rows_of((use.arguments, use.keywords), row, self.batch_rows)
            output = _first_tensor(use.module(*arguments[0], **arguments[1]))
            wanted = use.output_gradient[row : row + 1].to(output.dtype)
            (gradient,) = torch.autograd.grad(output, [block.parameter], wanted, allow_unused=True)
            parts.append(torch.zeros_like(block.parameter) if gradient is None else gradient)
        return torch.stack(parts).to(dtype)


def add_product(total: Float[Tensor, "row ..."], sides: Sides) -> None:
    """Adds one use's sum over tokens of left_t right_t^T to `total` `[row, d0, d1]`."""
    right = sides.right.to(total.dtype)
    if sides.one_hot:
        rows, tokens, width = right.shape
        total.scatter_add_(1, sides.left.unsqueeze(-1).expand(rows, tokens, width), right)
        return
    left = sides.left.to(total.dtype)
    if left.shape[2] > _NARROW * right.shape[2]:  # many rows times few columns is several times slower
        total += torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
    else:
        total.baddbmm_(left.transpose(1, 2), right)


@contextmanager
def recording(
    model: nn.Module, blocks: Sequence[Block], n_rows: int, *, segments: Int[Tensor, "row token"] | None = None
) -> Iterator[RecordedGradients]:
    """Records what the blocks see during one forward and backward; leaves no hook behind.

    Args:
        model: where the blocks live.
        blocks: what to record.
        n_rows: rows of the batch.
        segments: of packed rows, which example each token that the model sees belongs to, counted through the whole
            batch from 0; -1 on padding (`attribution.example.segments_of`). What is read is then by segment, not row.
    """
    places = None if segments is None else segment_places(segments)
    recorded = RecordedGradients(n_rows if places is None else len(places), n_rows, places=places)

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        out = _first_tensor(output)
        if not out.requires_grad:
            return
        if torch._C._current_graph_task_id() != -1 and any(use.module is module for use in recorded.uses):
            return  # gradient checkpointing runs the forward again inside the backward
        use = Use(module, _detached(arguments), _detached(keywords))
        recorded.uses.append(use)

        def keep(gradient: Tensor) -> None:
            use.output_gradient = gradient.detach()

        out.register_hook(keep)
        recorded.outputs.append(out)

    hooked = {id(module): module for block in blocks for module in block.modules}
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in hooked.values()]
    try:
        yield recorded
    finally:
        recorded.outputs.clear()
        for handle in handles:
            handle.remove()


def segment_places(segments: Int[Tensor, "row token"]) -> Int[Tensor, "segment token"]:
    """Where each segment's tokens stand in the flattened batch, -1 behind its end."""
    flat = segments.flatten()
    found = [(flat == segment).nonzero().flatten() for segment in range(int(flat.max()) + 1)]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def _gather(flat: Tensor, places: Tensor) -> Tensor:
    gathered = flat[places.clamp(min=0)]
    gathered[places < 0] = 0
    return gathered


def _embedding_gradient(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> Tensor:
    scale = getattr(module, "embed_scale", None)  # Gemma multiplies what it looked up
    if scale is not None:
        gradient = gradient * torch.as_tensor(scale, dtype=gradient.dtype, device=gradient.device)
    if module.padding_idx is not None:  # PyTorch gives the padding row no gradient
        gradient = gradient * (ids != module.padding_idx).unsqueeze(-1)
    return gradient


def _normalised(use: Use, dtype: torch.dtype) -> Tensor:
    """What a norm multiplies by its scale: its output at scale one less its output at scale zero."""
    weight = use.module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        at_one, at_zero = (
            torch.func.functional_call(use.module, {"weight": scale}, use.arguments, use.keywords)
            for scale in (torch.ones_like(weight), torch.zeros_like(weight))
        )
    return _first_tensor(at_one).to(dtype) - _first_tensor(at_zero).to(dtype)


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    return next(part for part in parts if isinstance(part, Tensor))


def _detached(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.detach())


def _rows_of(value: Any, row: int, n_rows: int) -> Any:
    return _mapped(value, lambda tensor: tensor[row : row + 1] if tensor.dim() and len(tensor) == n_rows else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return value
