"""What changed from base to tuned?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from diffing.checkpoint import LoadedCheckpoint
from diffing.crosscoder.compare import compare
from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.contexts import latents_worth_showing
from diffing.crosscoder.fit import fit_crosscoder
from diffing.crosscoder.label import EXCLUSIVE
from diffing.crosscoder.model import CrosscoderFit
from diffing.crosscoder.null import calibrate_null
from diffing.crosscoder.stability import measure_stability
from diffing.diff_parts import DiffParts, capture_sides
from diffing.diff_plan import DiffPlan
from diffing.diff_result import LABELS, DiffResult
from diffing.errors import ComparabilityError
from diffing.evidence import join_evidence
from diffing.logit_diff import measure_divergence
from diffing.pair import PairedActivations
from diffing.prompts import PromptSet, TokenizedPrompts
from diffing.provenance import Provenance
from diffing.site import ResolvedSite, Site, resolve_site
from diffing.unembedding import FOLDING_CAVEAT

DESCRIPTION_CAVEAT = (
    "Descriptions of latents were written by a language model; by chance alone about one in forty passes its test."
)

__all__ = ["LABELS", "DiffPlan", "DiffResult", "compare", "diff_checkpoints"]


def diff_checkpoints(
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    prompts: PromptSet,
    *,
    out: Path | str,
    site: Site | str = "resid:50%",
    crosscoder: CrosscoderConfig | None = None,
    plan: DiffPlan | None = None,
    max_length: int = 1024,
    progress: bool = True,
) -> DiffResult:
    """Everything this package can tell about two checkpoints on some prompts, from prompts to result.

    Both sides read the same tokens (tuned's chat template). Killed at any moment, the same call goes on where it
    was. Cost: one early-exit forward and one full forward a side over the prompts, the crosscoder's fit, what `plan`
    adds, and seven passes over the stored activations. Disk: two stores of tokens · width.

    Args:
        base: before; may be the same model in memory as `tuned`, with the adapter off.
        tuned: after.
        prompts: what both read.
        out: folder for `diff.json`, `stores/` and the fits.
        site: where activations are read.
        crosscoder: settings of the fit; None chooses by the amount of data.
        plan: what else is measured; None for the usual.
        max_length: most tokens of a prompt.
        progress: shows bars on a terminal.

    Raises:
        ComparabilityError: the tokenizers, depths or widths of the sides differ, or `out` holds another diff.
        SiteError: no such site.
        PromptError: prompts that cannot be rendered, or no tokens.
        CaptureError: activations or logits that are not finite.
    """
    out, plan = Path(out), plan or DiffPlan()
    where = _check_sides(base, tuned, site)
    tokenized = prompts.tokenize(tuned.tokenizer, max_length=max_length)
    paired = capture_sides(
        base, tuned, tokenized, where.site, out / "stores", max_length, dtype=plan.store_dtype, progress=progress
    )
    device = str(next(tuned.model.parameters()).device)
    divergence = measure_divergence(base, tuned, tokenized, device=device, progress=progress)
    config = crosscoder or CrosscoderConfig.for_data(paired.n_tokens, paired.d_model[0])
    fit = fit_crosscoder(paired, config, out=out / "crosscoder", progress=progress)
    result = _labelled(fit, paired, plan, out, progress=progress)
    shown = latents_worth_showing(result.latents)
    parts = DiffParts(
        base, tuned, prompts, tokenized, where.site, paired, fit, result.latents, shown, plan, max_length, progress
    )
    contexts = parts.contexts()
    descriptions = parts.descriptions(contexts, out / "answers.sqlite")
    result = dataclasses.replace(
        result,
        mean_difference=parts.mean_difference(),
        divergence=divergence,
        baselines=parts.baselines(),
        difference_sae=parts.difference_sae(out / "difference"),
        weights=parts.weights(),
        mining=parts.mining(),
        lens=parts.lens(),
        splice=parts.splice(),
        answers=parts.answers(),
        steering=parts.steering(),
        stagewise=parts.stagewise(out / "stagewise"),
        contexts=contexts,
        neighbours=parts.neighbours(),
        map=parts.map(contexts),
        descriptions=descriptions,
        caveats=(
            *result.caveats,
            *tokenized.notes,
            *_caveats(base, tuned, tokenized, shows_tokens=bool(parts.unembeddings)),
            *([DESCRIPTION_CAVEAT] if descriptions else []),
        ),
        provenance=_provenance(base, tuned, prompts, where.site, config, plan, max_length),
        base_name=base.name,
        tuned_name=tuned.name,
        site=str(where.site),
    )
    evidence = join_evidence(
        result.latents,
        contexts,
        vocabulary=len(tuned.tokenizer),
        weights=result.weights,
        mining=result.mining,
        divergence=divergence,
        mean_difference=result.mean_difference,
    )
    result = dataclasses.replace(result, evidence=evidence)
    result.save(out)
    return result


def _labelled(
    fit: CrosscoderFit, paired: PairedActivations, plan: DiffPlan, out: Path, *, progress: bool
) -> DiffResult:
    """Labels, and q-values and stability as far as they are asked for."""
    result = compare(fit, paired)
    config = fit.config
    # With nothing called exclusive there is nothing that a null could judge.
    if plan.null_fits != 0 and result.latents["label"].isin(EXCLUSIVE).any():
        null = calibrate_null(paired, config, fit=fit, fits=plan.null_fits, out=out / "null", progress=progress)
        result = dataclasses.replace(compare(fit, paired, null=null), null=null)
    if plan.seeds > 1:
        others = []
        for seed in range(config.seed + 1, config.seed + plan.seeds):
            settings = dataclasses.replace(config, seed=seed)
            other = fit_crosscoder(paired, settings, out=out / f"seeds/{seed}", progress=progress)
            others.append((other, compare(other, paired).latents))
        stability = measure_stability(fit, result.latents, others, paired)
        result = dataclasses.replace(result, latents=result.latents.assign(stability=stability))
    return result


def _check_sides(base: LoadedCheckpoint, tuned: LoadedCheckpoint, site: Site | str) -> ResolvedSite:
    """The site in tuned, once it is known that base has the same one and reads the same tokens."""
    here, there = resolve_site(tuned.model, site), resolve_site(base.model, site)
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise ComparabilityError(
            f"Expected one tokenizer for both sides, got different vocabularies ({len(base.tokenizer)} tokens in "
            f"{base.name}, {len(tuned.tokenizer)} in {tuned.name}). Compare checkpoints of one model family."
        )
    for what, left, right in (("layers", there.n_layers, here.n_layers), ("width", there.d_model, here.d_model)):
        if left != right:
            raise ComparabilityError(
                f"Expected the same {what} on both sides, got {left} in {base.name} and {right} in {tuned.name}. "
                "Compare checkpoints of one architecture."
            )
    return here


def _caveats(
    base: LoadedCheckpoint, tuned: LoadedCheckpoint, tokenized: TokenizedPrompts, *, shows_tokens: bool
) -> list[str]:
    caveats = [FOLDING_CAVEAT] if shows_tokens else []
    if base.fingerprint == tuned.fingerprint:
        caveats.append("Both sides have the same weights: every difference shown is noise of the method.")
    if len(tokenized) < 30:
        caveats.append(f"Only {len(tokenized)} prompts: means and intervals say little about other prompts.")
    return caveats


def _provenance(
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    prompts: PromptSet,
    site: Site,
    config: CrosscoderConfig,
    plan: DiffPlan,
    max_length: int,
) -> Provenance:
    return Provenance(
        models={"base": base.fingerprint, "tuned": tuned.fingerprint},
        prompts=prompts.digest,
        sites=(str(site),),
        seed=config.seed,
        config={"crosscoder": config.to_json(), "plan": plan.to_json(), "max_length": max_length},
    )
