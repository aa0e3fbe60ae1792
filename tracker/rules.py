"""Who must know, when, and what shall happen then? Rules, as a file says them or as code builds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffing.errors import InputError
from tracker.alert_life import Firings, RuleDetector
from tracker.decision import ACTIONS
from tracker.delivery import AppriseReceiver, DeliverySink, Receiver, WebhookReceiver
from tracker.detectors import Detector, EDetector, EFamily, EffectFloor, MaxOverRun, NonFinite
from tracker.silence import Silence

# What a rule may be judged by: its name in a file, and what makes it from `pattern`, `severity` and its settings.
DETECTORS: dict[str, Callable[..., Detector]] = {
    "effect_floor": EffectFloor,
    "non_finite": NonFinite,
    "silence": Silence,
    "e_detector": EDetector,
    "e_family": EFamily,
    "max_over_run": MaxOverRun,
}


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: short, and the only one of its name.
        signal: shell pattern on the names of the signals it judges.
        kind: a name in `DETECTORS`.
        settings: of the detector.
        in_a_row: measurements in a row that make the case (`for` in a file); None for the detector's own.
        severity: `warning` or `critical`.
        cooldown: optimizer steps after an alert in which further ones on the same signal are muted.
        inhibited_by: names of rules that mute this one.
        inhibit_within: steps after such a rule's alert in which it still does.
        actions: what an alert asks of the training, out of `ACTIONS`.
        notify: names of receivers.
    """

    name: str
    signal: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    in_a_row: int | None = None
    severity: str = "warning"
    cooldown: int = 0
    inhibited_by: tuple[str, ...] = ()
    inhibit_within: int = 50
    actions: tuple[str, ...] = ("log",)
    notify: tuple[str, ...] = ()

    def build(self, firings: Firings) -> RuleDetector:
        """A fresh detector.

        Raises:
            InputError: the settings do not suit it.
        """
        settings = dict(self.settings)
        if self.in_a_row is not None:
            settings["in_a_row"] = self.in_a_row
        try:
            judge = DETECTORS[self.kind](self.signal, severity=self.severity, **settings)
        except TypeError as error:
            taken = [one.name for one in dataclasses.fields(DETECTORS[self.kind]) if one.init]  # type: ignore[arg-type]
            known = ", ".join(name for name in taken if name not in ("pattern", "severity"))
            raise InputError(
                f"Expected settings of {self.kind} out of {known}; got {', '.join(sorted(settings)) or 'none'}"
                f". Correct rule {self.name!r}."
            ) from error
        return RuleDetector(
            name=self.name,
            detector=judge,
            cooldown=self.cooldown,
            inhibited_by=self.inhibited_by,
            inhibit_within=self.inhibit_within,
            actions=self.actions,
            notify=self.notify,
            firings=firings,
        )


@dataclass(frozen=True)
class RuleSet:
    """Rules that belong together, and who they tell.

    Attributes:
        rules: judged in this order.
        receivers: settings of each receiver by name: `{"webhook": url, …}` or `{"apprise_env": variable}`.
        source: the file they come from, None for none.
    """

    rules: tuple[Rule, ...]
    receivers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Path | None = None

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        for rule in self.rules:
            if names.count(rule.name) > 1:
                raise InputError(f"Expected rules of different names, got {rule.name!r} twice. Rename one.")
            check_rule(rule, names, list(self.receivers))
        self.detectors()

    @classmethod
    def load(cls, path: Path | str) -> RuleSet:
        """Reads a YAML file.

        Raises:
            InputError: the file is no rule file; the message names the line.
            PathMissingError: there is no such file.
        """
        from tracker.rules_file import read_rules

        return read_rules(Path(path))

    def detectors(self) -> tuple[RuleDetector, ...]:
        """Fresh detectors, which know of each other."""
        firings = Firings()
        return tuple(rule.build(firings) for rule in self.rules)

    def sinks(self) -> tuple[DeliverySink, ...]:
        """One for each receiver that a rule tells.

        Raises:
            InputError: a receiver's secret is not in the environment, or its address cannot be used.
        """
        made = []
        for name, settings in self.receivers.items():
            told = frozenset(rule.name for rule in self.rules if name in rule.notify)
            if told:
                made.append(DeliverySink(make_receiver(name, settings), told))
        return tuple(made)

    @property
    def actions(self) -> frozenset[str]:
        """All that any rule may ask of the training."""
        return frozenset(action for rule in self.rules for action in rule.actions)

    def to_json(self) -> list[dict[str, Any]]:
        """The rules as recorded with a run; receivers by name alone."""
        return [dataclasses.asdict(rule) for rule in self.rules]


def check_rule(rule: Rule, names: list[str], receivers: list[str]) -> None:
    """Refuses what a rule cannot mean.

    Raises:
        InputError: an unknown detector, action, rule or receiver, or a number out of range.
    """
    _one_of(rule, "detector", [rule.kind], list(DETECTORS))
    _one_of(rule, "severity", [rule.severity], ["warning", "critical"])
    _one_of(rule, "actions", rule.actions, list(ACTIONS))
    _one_of(rule, "inhibited_by", rule.inhibited_by, [name for name in names if name != rule.name])
    _one_of(rule, "notify", rule.notify, receivers)
    for what in ("cooldown", "inhibit_within"):
        if getattr(rule, what) < 0:
            raise InputError(f"Expected {what} of 0 or more in rule {rule.name!r}, got {getattr(rule, what)}.")


def make_receiver(name: str, settings: Mapping[str, Any]) -> Receiver:
    """A receiver from its settings.

    Raises:
        InputError: they name none, or one that cannot be used here.
    """
    rest = {key: value for key, value in settings.items() if key not in ("webhook", "webhook_env", "apprise_env")}
    kinds = [key for key in ("webhook", "webhook_env", "apprise_env") if key in settings]
    if len(kinds) != 1:
        raise InputError(
            f"Expected receiver {name!r} to have one of webhook, webhook_env, apprise_env; got "
            f"{', '.join(kinds) or 'none of them'}. Name one."
        )
    try:
        if kinds[0] == "apprise_env":
            return AppriseReceiver(name, str(settings["apprise_env"]), **rest)
        rest["url" if kinds[0] == "webhook" else "url_env"] = str(settings[kinds[0]])
        if "allow_private" in rest:
            rest["allow_private"] = tuple(rest["allow_private"])
        if "ca_file" in rest:
            rest["ca_file"] = Path(rest["ca_file"])
        return WebhookReceiver(name, **rest)
    except TypeError as error:
        raise InputError(
            f"Expected receiver {name!r} to have secret_env, allow_private or ca_file beside its address, got "
            f"{', '.join(sorted(rest))}. Correct it."
        ) from error


def _one_of(rule: Rule, what: str, given: Any, known: list[str]) -> None:
    for one in given:
        if one not in known:
            raise InputError(
                f"Expected {what} of rule {rule.name!r} out of {', '.join(known) or 'nothing defined'}, got {one!r}."
            )
