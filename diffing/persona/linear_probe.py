"""Which texts are of one kind rather than the other, by a linear read-out of the model's activations?

A logistic regression on standardised activations, for contrasts that a difference of means does not separate (deceptive
against honest answers to the same questions); `probe_training` makes it. Kept as safetensors with JSON, never pickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float64
from torch import Tensor

from diffing.checkpoint import LoadedCheckpoint
from diffing.durable import write_atomic
from diffing.errors import PathMissingError, PersonaError, UnsafeFormatError
from diffing.persona.pooling import POOLINGS, pooled_rows, tokenize_for
from diffing.prompts import PromptSet
from diffing.provenance import Provenance
from diffing.site import Site, resolve_site

_METADATA_KEY = "palimpsest.linear_probe"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ProbeWorth:
    """What a probe reaches on held-out questions.

    Attributes:
        auroc: chance that a positive text scores above a negative one.
        low: lower end of its 95 % interval, as wide as for one text of each kind a question.
        high: upper end of it.
        recall: share of positive texts above the threshold; None where there are too few negative texts for it.
        recall_low: lower end of its 95 % interval (Wilson, over questions).
        recall_high: upper end of it.
        threshold: score above which at most `rate` of texts like the held-out negative ones lie (split conformal).
        rate: that false-positive rate.
        n_positive: held-out positive texts.
        n_negative: held-out negative texts; `1 / rate − 1` are needed for a threshold.
        n_questions: distinct held-out questions.
    """

    auroc: float
    low: float
    high: float
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    threshold: float | None
    rate: float
    n_positive: int
    n_negative: int
    n_questions: int

    def __str__(self) -> str:
        said = f"AUROC {self.auroc:.3f} [{self.low:.3f}, {self.high:.3f}]"
        if self.recall is None:
            needed = math.ceil(1 / self.rate - 1 - 1e-9)
            said += f"; recall at {self.rate:.0%} false positives needs {needed} held-out negative texts"
        else:
            said += f"; recall {self.recall:.1%} [{self.recall_low:.1%}, {self.recall_high:.1%}] at {self.rate:.0%}"
        return f"{said} ({self.n_positive}+{self.n_negative} held out, {self.n_questions} questions)"


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe:
    """A linear read-out at one site of one model. Scores are log-odds; positive: of the positive kind.

    Attributes:
        name: what it tells apart.
        site: where it reads (`resid:12`).
        pooling: tokens that a text is averaged over.
        weights: `[d_model]`, float64, of standardised activations.
        bias: log-odds of the mean fitted text.
        mean: `[d_model]`, float64, subtracted before.
        scale: `[d_model]`, float64, divided by before.
        penalty: scikit-learn's `C`, chosen by cross-validation over questions.
        worth: on held-out questions.
        n_layers: decoder blocks of the model.
        model_fingerprint: content hash of the checkpoint it was trained on.
        provenance: settings, digests and versions.
    """

    name: str
    site: str
    pooling: str
    weights: Float64[Tensor, " d_model"]
    bias: float
    mean: Float64[Tensor, " d_model"]
    scale: Float64[Tensor, " d_model"]
    penalty: float
    worth: ProbeWorth
    n_layers: int
    model_fingerprint: str
    provenance: Provenance

    def __repr__(self) -> str:
        return f"LinearProbe({self.name!r} at {self.site}, {self.pooling}, {self.worth})"

    def scores(self, activations: Float64[Tensor, "row d_model"]) -> Float64[np.ndarray, " row"]:
        """Log-odds of pooled activations."""
        return (((activations - self.mean) / self.scale) @ self.weights + self.bias).numpy()

    def score_texts(
        self,
        loaded: LoadedCheckpoint,
        prompts: PromptSet,
        *,
        derived_from: str | None = None,
        max_length: int = 1024,
        batch_tokens: int = 8192,
    ) -> Float64[np.ndarray, " row"]:
        """Log-odds of every text, in order.

        Raises:
            PersonaError: the model is another than the probe's, or a text cannot be pooled.
        """
        self.check_fits(loaded, derived_from=derived_from)
        values = pooled_features(loaded, prompts, self.site, self.pooling, max_length, batch_tokens)
        return self.scores(values)

    def check_fits(self, loaded: LoadedCheckpoint, *, derived_from: str | None = None) -> None:
        """Refuses a model on which the scores would mean nothing.

        Raises:
            PersonaError: it has another width or depth, or is neither the probe's model nor an adapter on it.
        """
        resolved = resolve_site(loaded.model, self.site)
        if resolved.n_layers != self.n_layers or (resolved.d_model or len(self.weights)) != len(self.weights):
            raise PersonaError(
                f"Probe {self.name!r}: expected a model of {self.n_layers} layers and width {len(self.weights)}, got "
                f"{resolved.n_layers} and {resolved.d_model}. Train the probe on this model."
            )
        base = None if loaded.base is None else loaded.base.fingerprint
        if self.model_fingerprint not in (loaded.fingerprint, base, derived_from):
            raise PersonaError(
                f"Probe {self.name!r}: expected the model it was trained on ({self.model_fingerprint[:12]}…) or an "
                f"adapter on it, got {loaded.name} ({loaded.fingerprint[:12]}…). Train it on this model, or name the "
                "base checkpoint (derived_from; on the command line --base)."
            )

    def save(self, path: Path | str) -> Path:
        """Writes one self-describing safetensors file."""
        plain = ("name", "site", "pooling", "bias", "penalty", "n_layers", "model_fingerprint")
        record = {
            "schema": SCHEMA_VERSION,
            "worth": asdict(self.worth),
            "provenance": self.provenance.to_json(),
            **{name: getattr(self, name) for name in plain},
        }
        tensors = {name: getattr(self, name).contiguous() for name in ("weights", "mean", "scale")}
        return write_atomic(path, safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(record, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path | str) -> LinearProbe:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: there is no such file.
            UnsafeFormatError: it is a pickle.
            PersonaError: it is no probe, or of a newer schema.
        """
        path = Path(path)
        if not path.is_file():
            raise PathMissingError(f"Expected a probe at {path}, got no such file. Check the path.")
        if path.suffix in {".pkl", ".pickle", ".joblib", ".pt", ".bin"}:
            raise UnsafeFormatError(
                f"{path}: expected safetensors, got a pickle ({path.suffix}), which is never loaded. "
                "Make the probe with `palimpsest persona probe train`."
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                record: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in ("weights", "mean", "scale")}
            if record.pop("schema") > SCHEMA_VERSION:
                raise PersonaError(f"{path}: expected probe schema {SCHEMA_VERSION} or older. Upgrade palimpsest.")
            worth = ProbeWorth(**record.pop("worth"))
            return cls(**record | {"worth": worth, "provenance": Provenance.from_json(record["provenance"])}, **tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, PersonaError):
                raise
            raise PersonaError(
                f"{path}: expected a linear probe, got something else ({error}). "
                "Make one with `palimpsest persona probe train`."
            ) from error


def pooled_features(
    loaded: LoadedCheckpoint, prompts: PromptSet, site: Site | str, pooling: str, max_length: int, batch_tokens: int
) -> Float64[Tensor, "row d_model"]:
    """Every text's pooled activation at a site, in the order of the texts."""
    if pooling not in POOLINGS:
        raise PersonaError(f"Expected pooling {', '.join(POOLINGS)}; got {pooling!r}. Use one of these.")
    tokens = tokenize_for(loaded, prompts, pooling=pooling, max_length=max_length)
    found: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(prompts)
    for batch in pooled_rows(loaded, tokens, [site], pooling=pooling, batch_tokens=batch_tokens):
        for number, row in zip(batch.index, batch.values[0], strict=True):
            found[number] = row
    return torch.stack(found)
