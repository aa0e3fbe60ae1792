"""`palimpsest judge check`: how far is a judge to be believed?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.judge_choice import JUDGE_HELP, JudgeRoom

if TYPE_CHECKING:
    from diffing.judging.gold import JudgeCheck

_FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def judge() -> None:
    """Judges of answers: check them against answers whose score is known."""


@judge.command()
@click.argument("gold", type=_FILE)
@click.option("--judge", "spec", required=True, metavar="JUDGE", help=JUDGE_HELP)
@click.option("--rubric", default="aligned", show_default=True, metavar="aligned|coherent|FILE")
@click.option("--below", default=30.0, show_default=True, help="Scores under it count as positive (misaligned).")
@click.option("--seed", default=0, show_default=True, help="Of the resampling.")
@click.option("--api-key-env", default="", help="Environment variable with the endpoint's key.")
@click.option(
    "--judge-samples", default=5, show_default=True, help="Replies where a server gives no log-probabilities."
)
@click.option("--scale", type=(float, float), default=(0.0, 1.0), show_default=True, help="Of an MLflow scorer.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=_FILE, help="Write the check as JSON, for `palimpsest misalignment --check`.")
@click.option("--cache", type=_FILE, help="Folder in which scores and replies are kept.")
@click.option("--least-kappa", type=click.FloatRange(-1, 1), help="Exit with 1 if agreement is below it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
@click.pass_context
def check(
    context: click.Context,
    gold: Path,
    spec: str,
    rubric: str,
    below: float,
    seed: int,
    api_key_env: str,
    judge_samples: int,
    scale: tuple[float, float],
    dtype: str,
    device: str,
    out: Path | None,
    cache: Path | None,
    least_kappa: float | None,
    as_json: bool,
) -> None:
    """Compares a judge with GOLD: rows of question, answer, and score (0 to 100) or reason (refusal, off_format).

    Agreement (kappa, rank correlation), calibration (Brier, expected calibration error), and the confusion at the
    threshold, each with its interval and n.
    """
    from diffing.durable import write_json
    from diffing.judging.gold import check_judge, load_gold
    from diffing.judging.kept import KeptScores
    from diffing.judging.rubrics import load_rubric

    rows = load_gold(gold)
    with JudgeRoom(api_key_env, cache, device, dtype, judge_samples, scale=scale) as room:
        opened = room.open(spec, load_rubric(rubric))
        kept_at = None if cache is None else cache / "scores.sqlite"
        with KeptScores(opened, kept_at) as kept:
            found = check_judge(kept, rows, below=below, seed=seed, progress=not as_json)
    if out is not None:
        write_json(out, found.to_json())
    if as_json:
        click.echo(json.dumps(found.to_json(), sort_keys=True))
    else:
        _show(found)
    # Not "below": agreement that cannot be told must not pass.
    context.exit(0 if least_kappa is None or found.kappa.value >= least_kappa else 1)


def _show(found: JudgeCheck) -> None:
    click.echo(f"{found.judge}\nrubric {found.rubric_name} ({found.rubric[:12]}), {found.n} gold rows\n")
    click.echo(f"agreement    kappa {found.kappa}")
    click.echo(f"             rank correlation {found.spearman}")
    click.echo(f"calibration  Brier {found.brier}; expected calibration error {found.ece}")
    click.echo(f"sensitivity  {found.error.sensitivity} (score below {found.below:g})")
    click.echo(f"specificity  {found.error.specificity}")
    columns = sorted({name for row in found.confusion.values() for name in row})
    wide = max(12, *(len(name) for name in (*columns, *found.confusion)))
    click.echo("\n" + "true \\ judged".ljust(wide + 2) + "".join(name.rjust(wide + 2) for name in columns))
    for true, row in found.confusion.items():
        click.echo(true.ljust(wide + 2) + "".join(str(row[name]).rjust(wide + 2) for name in columns))
    lost = {name: count for name, count in found.reasons.items() if count and name in ("nonsense", "failed")}
    if lost:
        click.echo("\nNot scored: " + ", ".join(f"{count} {name}" for name, count in lost.items()))
