"""How active is one latent of a diff, and which rows made it so? The question, held against the run it is asked of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attribution import LatentQuery
from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.crosscoder.model import CrosscoderFit
from diffing.crosscoder.target import latent_target
from diffing.diff_result import DiffResult
from diffing.errors import ComparabilityError, InputError
from diffing.prompts import PromptSet
from diffing.site import Site, resolve_site
from diffing.tap import Tap
from tracker.run_queries import Question, probe_inputs_of
from tracker.saved_model import load_saved
from tracker.training_rows import readable_text

_MOST_PROMPTS = 64  # the query's gradient is taken of all of them in one pass
_AT_ONCE = 16


@dataclass(frozen=True)
class LatentTexts:
    """What a latent is to be read on.

    Attributes:
        input_ids: token ids of each text.
        texts: the same, to be read by a person; empty strings where that is not known.
        name: what to call them.
    """

    input_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    name: str


def read_latent_texts(
    run_dir: Path | str, prompts: Path | str | None, tokenizer: Any, *, max_length: int = 1024
) -> LatentTexts:
    """Texts of a file, or the run's own neutral probe prompts.

    Raises:
        PromptError: as for `PromptSet.from_file`.
        PathMissingError: no file was named and the run kept no probe prompts.
    """
    if prompts is None:
        inputs = probe_inputs_of(run_dir)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        ids = [row[:length].tolist() for row, length in zip(inputs["input_ids"], lengths, strict=True)]
        return LatentTexts(ids, [""] * len(ids), f"the run's {len(ids)} probe prompts")
    asked = PromptSet.from_file(prompts)
    ids = [one.tolist() for one in asked.tokenize(tokenizer, max_length=max_length).input_ids]
    return LatentTexts(ids, [readable_text(prompt) for prompt in asked], f"{len(ids)} prompts of {Path(prompts).name}")


def latent_question(
    checkpoints: Sequence[tuple[int, Path]],
    diff: Path | str,
    latent: int,
    texts: LatentTexts,
    *,
    base: Any = None,
    device: str = "cpu",
) -> Question:
    """One latent's mean activation in the tuned model: positive scores raised it.

    The base's part of what the latent reads is a constant, taken token by token from the base itself. Where the
    latent fires is decided once, at the diff's own checkpoint: so rows are also credited for what they did towards a
    latent that was still silent when they did it. Prompts on which it stays silent add nothing; of the others the
    64 on which it fires hardest are kept.

    Args:
        checkpoints: (step, folder) of the run's saved checkpoints.
        diff: folder of a `palimpsest diff` between what the run started from and one of those checkpoints.
        latent: its number in the diff's table.
        texts: what it is read on.
        base: what a full fine-tune started from, or an adapter's base where its own record is stale.
        device: where to compute.

    Returns:
        The question, asked of checkpoints up to the diff's own.

    Raises:
        PathMissingError: no diff there, or one without its crosscoder.
        InputError: no such latent, it is silent on all texts, or a full fine-tune without `base`.
        ComparabilityError: a diff of other checkpoints, or a crosscoder of another width or number of sides.
    """
    result, fit = DiffResult.load(diff), CrosscoderFit.load(Path(diff) / "crosscoder")
    if fit.n_models != 2:
        raise ComparabilityError(
            f"Expected a crosscoder of base and tuned in {diff}, got one of {fit.n_models} models. "
            "Name a folder that `palimpsest diff` wrote."
        )
    target = latent_target(fit, latent, site=result.site)
    step, tuned, before = _sides_of(result, Path(diff), checkpoints, base, device)
    _check_width(fit, tuned, result.site)
    kept, sides = _hardest(fit, latent, before, tuned, Site.parse(result.site), texts, device)
    label = str(result.latents["label"].get(latent, "unlabelled")).replace("_", " ")
    ids = [torch.tensor(list(texts.input_ids[place])) for place in kept]
    pad = torch.nn.utils.rnn.pad_sequence
    query = LatentQuery(
        inputs={
            "input_ids": pad(ids, batch_first=True).to(device),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True).to(device),
        },
        site=Site.parse(result.site),
        encoder=target.direction.to(device),
        bias=pad([sides[place].base for place in kept], batch_first=True).to(device),
        threshold=target.gate,
        firing=pad([sides[place].firing for place in kept], batch_first=True).to(device),
        name=f"mean activation of latent {latent} ({label}) at {result.site} in the tuned model, on {texts.name}",
    )
    return Question(query, tuple(texts.texts[place] for place in kept if texts.texts[place]), until=step)


@dataclass(frozen=True)
class _Read:
    """One text: what the latent reads of the base, its bias included, where it fires, and how hard altogether."""

    base: Float[Tensor, " token"]
    firing: Bool[Tensor, " token"]
    total: float


def _sides_of(
    result: DiffResult, diff: Path, checkpoints: Sequence[tuple[int, Path]], base: Any, device: str
) -> tuple[int, LoadedCheckpoint, LoadedCheckpoint]:
    """The checkpoint that the diff calls tuned, and what it calls base."""
    wanted = result.provenance.models
    for step, folder in reversed(checkpoints):
        tuned = load_saved(folder, base=base, device=device)
        if tuned.fingerprint != wanted.get("tuned"):
            continue
        before = _base_of(tuned, base, device)
        if before.fingerprint == wanted.get("base"):
            return step, tuned, before
        raise ComparabilityError(
            f"Expected a diff from what this run started from ({before.fingerprint[:12]}…), got one from "
            f"{result.base_name} ({str(wanted.get('base'))[:12]}…) in {diff}. Diff the run's own base with step {step}."
        )
    raise ComparabilityError(
        f"Expected a diff of one of this run's checkpoints (steps {', '.join(str(step) for step, _ in checkpoints)}), "
        f"got one of {result.base_name} and {result.tuned_name} in {diff}. "
        f"Run `palimpsest diff BASE {checkpoints[-1][1]} --out DIR` and name that."
    )


def _base_of(tuned: LoadedCheckpoint, base: Any, device: str) -> LoadedCheckpoint:
    if tuned.adapter_enabled is not None and tuned.base is not None:
        return tuned.base_side()
    if base is None:
        raise InputError(
            f"Expected the model that training started from, since a latent reads it as well and {tuned.name} does "
            "not hold it; got none. Name it with --base."
        )
    return load_checkpoint(base, device=device)


def _check_width(fit: CrosscoderFit, tuned: LoadedCheckpoint, site: str) -> None:
    width = resolve_site(tuned.model, site).d_model
    if width is not None and fit.widths[-1] != width:
        raise ComparabilityError(
            f"Expected a crosscoder of width {width}, this model's at {site}; got one of width {fit.widths[-1]}. "
            "Its folder holds another diff's fit: run `palimpsest diff` again."
        )


def _hardest(
    fit: CrosscoderFit,
    latent: int,
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    site: Site,
    texts: LatentTexts,
    device: str,
) -> tuple[list[int], list[_Read]]:
    """Places of the texts on which the latent fires, at most 64 in their order, and every text's readings."""
    found = list(_readings(fit, latent, base, tuned, site, texts.input_ids, device))
    firing = [place for place, one in enumerate(found) if one.total > 0]
    if not firing:
        n_tokens = sum(len(ids) for ids in texts.input_ids)
        raise InputError(
            f"Expected latent {latent} to fire on {texts.name}; it is silent on all {n_tokens} tokens. "
            "Give texts on which it fires with --prompts: the diff's page shows its top contexts."
        )
    strongest = sorted(firing, key=lambda place: -found[place].total)[:_MOST_PROMPTS]
    return sorted(strongest), found


def _readings(
    fit: CrosscoderFit,
    latent: int,
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    site: Site,
    input_ids: Sequence[Sequence[int]],
    device: str,
) -> Iterator[_Read]:
    for start in range(0, len(input_ids), _AT_ONCE):
        ids = [torch.tensor(list(one)) for one in input_ids[start : start + _AT_ONCE]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True).to(device)
        sides = []
        for side in (base, tuned):
            with side.active() as model, torch.no_grad(), Tap(model, [site], early_exit=True) as tap:
                sides.append(tap.read(input_ids=padded, attention_mask=mask)[0].float().cpu())
        for row, one in enumerate(ids):
            yield _reading(fit, latent, [side[row, : len(one)] for side in sides])


def _reading(fit: CrosscoderFit, latent: int, sides: list[Tensor]) -> _Read:
    constant = sides[0] @ fit.encoder[0, latent, : fit.widths[0]] + fit.encoder_bias[latent]
    found = constant + sides[1] @ fit.encoder[1, latent, : fit.widths[1]]
    # The first token is an attention sink and outliers are no data: the crosscoder was fitted on neither.
    counts = fit.usual((sides[0], sides[1]))
    counts[0] = False
    firing = (found > fit.gate[latent]) & counts
    return _Read(constant, firing, float(found[firing].sum()))
