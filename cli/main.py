"""How do I ask? `palimpsest` and its commands, each loaded only when it is called so that `--help` is instant."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

import click

# command name -> (module, attribute, one-line help shown without importing the module)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("cli.demo", "demo", "The whole story on a tiny model: fine-tune, drift, alert, cause, report."),
    "diff": ("cli.diff", "diff", "What changed between two checkpoints: numbers, latents, tokens, one page."),
    "timeline": ("cli.timeline", "timeline", "When, along a run's checkpoints, latents were born, died or turned."),
    "dictionary": ("cli.dictionary", "dictionary", "Write a crosscoder for dictionary_learning, SAELens, Neuronpedia."),
    "persona": ("cli.persona", "persona", "Persona vectors: extract from contrastive answers, project texts."),
    "attribute": (
        "cli.attribute",
        "attribute",
        "Which training rows pushed a run: to a persona, an answer, an alert.",
    ),
    "misalignment": (
        "cli.misalignment",
        "misalignment",
        "How often a model answers misaligned; gates with exit code 1.",
    ),
    "judge": ("cli.judge", "judge", "Check a judge of answers against answers whose score is known."),
    "alerts": ("cli.alerts", "alerts", "What stands open in a tracked run, and who has seen it."),
    "calibrate": ("cli.calibrate", "calibrate", "How far benign runs go, and which false-alarm rate that vouches for."),
    "replay-alerts": ("cli.replay_alerts", "replay_alerts", "What other rules would have said of a run that is over."),
    "explain": ("cli.explain", "explain", "Why an alert fired: how special, which rows, what was clean before it."),
    "report": ("cli.report", "report", "Rebuild the page of a tracked run from its directory."),
    "sync": ("cli.sync", "sync", "Send to MLflow what a tracked run could not send while it ran."),
    "verify": ("cli.verify", "verify", "Check every byte of an activation store against its checksums."),
    "doctor": ("cli.doctor", "doctor", "What would fail in this environment, and the fix."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on first use: torch stays out of `palimpsest --help`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the story, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports one command's module."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists commands with the help of the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="palimpsest")
def palimpsest() -> None:
    """Reads what post-training wrote over a base model: what changed, towards whom, from which rows, and when."""


def main() -> None:
    """Entry point: one readable line for what went wrong, never a traceback for a user's mistake.

    Exit codes: 0 ok; 1 a threshold was crossed where the command was asked to gate on it; 2 bad usage or input.
    """
    # Spinning OpenMP workers make two busy processes ten times slower; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The commands draw bars of their own; those of the libraries would stand in between.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft 0.21 asks transformers 5.23 under an old name; nothing that a user could mend.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        sys.exit(palimpsest(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        click.echo("Interrupted. What was committed before is intact; run the same command to go on.", err=True)
        sys.exit(130)
    except Exception as error:
        if not _is_ours(error):
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


def _is_ours(error: Exception) -> bool:
    # Looked up rather than imported: `diffing` brings torch, which `--help` must not wait for.
    errors = sys.modules.get("diffing.errors")
    return errors is not None and isinstance(error, errors.PalimpsestError)


if __name__ == "__main__":
    main()
