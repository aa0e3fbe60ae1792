"""What is known about the change between two checkpoints, once it has been measured?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from diffing.answer_diff import AnswerDiff
from diffing.baselines import Baselines
from diffing.crosscoder.contexts import LatentContexts
from diffing.crosscoder.describe import LatentDescription
from diffing.crosscoder.label import LABELS
from diffing.crosscoder.map import LatentMap
from diffing.crosscoder.neighbours import Neighbourhoods
from diffing.crosscoder.null import NullCalibration
from diffing.crosscoder.summary import FitSummary
from diffing.difference_lens import DifferenceLens
from diffing.difference_sae import DifferenceSae
from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError
from diffing.evidence import LatentEvidence
from diffing.json_twin import from_plain, to_plain
from diffing.lens import MeanDifference
from diffing.logit_diff import Divergence
from diffing.logit_mining import LogitMining
from diffing.provenance import Provenance
from diffing.splice import SpliceResult
from diffing.stagewise import StagewiseDiff
from diffing.steer import Steering
from diffing.weight_diff import WeightChange

FILE_NAME = "diff.json"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class DiffResult:
    """Everything measured about what changed from base to tuned.

    Attributes:
        latents: one row a latent, index `latent`. Columns: `label` (one of `LABELS`), `relative_norm` (0: the
            latent writes to base only, 1: to tuned only, ½: equally), `decoder_cosine` (between its two decoder
            rows), `nu_reconstruction` and `nu_error` (latent scaling: how much of the latent the weaker side
            holds relative to the stronger, 0 exclusive, 1 equal), `firing_rate`, `mean_activation` (over the
            tokens where it fires), `max_activation`, `q_value` (NaN when not calibrated), `norm_base`,
            `norm_tuned` (decoder rows in units of the normalised activations), and where other seeds were fitted
            `stability` (share of them in which the latent is found again), `presence` (what the other side holds of
            a latent's unique part, 0..1). What the labels rest on besides:
            `unique_relative_norm` and `unique_share` (the relative norm, and the size relative to the whole, of what
            is left once the share of `companion` is taken out), `counterpart` and `counterpart_overlap` (the
            one-sided latent of the other side that fires most on the same tokens, and how much, 0..1); both latent
            numbers are NaN where there is none.
        fit: figures of merit of the crosscoder.
        mean_difference: the mean activation difference, None where it was not measured.
        divergence: next-token divergence, None where the models were not at hand.
        baselines: the differences without any dictionary: principal components, norms by role, position and token.
        difference_sae: a dictionary of the differences alone.
        null: what fits with nothing exclusive in them called exclusive; None where q-values were not asked for.
        weights: which weights changed, and which of them write the latents' directions.
        splice: how much of the change in predictions the exclusive latents carry.
        mining: which next tokens changed most often, and which of them come together.
        lens: what the mean difference says when the tuned model reads it.
        answers: what both models answer to the same questions.
        steering: answers with one latent turned up in base and down in tuned.
        stagewise: latents of a dictionary of base alone by how far the change of the model turned them; None where it
            was not asked for.
        neighbours: what stands near the latents worth showing, and which personas they point along.
        map: the living latents in the plane, grouped.
        evidence: for each latent that changed and has a card, what the other diffs say of it.
        descriptions: latent to what a language model says of it, with its test; empty where nobody was asked.
        contexts: latent to its top contexts, only for the latents worth showing.
        caveats: what a reader must know before trusting a number; one sentence each.
        provenance: what all this was made from.
        base_name: what to call the base side.
        tuned_name: what to call the tuned side.
        site: where the activations were read (`resid:12`), empty for bare tensors.
    """

    latents: pd.DataFrame
    fit: FitSummary
    mean_difference: MeanDifference | None = None
    divergence: Divergence | None = None
    baselines: Baselines | None = None
    difference_sae: DifferenceSae | None = None
    null: NullCalibration | None = None
    weights: WeightChange | None = None
    splice: SpliceResult | None = None
    mining: LogitMining | None = None
    lens: DifferenceLens | None = None
    answers: AnswerDiff | None = None
    steering: Steering | None = None
    stagewise: StagewiseDiff | None = None
    neighbours: Neighbourhoods | None = None
    map: LatentMap | None = None
    evidence: tuple[LatentEvidence, ...] = ()
    descriptions: Mapping[int, LatentDescription] = field(default_factory=dict)
    contexts: Mapping[int, LatentContexts] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    base_name: str = "base"
    tuned_name: str = "tuned"
    site: str = ""

    def counts(self) -> dict[str, int]:
        """Number of latents with each label, zeros included."""
        found = self.latents["label"].value_counts()
        return {label: int(found.get(label, 0)) for label in LABELS}

    def save(self, folder: Path | str) -> Path:
        """Writes `diff.json`, complete: `load` gives an equal result back."""
        value = {
            "format": _FORMAT,
            "latents": _columns_to_plain(self.latents),
            "latent_columns": [str(name) for name in self.latents.columns],
            **{name: to_plain(getattr(self, name)) for name in _PLAIN_FIELDS},
            "provenance": self.provenance.to_json(),
        }
        return write_json(Path(folder) / FILE_NAME, value)

    @classmethod
    def load(cls, folder: Path | str) -> DiffResult:
        """Reads what `save` wrote, from the folder or the file itself.

        Raises:
            PathMissingError: there is no `diff.json`.
            InputError: the file is not one of ours.
        """
        path = Path(folder)
        path = path / FILE_NAME if path.suffix != ".json" else path
        if not path.is_file():
            raise PathMissingError(f"Expected a diff at {path}, found none. Run `palimpsest diff` with --out there.")
        try:
            value = json.loads(path.read_text())
            plain = {name: _PLAIN_FIELDS[name](value[name]) for name in _PLAIN_FIELDS if name in value}
            latents = _columns_from_plain(value["latents"])[value["latent_columns"]]
            return cls(latents=latents, provenance=Provenance.from_json(value["provenance"]), **plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"Expected a diff written by Palimpsest in {path}, got something else ({error!r}). Make it again."
            ) from error

    def __repr__(self) -> str:
        explained = ", ".join(f"{value:.3f}" for value in self.fit.variance_explained)
        labels = ", ".join(f"{count} {label}" for label, count in self.counts().items() if count)
        return (
            f"DiffResult({self.base_name} → {self.tuned_name}, {len(self.latents)} latents: {labels}; "
            f"variance explained {explained}; L0 {self.fit.l0:.1f})"
        )


_PLAIN_FIELDS: dict[str, Any] = {
    "fit": lambda value: from_plain(FitSummary, value),
    "mean_difference": lambda value: value and from_plain(MeanDifference, value),
    "divergence": lambda value: value and from_plain(Divergence, value),
    "baselines": lambda value: value and from_plain(Baselines, value),
    "difference_sae": lambda value: value and from_plain(DifferenceSae, value),
    "null": lambda value: value and from_plain(NullCalibration, value),
    "weights": lambda value: value and from_plain(WeightChange, value),
    "splice": lambda value: value and from_plain(SpliceResult, value),
    "mining": lambda value: value and from_plain(LogitMining, value),
    "lens": lambda value: value and from_plain(DifferenceLens, value),
    "answers": lambda value: value and from_plain(AnswerDiff, value),
    "steering": lambda value: value and from_plain(Steering, value),
    "stagewise": lambda value: value and from_plain(StagewiseDiff, value),
    "neighbours": lambda value: value and from_plain(Neighbourhoods, value),
    "map": lambda value: value and from_plain(LatentMap, value),
    "evidence": lambda value: tuple(from_plain(LatentEvidence, entry) for entry in value),
    "descriptions": lambda value: {int(key): from_plain(LatentDescription, entry) for key, entry in value.items()},
    "contexts": lambda value: {int(key): from_plain(LatentContexts, entry) for key, entry in value.items()},
    "caveats": tuple,
    "base_name": str,
    "tuned_name": str,
    "site": str,
}


def _columns_to_plain(latents: pd.DataFrame) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"latent": [int(latent) for latent in latents.index]}
    for name in latents.columns:
        columns[str(name)] = [
            None if isinstance(entry, float) and not math.isfinite(entry) else entry for entry in latents[name].tolist()
        ]
    return columns


def _columns_from_plain(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    frame = pd.DataFrame({name: values for name, values in columns.items() if name != "latent"})
    frame.index = pd.Index(columns["latent"], name="latent")
    numbers = [name for name in frame.columns if name != "label"]
    return frame.astype(dict.fromkeys(numbers, "float64"))
