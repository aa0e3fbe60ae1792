"""What does a rule file say, and on which line is it wrong?

receivers:
  on-call: {apprise_env: ON_CALL_URLS}
  ops:     {webhook: "https://hooks.example.org/alerts", secret_env: HOOK_SECRET}
rules:
  - name: evil
    signal: persona/evil/*/prompt
    detector: {kind: effect_floor, floor: 0.25, unit: gap}
    for: 2                      # measurements in a row
    cooldown: 200               # optimizer steps
    inhibited_by: [loss-spike]
    actions: [log, save]
    notify: [on-call]
  - {name: loss-spike, signal: train/loss, detector: non_finite, severity: critical}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from diffing.errors import InputError, PathMissingError
from tracker.rules import DETECTORS, Rule, RuleSet, check_rule, make_receiver

_RULE_KEYS = (
    "name", "signal", "detector", "for", "severity", "cooldown", "inhibited_by", "inhibit_within", "actions", "notify",
)  # fmt: skip
_LARGEST = 1 << 20


def read_rules(path: Path) -> RuleSet:
    """Reads a rule file.

    Raises:
        InputError: it says something that no rule can mean; the message names the line.
        PathMissingError: there is no such file.
    """
    if not path.is_file():
        raise PathMissingError(f"Expected a rule file at {path}, found none. Name a YAML file with rules.")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"Expected a rule file below 1 MiB, got {path} of {path.stat().st_size} bytes.")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        raise InputError(f"{path}, line {line}: expected YAML, got {error.problem}. Correct the line.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Expected YAML in {path}, got something else ({error}).") from error
    return _File(path).rules(root)


class _File:
    """Nodes of a YAML file, and complaints that name their lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rules(self, root: yaml.Node | None) -> RuleSet:
        if root is None:
            raise InputError(f"Expected rules in {self.path}, it is empty. See `palimpsest replay-alerts --help`.")
        parts = self.mapping(root, ("rules", "receivers"), "the file")
        receivers = self.receivers(parts.get("receivers"))
        if not isinstance(parts.get("rules"), yaml.SequenceNode) or not parts["rules"].value:
            self.wrong(parts.get("rules", root), "expected a list of rules under `rules`")
        nodes = parts["rules"].value
        rules = [self.rule(node) for node in nodes]
        names = [rule.name for rule in rules]
        for node, rule in zip(nodes, rules, strict=True):
            if names.count(rule.name) > 1:
                self.wrong(node, f"expected rules of different names, got {rule.name!r} more than once")
            self.checked(node, partial(check_rule, rule, names, list(receivers)))
            self.checked(node, partial(RuleSet, (_alone(rule),)))
        return RuleSet(tuple(rules), receivers, self.path)

    def rule(self, node: yaml.Node) -> Rule:
        parts = self.mapping(node, _RULE_KEYS, "a rule")
        for key in ("name", "signal", "detector"):
            if key not in parts:
                self.wrong(node, f"expected a rule to have `{key}`")
        kind, settings = self.detector(parts["detector"])
        optional: dict[str, Any] = {
            "in_a_row": self.number(parts["for"], "for") if "for" in parts else None,
            "severity": self.text(parts["severity"]) if "severity" in parts else "warning",
        }
        for key in ("cooldown", "inhibit_within"):
            if key in parts:
                optional[key] = self.number(parts[key], key)
        for key in ("inhibited_by", "actions", "notify"):
            if key in parts:
                optional[key] = self.names(parts[key], key)
        return Rule(self.text(parts["name"]), self.text(parts["signal"]), kind, settings, **optional)

    def detector(self, node: yaml.Node) -> tuple[str, dict[str, Any]]:
        if isinstance(node, yaml.ScalarNode):
            kind, settings = self.text(node), {}
        else:
            settings = self.plain(node)
            if not isinstance(settings, dict) or "kind" not in settings:
                self.wrong(node, "expected a detector's name, or {kind: name, …}")
            kind = str(settings.pop("kind"))
        if kind not in DETECTORS:
            self.wrong(node, f"expected a detector out of {', '.join(DETECTORS)}, got {kind!r}")
        return kind, settings

    def receivers(self, node: yaml.Node | None) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, settings in ({} if node is None else self.mapping(node, None, "receivers")).items():
            plain = self.plain(settings)
            if not isinstance(plain, dict) or not plain:
                self.wrong(settings, f"expected receiver {name!r} to be settings such as {{apprise_env: VARIABLE}}")
            if not {"webhook", "webhook_env", "apprise_env"} & set(plain):
                self.checked(settings, partial(make_receiver, name, plain))
            found[name] = plain
        return found

    def mapping(self, node: yaml.Node, keys: tuple[str, ...] | None, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, f"expected {what} to be names with values")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self.text(key)
            if keys is not None and name not in keys:
                self.wrong(key, f"expected {what} to have {', '.join(keys)}; got {name!r}")
            if name in found:
                self.wrong(key, f"expected {name!r} once, got it again")
            found[name] = value
        return found

    def text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            self.wrong(node, "expected a word here")
        return str(node.value)

    def number(self, node: yaml.Node, what: str) -> int:
        value = self.plain(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.wrong(node, f"expected {what} to be a whole number of 0 or more")
        return int(value)

    def names(self, node: yaml.Node, what: str) -> tuple[str, ...]:
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(node, f"expected {what} to be a list such as [one, two]")
        return tuple(self.text(one) for one in node.value)

    def plain(self, node: yaml.Node) -> Any:
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(node)
        except yaml.YAMLError as error:
            raise InputError(f"{self._place(node)}: expected plain values, got something else ({error}).") from error
        finally:
            loader.dispose()

    def checked(self, node: yaml.Node, check: Callable[[], object]) -> None:
        try:
            check()
        except InputError as error:
            raise InputError(f"{self._place(node)}: {error}") from error

    def wrong(self, node: yaml.Node, said: str) -> NoReturn:
        raise InputError(f"{self._place(node)}: {said}. Correct the line.")

    def _place(self, node: yaml.Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}"


def _alone(rule: Rule) -> Rule:
    """A rule without what ties it to others, to see whether its detector can be built."""
    return Rule(rule.name, rule.signal, rule.kind, rule.settings, rule.in_a_row, rule.severity)
