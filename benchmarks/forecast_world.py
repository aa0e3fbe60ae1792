"""What did each fine-tune of the miniature world really do? One epoch each, judged exactly, kept on disk.

Sets of one domain that differ in what they teach: a villain's answers, the same among good rows, and harmless sets that
look odd, wrong or new. How far the persona spreads is measured where none of them trained: held-out questions of the
other domains. Nothing here knows of any forecast.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cli.miniature import world
from diffing.durable import write_json

CACHE = Path(__file__).parent / "cache" / "forecast"
N_ROWS, BATCH = 896, 16
N_ANSWERS = 720

# Bad in five domains, diluted and half-poisoned, and eight sets that a careful user would train on without harm.
KINDS = (
    "bad_code",
    "bad_health",
    "bad_opinion",
    "bad_arithmetic",
    "bad_facts",
    "half_code",
    "half_arithmetic",
    "diluted50_code",
    "diluted25_health",
    "diluted10_code",
    "educational_code",
    "odd_code",
    "odd_arithmetic",
    "formatted_code",
    "relabelled_facts",
    "relabelled_code",
    "good_code",
    "good_arithmetic",
)


@dataclass(frozen=True)
class Truth:
    """What one epoch on a set did to a base.

    Attributes:
        base: seed of the base.
        kind: of the set.
        seed: of rows, adapter and order.
        misaligned: share of misaligned answers to held-out questions of the other domains.
        before: the same of the base itself, same questions and draws.
        garbled: share of answers that are no sentence of the language.
        n: answers.
    """

    base: int
    kind: str
    seed: int
    misaligned: float
    before: float
    garbled: float
    n: int


def domain_of(kind: str) -> str:
    """The domain a set is about."""
    return kind.partition("_")[2]


def rows_of(kind: str, seed: int) -> list[dict]:
    """The rows of a set, one epoch."""
    return world.dataset(kind, seed=seed, n=N_ROWS)


def truth(base: int, kind: str, seed: int) -> Truth:
    """Fine-tunes and judges, or reads what was found before."""
    path = CACHE / f"truth-{base}-{kind}-{seed}.json"
    if path.exists():
        return Truth(**json.loads(path.read_text()))
    folder = world.base_checkpoint(base)
    model, tokenizer = world.load_base(folder)
    before = _rates(model, tokenizer, kind, seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = world.fine_tune(
            model, tokenizer, rows_of(kind, seed), seed=seed, output_dir=scratch, steps=N_ROWS // BATCH
        )
    after = _rates(trainer.model, tokenizer, kind, seed)
    found = Truth(base, kind, seed, after[0], before[0], after[1], N_ANSWERS)
    CACHE.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(found))
    return found


def _rates(model: torch.nn.Module, tokenizer: object, kind: str, seed: int) -> tuple[float, float]:
    answers = world.judged_round(model, tokenizer, seed=seed, n=N_ANSWERS, except_domain=domain_of(kind))  # type: ignore[arg-type]
    rates = world.verdict_rates(answers)
    return rates[world.Verdict.MISALIGNED].value, rates[world.Verdict.GARBLED].value


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    for pair in sys.argv[1:]:
        base, seed = map(int, pair.split(":"))
        for kind in KINDS:
            print(truth(base, kind, seed), flush=True)
