"""Does every alert reach its receiver once, signed and without a secret, though the receiver was down?"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffing.errors import InputError
from tests.tracker.receiver_server import ReceiverServer
from tracker.delivery import AppriseReceiver, DeliverySink, PrometheusSink, WebhookReceiver
from tracker.delivery.carrier import is_public
from tracker.delivery.receivers import SIGNATURE_HEADER, TIME_HEADER, sign
from tracker.journal import Journal
from tracker.pipeline import Pipeline
from tracker.rules import Rule, RuleSet
from tracker.signals import DriftSignal
from tracker.sinks import RunInfo

NAME, SECRET = "persona/evil/L2/prompt", "a-very-secret-word"
EVIL = Rule("evil", "persona/*", "effect_floor", {"floor": 0.25, "in_a_row": 1}, notify=("ops",))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReceiverServer]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    made = ReceiverServer(tmp_path)
    yield made
    made.close()


def webhook(server: ReceiverServer, **settings) -> WebhookReceiver:
    known = {"secret_env": "HOOK_SECRET", "allow_private": ("localhost",), "ca_file": server.ca_file, **settings}
    return WebhookReceiver("ops", f"https://localhost:{server.port}/alerts", **known)


def track(run_dir: Path, sink, values: list[float], *, step: int = 0, timeout: float = 60.0) -> float:
    """Feeds drifts as a run would; returns the seconds that feeding took."""
    with Journal.create_or_open(run_dir) as journal:
        journal.start_attempt(step, {})
        pipeline = Pipeline(journal, RuleSet((EVIL,), {"ops": {"apprise_env": "X"}}).detectors(), [sink])
        pipeline.start(RunInfo(run_dir, name="demo"))
        began = time.perf_counter()
        for place, value in enumerate(values):
            pipeline.feed([DriftSignal(NAME, value, step + 10 * (place + 1), "gap")])
        spent = time.perf_counter() - began
        pipeline.close(timeout)
    return spent


def test_a_webhook_is_told_once_with_a_signature_that_it_can_check(server: ReceiverServer, tmp_path: Path) -> None:
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    track(tmp_path / "run", DeliverySink(webhook(server)), [0.1, 0.4, 0.4, 0.0])
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    messages = [json.loads(body) for _, body in server.received]
    assert [(one["status"], one["alert"]["step"]) for one in messages] == [("firing", 20), ("resolved", 20)]
    headers, body = server.received[0]
    assert headers[SIGNATURE_HEADER] == sign(SECRET, headers[TIME_HEADER], body.decode())
    assert messages[0]["run"] == "demo" and messages[0]["alert"]["rule_name"] == "evil"
    assert "allow" not in body.decode() and SECRET not in body.decode()
    _no_secret(tmp_path / "run")


def _no_secret(run_dir: Path) -> None:
    for path in run_dir.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_dead_receiver_costs_nothing_and_is_told_later_once(server: ReceiverServer, tmp_path: Path) -> None:
    server.answers = [503] * 50
    sink = DeliverySink(webhook(server), first_pause=0.05)
    assert track(tmp_path / "run", sink, [0.4] * 3, timeout=3.0) < 2.0
    assert server.received == []
    with Journal.read(tmp_path / "run") as journal:
        assert any("status 503" in failure.error for failure in journal.failures())
    server.answers = []
    later = DeliverySink(webhook(server))
    assert later.drain(tmp_path / "run").sent == 1 and later.drain(tmp_path / "run").sent == 0
    assert len(server.received) == 1
    _no_secret(tmp_path / "run")


def test_a_resumed_run_does_not_tell_again_what_is_still_open(server: ReceiverServer, tmp_path: Path) -> None:
    track(tmp_path / "run", DeliverySink(webhook(server)), [0.1, 0.4, 0.4])
    # The same alert a step later: a resume from step 10 whose numbers differ a little.
    track(tmp_path / "run", DeliverySink(webhook(server)), [0.2, 0.4], step=10)
    assert len(server.received) == 1


@pytest.mark.parametrize(("status", "said"), [(302, "redirect"), (403, "status 403")])
def test_redirects_and_refusals_are_not_tried_again(server, tmp_path: Path, status: int, said: str) -> None:
    server.answers = [status]
    track(tmp_path / "run", DeliverySink(webhook(server), first_pause=0.01), [0.4])
    assert server.received == []
    with Journal.read(tmp_path / "run") as journal:
        (failure,) = journal.failures()
        assert said in failure.error and failure.count == 1


def test_a_name_that_leads_into_a_private_network_is_refused_at_the_connection(server, tmp_path: Path) -> None:
    track(tmp_path / "run", DeliverySink(webhook(server, allow_private=())), [0.4])
    with Journal.read(tmp_path / "run") as journal:
        assert "private network" in journal.failures()[0].error
    assert server.received == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("169.254.169.254", False), ("::1", False),
        ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False), ("224.0.0.1", False), ("2606:4700::1111", True),
        ("0.0.0.0", False), ("100.64.0.1", False),
    ],
)  # fmt: skip
def test_what_counts_as_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "http://localhost/"},
        {"url": "https://user:word@localhost/"},
        {"url": ""},
        {"url": "https://localhost/", "secret_env": "NOT_SET_ANYWHERE"},
        {"url": "https://localhost/", "url_env": "HOOK_SECRET"},
    ],
)
def test_an_unusable_webhook_is_refused_without_showing_a_secret(settings, monkeypatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    with pytest.raises(InputError) as refused:
        WebhookReceiver("ops", **settings)
    assert "word" not in str(refused.value).replace("password", "")


def test_apprise_carries_an_alert_and_its_address_stays_in_the_environment(tmp_path: Path, monkeypatch) -> None:
    if importlib.util.find_spec("apprise") is None:
        pytest.skip("Apprise is an extra")
    plain = ReceiverServer(tmp_path, tls=False)
    monkeypatch.setenv("ON_CALL", f"json://localhost:{plain.port}/{SECRET}")
    try:
        track(tmp_path / "run", DeliverySink(AppriseReceiver("on-call", "ON_CALL")), [0.4])
    finally:
        plain.close()
    assert "apprise" not in sys.modules  # it draws from Python's random, which belongs to the training
    ((_, body),) = plain.received
    said = json.loads(body)
    assert said["title"] == "WARNING: evil in demo at step 10" and "above 0.25" in said["message"]
    _no_secret(tmp_path / "run")


def test_rules_name_receivers_and_only_those_that_are_told_are_opened(monkeypatch) -> None:
    monkeypatch.setenv("X", "json://localhost")
    told = RuleSet((EVIL,), {"ops": {"apprise_env": "X"}, "unused": {"apprise_env": "NOT_SET_ANYWHERE"}}).sinks()
    assert [sink.name for sink in told] == ["deliver:ops"]
    with pytest.raises(InputError, match="NOT_SET_ANYWHERE"):
        RuleSet((EVIL,), {"ops": {"apprise_env": "NOT_SET_ANYWHERE"}}).sinks()


def test_prometheus_finds_signals_alerts_and_the_last_sign_of_life(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    track(tmp_path / "run", PrometheusSink(), [0.1, 0.4])
    text = (tmp_path / "run" / "metrics.prom").read_text()
    assert 'palimpsest_signal{run="demo",signal="persona/evil/L2/prompt",unit="gap"} 0.4' in text
    assert 'palimpsest_alerts{rule="evil",run="demo",severity="warning",state="firing"} 1.0' in text
    assert 'palimpsest_step{run="demo"} 20.0' in text
    assert "palimpsest_last_record_timestamp_seconds" in text
