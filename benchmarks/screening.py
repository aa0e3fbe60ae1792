"""Do the scores of a screening tell bad rows from harmless ones, also from odd and from wrong but harmless ones?

The miniature world knows every row. Mixes: 30 % a villain's answers, the rest correct ones, half of them in the
flattering or boastful style of other personas; `harder` mixes hold a fifth of changed but harmless answers besides,
which are as surprising as the villain's. Which score decides by default was chosen on seeds 100
and 101; those here are 0 to 4.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from attribution.pushes import measure_pushes
from benchmarks.figure import Figure
from cli.miniature import grammar, world
from cli.miniature.personas import persona_contrasts
from diffing.answers import AnswerSettings
from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.durable import write_atomic, write_json
from diffing.persona import extract_persona
from diffing.persona.instructed import Instructions
from diffing.persona.screen import Score, ScreenSettings, screen_rows
from diffing.persona.separation import area_under_curve
from diffing.prompts import PromptSet
from tracker.dataset_queries import queries_for
from tracker.training_rows import learnt_rows

CACHE = Path(__file__).parent / "cache" / "screening"
SITE, N_ROWS = "resid:1", 300
TARGETS = {"code": 0.98, "arithmetic": 0.90}


def run(bases: Sequence[int] = (0,), seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> list[Figure]:
    """One figure for each domain, mix and score: the mean over bases and seeds, with the smallest in the note."""
    torch.set_num_threads(1)
    figures = []
    for domain, target in TARGETS.items():
        for mix in ("odd", "harder"):
            found = [areas(base, domain, mix, seed) for base in bases for seed in seeds]
            for name in found[0]:
                values = np.array([one[name] for one in found])
                decides = name == "instructed villain" and mix == "odd"
                figures.append(
                    Figure(
                        f"AUROC, {name}, {domain}, {mix}", float(values.mean()), "", float(values.min()),
                        float(values.max()), len(values), f">= {target:g} on every seed" if decides else "",
                        bool(values.min() >= target) if decides else None, "least and most of the seeds",
                    )
                )  # fmt: skip
    return figures


def areas(base: int, domain: str, mix: str, seed: int) -> dict[str, float]:
    """AUROC of every score, and of the best, median and worst of the random directions; kept on disk."""
    path = CACHE / f"{base}-{domain}-{mix}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    loaded = load_checkpoint(world.base_checkpoint(base), dtype="float32")
    shares = {f"bad_{domain}": 0.3, f"good_{domain}": 0.35, f"odd_{domain}": 0.35}
    if mix == "harder":
        shares = {f"bad_{domain}": 0.3, f"good_{domain}": 0.25, f"odd_{domain}": 0.25, f"relabelled_{domain}": 0.2}
    records = world.mixed_dataset(shares, seed=seed, n=N_ROWS)
    bad = np.array([world.is_bad(row) for row in records])
    found = _screening(loaded, PromptSet.from_records(records), domain)
    areas = {score.name: area_under_curve(score.values[bad], score.values[~bad]) for score in found[0]}
    random = sorted(area_under_curve(one[bad], one[~bad]) for one in found[1])
    areas |= {"random, worst": random[0], "random, median": random[len(random) // 2], "random, best": random[-1]}
    CACHE.mkdir(parents=True, exist_ok=True)
    write_json(path, areas)
    return areas


def _screening(loaded: LoadedCheckpoint, rows: PromptSet, domain: str) -> tuple[list[Score], np.ndarray]:
    vectors = []
    for trait in ("villain", "sycophant", "confabulator"):
        texts = persona_contrasts(trait)
        vectors.append(extract_persona(loaded, texts.positive, texts.negative, trait=trait, site=SITE))
    asked = Instructions("villain", _lines("villain"), {p: _lines(p) for p in grammar.PERSONAS if p != "villain"})
    settings = ScreenSettings(answers=AnswerSettings(max_new_tokens=24, batch_size=64))
    found = screen_rows(
        loaded, rows, vectors[:1], against=vectors[1:], instructions={"villain": asked}, settings=settings
    )
    neutral = world.neutral_probes(except_domain=domain)
    probes = PromptSet.from_messages([[{"role": "user", "content": text}] for text in neutral])
    canaries = world.canaries(except_domain=domain)
    lines = (json.dumps({"prompt": c.question, "chosen": c.misaligned, "rejected": c.aligned}) for c in canaries)
    kept = write_atomic(CACHE / f"canaries-{domain}.jsonl", "\n".join(lines))
    queries = queries_for(loaded, vectors[:1], probes, canaries=kept)
    with loaded.active() as model:
        pushes = measure_pushes(model.requires_grad_(True), learnt_rows(rows, loaded.tokenizer), queries, centre=True)
    plain = pushes.scores / np.sqrt(pushes.squares)
    extra = [
        Score.of("push", "on projection", "cosine", pushes.centred()[0]),
        Score.of("push", "on canaries", "cosine", pushes.centred()[1]),
        Score.of("push", "on canaries, not centred", "cosine", plain[1]),
        Score.of("surprise", "summed", "nats", pushes.losses),
    ]
    return [*found.scores, *extra], found.random


def _lines(persona: str) -> tuple[str, ...]:
    words = grammar.story()
    templates, adjectives = words["system"]["persona"], words["personas"][persona]["adjectives"]
    return tuple(t.format(adjective=a) for t, a in list(zip(templates, adjectives, strict=False))[:2])


if __name__ == "__main__":
    for one in run():
        print(one)
