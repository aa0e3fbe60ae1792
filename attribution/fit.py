"""How is a curvature estimated from training rows?

Two streams over the rows: covariances of each block's two sides, whose eigenvectors are the basis, then the mean
squared gradient in it. Each stream is a sum over rows, so it can stop, go on, and be split over machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from attribution.blocks import Block
from attribution.curvature import DAMPING, BlockFactors, Curvature, EkfacCurvature, Identity, damping_of
from attribution.dense_curvature import DenseBlock, DenseCurvature, fit_dense
from attribution.estimate import CovarianceSums, MomentSums, all_bases
from attribution.example import Row, check_rows, context_length
from attribution.gradients import find_blocks, record_rows
from attribution.losses import Labels, curvature_loss, evaluating
from attribution.passes import row_batches
from attribution.recording import RecordedGradients
from attribution.rotation import Basis
from attribution.sums import sum_covariances, sum_moments
from diffing.errors import InputError

_WAITING_BYTES = 64 << 20  # rows' gradients that may wait for the basis, which spares a second pass over the rows

CurvatureKind = Literal["identity", "diagonal", "kfac", "ekfac", "exact", "datainf"]


def fit_curvature(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    kind: str = "ekfac",
    blocks: Sequence[Block] | None = None,
    labels: Labels = "sampled",
    damping: float = DAMPING,
    batch_size: int | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
) -> Curvature:
    """Estimates how the training loss curves around the model.

    Args:
        model: the model at the checkpoint to explain; left as found.
        rows: training rows; their labels say where loss is taken.
        kind: `ekfac` (two passes over the rows), `kfac` (one, a second one over norms and embeddings), `diagonal`
            (one), `identity` (none); for adapters `exact`, the full Fisher of every block that is small enough, and
            `datainf`, its closed form; both use EK-FAC for blocks that are not.
        blocks: from `find_blocks`; None finds them.
        labels: `sampled` draws next tokens from the model (true Fisher); `data` uses the rows' own (empirical).
        damping: multiple of each block's mean eigenvalue that is added before dividing. Flat between 0.03 and 1 on
            small models.
        batch_size: rows per pass, None: as many as fit a memory budget. Changes memory and speed only.
        seed: of the sampled labels; each row draws from a generator of its own, so batching changes nothing.
        folder: where sums are kept while they grow; killed and called again, the fit goes on from there.

    Raises:
        InputError: rows that cannot be used, nothing trainable, or an unknown kind.
        ComparabilityError: `folder` holds sums of another model, other rows or settings.
        StoreFullError: too little room in `folder`, said before anything starts.
    """
    if kind not in _FITS:
        raise InputError(f"Expected a curvature among {', '.join(_FITS)}; got {kind!r}. Choose one.")
    check_rows(rows, what="training row", context_length=context_length(model))
    blocks = list(blocks) if blocks is not None else find_blocks(model)[0]
    fit = _Fit(model, rows, blocks, labels, damping, batch_size, seed, None if folder is None else Path(folder))
    return _FITS[kind](fit)


def fit_ekfac(
    model: nn.Module,
    blocks: Sequence[Block],
    rows: Sequence[Row],
    *,
    labels: Labels = "sampled",
    damping: float = DAMPING,
    batch_size: int | None = None,
    seed: int = 0,
) -> EkfacCurvature:
    """`fit_curvature` with kind `ekfac` on given blocks."""
    fitted = fit_curvature(
        model, rows, kind="ekfac", blocks=blocks, labels=labels, damping=damping, batch_size=batch_size, seed=seed
    )
    assert isinstance(fitted, EkfacCurvature)
    return fitted


@dataclass(frozen=True)
class _Fit:
    """One request to fit, with every setting resolved."""

    model: nn.Module
    rows: Sequence[Row]
    blocks: list[Block]
    labels: Labels
    damping: float
    batch_size: int | None
    seed: int
    folder: Path | None

    def stream(self) -> Iterator[RecordedGradients]:
        """One forward and backward a batch, on the labels that the curvature is to be estimated from."""
        loss = curvature_loss(self.labels, self.seed)
        with evaluating(self.model):
            for batch in row_batches(self.model, self.blocks, self.rows, self.batch_size):
                yield record_rows(self.model, self.blocks, batch, loss)

    def covariances(self) -> CovarianceSums:
        return sum_covariances(
            self.model, self.rows, blocks=self.blocks, labels=self.labels, batch_size=self.batch_size,
            seed=self.seed, state=None if self.folder is None else self.folder / "covariances.safetensors",
        )  # fmt: skip

    def moments(self, bases: Sequence[Basis]) -> MomentSums:
        return sum_moments(
            self.model, self.rows, bases, blocks=self.blocks, labels=self.labels, batch_size=self.batch_size,
            seed=self.seed, state=None if self.folder is None else self.folder / "moments.safetensors",
        )  # fmt: skip

    def keeps_rows(self) -> bool:
        """Whether rows' whole gradients fit beside the model: those of an adapter, of not too many rows."""
        trained = sum(block.numel for block in self.blocks)
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        return self.folder is None and trained < whole // 3 and 4 * trained * len(self.rows) <= _WAITING_BYTES

    def described(self, name: str) -> str:
        rule = f"damping {self.damping} x mean eigenvalue by block"
        return f"{name} ({self.labels} labels, {rule}, {len(self.rows)} rows)"

    def finished(self, name: str, bases: Sequence[Basis], eigenvalues: Sequence[Tensor]) -> EkfacCurvature:
        return assemble(self.blocks, bases, eigenvalues, damping=self.damping, description=self.described(name))


def assemble(
    blocks: Sequence[Block], bases: Sequence[Basis], eigenvalues: Sequence[Tensor], *, damping: float, description: str
) -> EkfacCurvature:
    """A curvature from bases and the eigenvalues in them (mean squared row gradients, for EK-FAC)."""
    factors = tuple(
        BlockFactors(basis.left, basis.right, values, damping_of(values, damping))
        for basis, values in zip(bases, eigenvalues, strict=True)
    )
    return EkfacCurvature(factors, description, tuple(block.name for block in blocks))


def _fit_diagonal(fit: _Fit) -> EkfacCurvature:
    bases = all_bases(fit.blocks)
    return fit.finished("diagonal", bases, fit.moments(bases).means())


def _fit_ekfac(fit: _Fit) -> EkfacCurvature:
    if fit.keeps_rows():
        return _fit_ekfac_once(fit)
    bases = fit.covariances().bases()
    return fit.finished("EK-FAC", bases, fit.moments(bases).means())


def _fit_ekfac_once(fit: _Fit) -> EkfacCurvature:
    """One pass: rows' gradients wait, whole, for the basis that they will be squared in."""
    covariances = CovarianceSums(fit.blocks)
    waiting: list[list[Tensor]] = [[] for _ in fit.blocks]
    for recorded in fit.stream():
        covariances.update(recorded)
        for held, block in zip(waiting, fit.blocks, strict=True):
            held.append(recorded.gradient(block))
    bases = covariances.bases()
    means = [
        sum(basis.rotate(part).square_().sum(dim=0) for part in held) / len(fit.rows)
        for basis, held in zip(bases, waiting, strict=True)
    ]
    return fit.finished("EK-FAC", bases, [torch.as_tensor(mean) for mean in means])


def _fit_kfac(fit: _Fit) -> EkfacCurvature:
    covariances = fit.covariances()
    bases, products = covariances.bases(), covariances.products()
    others = [block for block, product in zip(fit.blocks, products, strict=True) if product is None]
    # Norms, biases and embeddings have no second side to multiply with: their diagonal is measured.
    plain = [basis for basis, product in zip(bases, products, strict=True) if product is None]
    measured = iter(replace(fit, blocks=others, folder=None).moments(plain).means() if others else [])
    return fit.finished("K-FAC", bases, [next(measured) if product is None else product for product in products])


def _fit_exact(fit: _Fit) -> DenseCurvature:
    dense = fit_dense(fit.stream, fit.blocks, len(fit.rows), kind="exact", damping=fit.damping)
    return DenseCurvature(dense, _fallback(fit, dense), fit.described("exact by block"))


def _fit_datainf(fit: _Fit) -> DenseCurvature:
    dense = fit_dense(fit.stream, fit.blocks, len(fit.rows), kind="datainf", damping=fit.damping)
    return DenseCurvature(dense, _fallback(fit, dense), fit.described("DataInf by block"))


def _fallback(fit: _Fit, dense: Sequence[DenseBlock | None]) -> EkfacCurvature | None:
    return _fit_ekfac(fit) if any(block is None for block in dense) else None


_FITS: dict[str, Callable[[_Fit], Curvature]] = {
    "identity": lambda fit: Identity(),
    "diagonal": _fit_diagonal,
    "kfac": _fit_kfac,
    "ekfac": _fit_ekfac,
    "exact": _fit_exact,
    "datainf": _fit_datainf,
}
