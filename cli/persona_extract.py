"""How do I get a persona vector? `palimpsest persona extract`: by asking the model, or from answers that are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cli.judge_choice import JUDGE_HELP, JudgeRoom
from cli.persona_model import POOLINGS, load_model, model_options, reading_bar
from cli.persona_tables import show_extraction, show_vectors, vector_facts

# torch is imported inside the functions: `--help` must not wait for it.
if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.judging import Judge
    from diffing.persona import PersonaVector
    from diffing.persona.elicit_plan import ElicitSettings
    from diffing.persona.traits import Trait
    from diffing.prompts import PromptSet

_FILE = click.Path(path_type=Path)
_COUNT = click.IntRange(1)
_ONLY_ASKED = (
    *("rollouts", "held_out_rollouts", "judge", "coherence_judge", "temperature", "max_new_tokens", "batch_size"),
    *("shots", "strengths", "sweep", "plan"),
)
_ONLY_GIVEN = ("against", "held_out")


@click.command()
@click.argument("model")
@click.option("--trait", "traits", required=True, multiple=True, metavar="NAME|FILE",
              help="Shipped trait, trait file, or all; may be repeated. With --positive just a name.")  # fmt: skip
@click.option("--out", type=_FILE, required=True,
              help="File for the vector; the rest goes into the folder of its name. A folder for several.")  # fmt: skip
@click.option("--site", "sites", multiple=True, help="May be repeated.  [default: every layer; resid:50% if given]")
@click.option("--seed", default=0, show_default=True, help="Fixes answers, splits and nulls.")
@click.option("--rollouts", type=_COUNT, default=3, show_default=True, help="Answers a question and system prompt.")
@click.option("--held-out-rollouts", type=_COUNT, default=1, show_default=True, help="The same, held-out questions.")
@click.option("--judge", metavar="JUDGE", help=f"Keeps answers that do as told: {JUDGE_HELP}")
@click.option("--coherence-judge", metavar="JUDGE", help="[default: the same judge, where it is a model]")
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--max-new-tokens", type=_COUNT, default=200, show_default=True)
@click.option("--batch-size", type=_COUNT, default=16, show_default=True, help="Answers written at once.")
@click.option("--shots", default=4, show_default=True, help="Examples for models without a chat template.")
@click.option("--strength", "strengths", type=float, multiple=True, help="Of the sweep, in gaps.  [0.5 1 2 3 4]")
@click.option("--sweep/--no-sweep", default=True, show_default=True, help="Choose the layer by steering.")
@click.option("--plan", is_flag=True, help="State the cost, and stop there.")
@click.option("--api-key-env", default="", help="Environment variable with the endpoint's key.")
@click.option("--given", is_flag=True, help="Read the trait's own written answers instead of asking the model.")
@click.option("--positive", type=_FILE, help="Given: dialogues that show the trait.")
@click.option("--negative", type=_FILE, help="Given: dialogues with plain answers, best to the same questions.")
@click.option("--against", type=_FILE, multiple=True, help="Given: answers of another persona to tell it from.")
@click.option("--pooling", type=click.Choice(POOLINGS), default="response_mean", show_default=True,
              help="Tokens the vector is read at; by asking, all are fitted and this one is chosen.")  # fmt: skip
@click.option("--held-out", default=0.3, show_default=True, help="Given: share of questions kept out of the fit.")
@model_options
@click.pass_context
def extract(context: click.Context, **options: Any) -> None:
    """Extract a trait's direction from MODEL and say how well it separates held-out answers.

    By default the model is asked: under system prompts that call for the trait and for its absence, it answers the
    trait's questions; answers that do not do as told are dropped by a judge; every layer is fitted in one pass; and
    the layer is chosen at which adding the vector brings the trait out on held-out questions. Answers and scores are
    kept beside the vector: interrupted, the same command goes on.
    """
    given = options["given"] or options["positive"] or options["negative"]
    for name in _ONLY_ASKED if given else _ONLY_GIVEN:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            flag = "--no-sweep" if name == "sweep" else f"--{name.rstrip('s') if name == 'strengths' else name}"
            way = "when the model is asked" if given else "with --given or --positive"
            raise click.UsageError(f"Expected {flag.replace('_', '-')} {way} only. Leave it out.")
    if given:
        _extract_given(options)
    else:
        _extract_asked(options)


def _extract_given(options: dict[str, Any]) -> None:
    from diffing.persona import extract_personas
    from diffing.prompts import PromptSet

    if len(options["traits"]) > 1:
        raise click.UsageError("Expected one trait where answers are given, got several. Extract one after another.")
    name, trait_rows, plain_rows = _contrast_sets(options["traits"][0], options["positive"], options["negative"])
    others = [PromptSet.from_file(path) for path in options["against"]]
    loaded = _load(options)
    with reading_bar("Reading answers", quiet=options["as_json"]) as progress:
        vectors = extract_personas(
            loaded,
            trait_rows,
            plain_rows,
            trait=name,
            sites=list(options["sites"] or ("resid:50%",)),
            pooling=options["pooling"],
            held_out=options["held_out"],
            seed=options["seed"],
            against=others,
            max_length=options["max_length"],
            batch_tokens=options["batch_tokens"],
            progress=progress,
        )
    paths = [vector.save(_given_path(options["out"], vector, several=len(vectors) > 1)) for vector in vectors]
    if options["as_json"]:
        click.echo(json.dumps([vector_facts(*pair) for pair in zip(vectors, paths, strict=True)], sort_keys=True))
        return
    show_vectors(vectors, paths)


def _extract_asked(options: dict[str, Any]) -> None:
    from diffing.json_twin import to_plain
    from diffing.persona.elicited import Elicitation
    from tracker.report.persona_page import write_persona_report

    traits = _named_traits(options["traits"])
    paths = [_asked_path(options["out"], trait.name, several=len(traits) > 1) for trait in traits]
    settings = _settings(options)
    loaded = _load(options)
    found = []
    for trait, path in zip(traits, paths, strict=True):
        folder = path.with_suffix("")
        elicitation = Elicitation.of(loaded, trait, folder, settings)
        with JudgeRoom(options["api_key_env"], folder, options["device"], options["dtype"]) as room:
            judges = _judges(room, options, trait)
            cost = elicitation.cost(judges=sum(judge is not None for judge in judges))
            click.echo(f"{trait.name}: {cost.sentence}", err=True)
            if options["plan"]:
                continue
            with reading_bar("Reading answers", quiet=options["as_json"]) as reading:
                extraction = elicitation.run(
                    judge=judges[0], coherence=judges[1], reading=reading, progress=not options["as_json"]
                )
        extraction.save(path)
        page = write_persona_report(extraction.record, folder)
        found.append({"path": str(path), "page": str(page), **to_plain(extraction.record)})
        if not options["as_json"]:
            show_extraction(extraction, path, page)
    if options["as_json"] and not options["plan"]:
        click.echo(json.dumps(found, sort_keys=True))


def _settings(options: dict[str, Any]) -> ElicitSettings:
    from diffing.persona.elicit_plan import ElicitSettings
    from diffing.persona.sweep import STRENGTHS

    return ElicitSettings(
        rollouts=options["rollouts"],
        held_out_rollouts=options["held_out_rollouts"],
        temperature=options["temperature"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        shots=options["shots"],
        max_length=options["max_length"],
        batch_tokens=options["batch_tokens"],
        pooling=options["pooling"],
        sites=tuple(options["sites"]),
        strengths=(tuple(options["strengths"]) or STRENGTHS) if options["sweep"] else (),
    )


def _judges(room: JudgeRoom, options: dict[str, Any], trait: Trait) -> tuple[Judge | None, Judge | None]:
    """Of the trait by its own rubric, and of coherence."""
    from diffing.judging import Rubric
    from diffing.judging.rubrics import COHERENT, shipped_rubric

    if options["judge"] is None:
        if options["coherence_judge"] is not None:
            raise click.UsageError("Expected --judge beside --coherence-judge, got none. Give both.")
        return None, None
    judge = room.open(options["judge"], Rubric(trait.name, trait.rubric))
    # Rules and scorers know their own rubrics only; a model can be asked anything.
    is_model = options["judge"].partition(":")[0] in ("hf", "endpoint")
    spec = options["coherence_judge"] or (options["judge"] if is_model else None)
    return judge, room.open(spec, shipped_rubric(COHERENT)) if spec else None


def _named_traits(names: Sequence[str]) -> list[Trait]:
    from diffing.persona import load_trait, shipped_traits

    wanted = [one for name in names for one in (shipped_traits() if name == "all" else [name])]
    traits = [load_trait(name) for name in dict.fromkeys(wanted)]
    repeated = {trait.name for trait in traits if sum(other.name == trait.name for other in traits) > 1}
    if repeated:
        raise click.UsageError(f"Expected traits of different names, got {', '.join(repeated)} twice. Rename one.")
    return traits


def _contrast_sets(trait: str, positive: Path | None, negative: Path | None) -> tuple[str, PromptSet, PromptSet]:
    from diffing.persona import load_trait
    from diffing.prompts import PromptSet

    if (positive is None) != (negative is None):
        missing = "--negative" if negative is None else "--positive"
        raise click.UsageError(f"Expected --positive and --negative together, got one. Give {missing} as well.")
    if positive is None or negative is None:
        found = load_trait(trait)
        return found.name, *found.contrast_sets()
    return Path(trait).stem, PromptSet.from_file(positive), PromptSet.from_file(negative)


def _load(options: dict[str, Any]) -> LoadedCheckpoint:
    names = ("base", "revision", "dtype", "device")
    return load_model(options["model"], **{name: options[name] for name in names})


def _given_path(out: Path, vector: PersonaVector, *, several: bool) -> Path:
    if not several:
        return out
    return out / f"{vector.trait}-{vector.site.replace(':', '-')}.safetensors"


def _asked_path(out: Path, trait: str, *, several: bool) -> Path:
    if out.suffix == ".safetensors" and not several:
        return out
    if out.suffix == ".safetensors":
        raise click.UsageError(f"Expected a folder as --out for several traits, got {out}. Name a folder.")
    return out / f"{trait}.safetensors"
