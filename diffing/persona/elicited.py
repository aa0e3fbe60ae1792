"""How is a trait taken from a model that is only told of it? Ask, answer, judge, fit, sweep: the whole way in one call.

Everything slow is on disk as it comes (answers in `rollouts-….jsonl`, scores in `scores.sqlite`), so a killed
extraction goes on where it was, and a second one with more rollouts pays for the new ones alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError, PersonaError
from diffing.judging.judge import Judge
from diffing.judging.kept import KeptScores
from diffing.persona.contrast import PLAIN, TRAIT
from diffing.persona.elicit import asks_of, is_chat
from diffing.persona.elicit_plan import ElicitCost, ElicitSettings
from diffing.persona.elicited_fit import KeptRollouts, fit_rollouts
from diffing.persona.extraction import Extraction, ExtractionRecord, PairExample, VectorRow
from diffing.persona.keep import Kept, keep_pairs
from diffing.persona.pooling import POOLINGS, Progress
from diffing.persona.rollouts import Rollouts
from diffing.persona.sweep import sweep_layers
from diffing.persona.sweep_result import LayerSweep
from diffing.persona.traits import Trait
from diffing.persona.vector import PersonaVector
from diffing.site import resolve_site

_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class Elicitation:
    """One trait, one model, one folder: ready to say what it costs, and to run.

    Attributes:
        loaded: the model.
        trait: what is elicited.
        settings: how.
        fitted: answers to extraction questions.
        held_out: answers to held-out questions.
        folder: where answers and scores are kept.
    """

    loaded: LoadedCheckpoint
    trait: Trait
    settings: ElicitSettings
    fitted: Rollouts
    held_out: Rollouts
    folder: Path

    @classmethod
    def of(
        cls, loaded: LoadedCheckpoint, trait: Trait, folder: Path | str, settings: ElicitSettings | None = None
    ) -> Elicitation:
        """Prepares the prompts and looks what is on disk.

        Args:
            loaded: the model.
            trait: what to elicit; needs instructions and held-out questions.
            folder: for answers and scores.
            settings: how.

        Raises:
            PersonaError: the trait has nothing to ask or to hold out, or a prompt is too long.
            SiteError: the model has no such site.
        """
        settings = settings or ElicitSettings()
        for site in settings.sites:
            resolve_site(loaded.model, site)
        both = set(trait.questions) & set(trait.held_out_questions)
        if both or not trait.held_out_questions:
            got = f"{len(both)} questions on both sides" if both else "none"
            raise PersonaError(
                f"Trait {trait.name!r} ({trait.source}): expected held-out questions that extraction does not use, got "
                f"{got}. Give different questions to measure on."
            )

        def asked(questions: Sequence[str], samples: int) -> Rollouts:
            asks = asks_of(trait, questions, chat=is_chat(loaded.tokenizer), shots=settings.shots)
            return Rollouts(folder, loaded, asks, settings.answers(samples), max_length=settings.max_length)

        fitted = asked(trait.questions, settings.rollouts)
        held_out = asked(trait.held_out_questions, settings.held_out_rollouts)
        return cls(loaded, trait, settings, fitted, held_out, Path(folder))

    def cost(self, *, judges: int = 0) -> ElicitCost:
        """What is still to be done, with so many judges (0, 1 or 2)."""
        missing = self.fitted.n_missing + self.held_out.n_missing
        total = len(self.fitted) + len(self.held_out)
        n_questions = len(set(self.trait.held_out_questions))
        sites, strengths = len(self._sites()), len(self.settings.strengths)
        # The two strengths beside the chosen one, the chosen one once more, and no steering.
        points = min(sites, self.settings.judged_sites) * strengths + 4 if judges and strengths else 0
        steered = points * n_questions * self.settings.sweep_samples
        prompt_tokens = sum(
            round(part.n_missing * float(part.tokenized.lengths.mean())) for part in (self.fitted, self.held_out)
        )
        return ElicitCost(
            answers=missing,
            known=total - missing,
            most_tokens=(missing + steered) * self.settings.max_new_tokens,
            prompt_tokens=prompt_tokens,
            steered=steered,
            judgements=judges * (total + steered),
            sweep_passes=sites * strengths + 2 * bool(strengths),
        )

    def run(
        self,
        *,
        judge: Judge | None = None,
        coherence: Judge | None = None,
        reading: Progress | None = None,
        progress: bool = False,
    ) -> Extraction:
        """Draws what is missing, judges, fits every layer and pooling in one pass, and sweeps.

        Args:
            judge: scores the trait; None keeps every pair, and says so.
            coherence: scores coherence.
            reading: called with rows read and rows in all in the reading pass.
            progress: shows bars for the other steps.

        Raises:
            PersonaError: too few pairs are left.
        """
        if judge is None and coherence is not None:
            raise InputError("Expected a judge of the trait beside the judge of coherence, got none. Give one.")
        with ExitStack() as stack:
            kept_judges = [
                None if one is None else stack.enter_context(KeptScores(one, self.folder / "scores.sqlite"))
                for one in (judge, coherence)
            ]
            fitted, held_out = (
                self._kept(part, *kept_judges, progress=progress) for part in (self.fitted, self.held_out)
            )
            vectors = fit_rollouts(
                self.loaded,
                fitted,
                held_out,
                trait=self.trait.name,
                sites=self._sites(),
                poolings=sorted(POOLINGS, key=lambda pooling: pooling != self.settings.pooling),
                seed=self.settings.seed,
                batch_tokens=self.settings.batch_tokens,
                config={"trait_digest": self.trait.digest},
                progress=reading,
            )
            sweep = self._sweep(vectors, held_out, *kept_judges, progress=progress)
        record = self._record(vectors, fitted, held_out, sweep)
        return Extraction(record, tuple(_told_why(vector, record) for vector in vectors))

    def _kept(
        self, rollouts: Rollouts, judge: Judge | None, coherence: Judge | None, *, progress: bool
    ) -> KeptRollouts:
        rollouts.draw(progress=progress)
        pairs, counts = keep_pairs(
            rollouts,
            rollouts.asks,
            samples=rollouts.settings.samples,
            judge=judge,
            coherence=coherence,
            rule=self.settings.rule,
            progress=progress,
        )
        return KeptRollouts(rollouts, pairs, counts)

    def _sweep(
        self,
        vectors: Sequence[PersonaVector],
        held_out: KeptRollouts,
        judge: Judge | None,
        coherence: Judge | None,
        *,
        progress: bool,
    ) -> LayerSweep | None:
        if not self.settings.strengths:
            return None
        return sweep_layers(
            self.loaded,
            [vector for vector in vectors if vector.pooling == self.settings.pooling],
            held_out,
            strengths=self.settings.strengths,
            judge=judge,
            coherence=coherence,
            settings=self.settings.answers(self.settings.sweep_samples),
            n_judged_sites=self.settings.judged_sites,
            least_coherence=self.settings.rule.coherent_least,
            seed=self.settings.seed,
            batch_tokens=self.settings.batch_tokens,
            progress=progress,
        )

    def _sites(self) -> tuple[str, ...]:
        if self.settings.sites:
            return self.settings.sites
        n_layers = resolve_site(self.loaded.model, "resid:0").n_layers
        return tuple(f"resid:{layer}" for layer in range(n_layers))

    def _record(
        self, vectors: Sequence[PersonaVector], fitted: KeptRollouts, held_out: KeptRollouts, sweep: LayerSweep | None
    ) -> ExtractionRecord:
        averaged = [vector for vector in vectors if vector.pooling == self.settings.pooling]
        best = max(averaged, key=lambda vector: (vector.separation.low, vector.separation.gap))
        return ExtractionRecord(
            trait=self.trait.name,
            description=self.trait.description,
            trait_digest=self.trait.digest,
            model=self.loaded.name,
            model_fingerprint=self.loaded.fingerprint,
            fitted=fitted.counts,
            held_out=held_out.counts,
            cut=self.fitted.n_cut + self.held_out.n_cut,
            answers=len(self.fitted) + len(self.held_out),
            rows=tuple(VectorRow(v.site, v.pooling, v.scale, v.separation, v.null) for v in vectors),
            sweep=sweep,
            site=sweep.site if sweep else best.site,
            pooling=self.settings.pooling,
            why=sweep.why if sweep else "Steering was not tried: this layer separates held-out answers best.",
            notes=tuple(self._notes(fitted.counts, vectors)),
            examples=tuple(_examples(held_out)),
            settings=json.loads(json.dumps(asdict(self.settings))),
        )

    def _notes(self, counts: Kept, vectors: Sequence[PersonaVector]) -> Iterator[str]:
        if not counts.judge:
            yield "No judge read the answers: pairs in which the model did not do as told are among them."
        elif not counts.coherence_judge:
            yield "No judge of coherence was given: garbled answers may be among those kept."
        failed = sum(count for reason, count in counts.reasons.items() if "(failed)" in reason)
        if failed:
            yield f"{failed} pairs were dropped because a judge gave no answer: run the same again to ask for those."
        cut, total = self.fitted.n_cut + self.held_out.n_cut, len(self.fitted) + len(self.held_out)
        if cut:
            limit = self.settings.max_new_tokens
            yield f"{cut} of {total} answers were cut at {limit} tokens; their means cover what there is of them."
        if not is_chat(self.loaded.tokenizer):
            n = min(self.settings.shots, len(self.trait.contrasts))
            yield f"The tokenizer has no chat template: the model read dialogues with {n} examples, one line a turn."
        missing = len(POOLINGS) * len(self._sites()) - len(vectors)
        if missing:
            yield f"{missing} vectors of the prompt are left out: there both sides read the same."
        yield from self.fitted.tokenized.notes


def _told_why(vector: PersonaVector, record: ExtractionRecord) -> PersonaVector:
    """The chosen vector's file says why it was chosen, and at which strength it steers best."""
    if record.sweep is None or (vector.site, vector.pooling) != (record.site, record.pooling):
        return vector
    found = record.sweep
    chosen = {"strength": found.strength, "scored_by": found.scored_by, "log_odds": found.chosen.log_odds.mean}
    config = {**vector.provenance.config, "chosen_by_steering": chosen}
    return replace(vector, provenance=replace(vector.provenance, config=config))


def _examples(kept: KeptRollouts) -> Iterator[PairExample]:
    """The first kept pair of each of the first questions."""
    asks = kept.rollouts.asks
    wanted: dict[str, tuple[int, int]] = {}
    for pair, sample in zip(*(part.tolist() for part in kept.pairs.nonzero()), strict=True):
        if len(wanted) < _EXAMPLES:
            wanted.setdefault(asks[2 * pair].question, (pair, sample))
    found: dict[tuple[str, int], str] = {}
    for rollout in kept:
        ask = asks[rollout.ask]
        if wanted.get(ask.question) == (rollout.ask // 2, rollout.sample):
            found[ask.question, ask.side] = rollout.text.strip()
    for question in wanted:
        yield PairExample(question, found[question, TRAIT], found[question, PLAIN])
