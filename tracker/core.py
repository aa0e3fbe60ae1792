"""How is any training loop tracked, whatever framework runs it?

    tracker = Tracker("runs/tracked", personas=[evil])
    tracker.start(model, tokenizer)
    for step, batch in enumerate(batches, start=1):
        tracker.begin_step()
        ...forward, backward...
        tracker.before_update()
        ...optimizer.step()...
        if tracker.end_step(step, {"loss": loss}).stop:
            break
    tracker.end()

`tracker.callback` and `tracker.manual` translate into these calls.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from attribution import AttributionRow
from diffing.errors import InputError
from diffing.persona import Canary, PersonaVector
from diffing.prompts import PromptSet
from tracker.alarms.bank import NullBank
from tracker.alarms.run_series import RunSeries
from tracker.alert_life import requested_actions
from tracker.decision import ACTIONS, Decision, WantedRecovery
from tracker.detectors import Detector, EffectFloor, MaxOverRun, NonFinite
from tracker.live_cause import ranked_pushes
from tracker.mlflow_sink import MlflowSink
from tracker.personas import keep_personas
from tracker.pipeline import Health
from tracker.plan import STANDARD_SCHEDULES, Plan, Wanted, make_plan
from tracker.preventive import PreventiveSteering, RunningSteering
from tracker.probes.base import Probe, Subject
from tracker.probes.gradients import SIGNAL as NONFINITE_GRADIENTS
from tracker.probes.reference import References
from tracker.rules import RuleSet
from tracker.schedule import Schedule
from tracker.session import Session, SessionSettings
from tracker.signals import Alert
from tracker.sinks import Sink
from tracker.training_logs import signals_from_logs
from tracker.undisturbed import undisturbed

_log = logging.getLogger(__name__)
_NO_INTERVENTION = (
    "Expected a tracker that runs and was given an intervention, got one without. "
    "Pass intervention=PreventiveSteering(vectors, from_step=None)."
)


def default_detectors() -> tuple[Detector, ...]:
    """Judges for a run that names none. Their floors are effect sizes, not calibrated on benign runs of this kind."""
    return (
        EffectFloor("persona/*/prompt", floor=0.25, unit="gap", in_a_row=2),
        EffectFloor("misalignment/canary", floor=0.25, unit="nats/token", in_a_row=2),
        EffectFloor(NONFINITE_GRADIENTS, floor=0.5, unit="relative", in_a_row=1, severity="critical"),
        NonFinite("train/loss"),
    )


def calibrated_detectors(bank: NullBank) -> tuple[Detector, ...]:
    """Judges for a run beside a bank of benign ones: the fused score at a false-alarm rate of 5 % a run.

    Raises:
        InputError: the bank is too small to vouch for 5 %.
    """
    return (
        MaxOverRun(bank=bank, level=0.05),
        EffectFloor(NONFINITE_GRADIENTS, floor=0.5, unit="relative", in_a_row=1, severity="critical"),
        NonFinite("train/loss"),
    )


class Tracker:
    """Measures a model while it is trained, records it, and says when someone must know.

    Training is the same, bit for bit, as without it, until an alert asks to stop or an intervention is engaged. What
    fails while measuring or sending is journalled and counted, and training goes on; only settings that cannot work
    raise, at `start`.

    Args:
        output_dir: the run directory: journal, references, personas, report.
        personas: persona vectors or their files. None: the shipped traits, extracted from this model when the run
            starts. Empty: none.
        probe_prompts: neutral prompts for the personas. None: the shipped ones.
        canaries: questions with an aligned and a misaligned answer. None: the shipped ones. Empty: none.
        schedule: when to measure, `every 50` or as `Schedule.parse` reads it; step 0 is always measured.
        detectors: judges of the signals. None: `default_detectors()`.
        rules: named rules in their place, as a `RuleSet` or its YAML file: who is told of what, with cooldown,
            inhibition and what each asks of the training. Their receivers join the sinks.
        bank: benign runs that `palimpsest calibrate` put together, or their folder. Several signals are then fused into
            `misalignment/score`, and where neither rules nor detectors are named that score is judged, at 5 % of false
            alarms a run.
        sinks: where the record goes. None: MLflow. Empty: the journal only.
        on_alert: what an alert does: `log` a warning, `save` a checkpoint, `stop` the training, `exit` with code 3
            once the run has ended (a Trainer's script ends where `train` would return), `steer`: switch the
            intervention on; `rollback` and `drop` as `train_with_recovery` says, which stop a plain training.
        probes: further probes; one of the same name replaces the standard one.
        intervention: what is done to the activations of training passes (`PreventiveSteering`), from its first step
            or once `engage` is called. The one thing that changes how the model is trained.
        pushes: read from the training step's own backward how far every row pushes every persona (`LivePush`). A
            number, as 0.01, leaves out steps so that it costs about this share of the training's own time.
        derived_from: fingerprint of the checkpoint that the model was fine-tuned from before this run, where the
            personas were extracted from that.
        strict: raise what fails instead of journalling it; for tests.

    Raises:
        InputError: a setting is not usable.
        PathMissingError: a persona file does not exist.
    """

    def __init__(
        self,
        output_dir: Path | str = "runs/tracked",
        *,
        personas: Sequence[PersonaVector | Path | str] | None = None,
        probe_prompts: PromptSet | Sequence[str] | Path | None = None,
        canaries: Sequence[Canary] | None = None,
        schedule: Schedule | str = "every 50",
        detectors: Sequence[Detector] | None = None,
        rules: RuleSet | Path | str | None = None,
        bank: NullBank | Path | str | None = None,
        sinks: Sequence[Sink] | None = None,
        on_alert: Sequence[str] = ("log",),
        probes: Sequence[Probe] = (),
        intervention: PreventiveSteering | None = None,
        pushes: bool | float = False,
        derived_from: str | None = None,
        strict: bool = False,
    ) -> None:
        actions = (on_alert,) if isinstance(on_alert, str) else tuple(on_alert)
        unknown = [action for action in actions if action not in ACTIONS]
        if unknown:
            raise InputError(f"Expected on_alert out of {', '.join(ACTIONS)}; got {unknown[0]!r}. Use one of these.")
        self.output_dir = Path(output_dir)
        self.wanted = Wanted.check(personas, probe_prompts, canaries, probes, derived_from, pushes=pushes)
        if rules is not None and detectors is not None:
            raise InputError("Expected rules or detectors, got both. Put the detectors into the rules.")
        self.on_alert = actions
        self.must_exit = False  # whether an alert asked the script to fail
        self.wanted_recovery: WantedRecovery | None = None  # what `train_with_recovery` is to do next
        self._engage_for = ""  # the alert for which the intervention is on when the next attempt starts
        self.rules = RuleSet.load(rules) if isinstance(rules, Path | str) else rules
        if intervention is None and "steer" in (self.rules.actions if self.rules else actions):
            raise InputError(_NO_INTERVENTION)
        self.bank = NullBank.load(bank) if isinstance(bank, Path | str) else bank
        judges = self._judges(detectors)
        told = self.rules.sinks() if self.rules else ()
        self._settings = SessionSettings(
            run_dir=self.output_dir,
            schedule=Schedule.parse(schedule),
            detectors=tuple(judges),
            sinks=(*((MlflowSink(),) if sinks is None else sinks), *told),
            strict=strict,
            score=None if self.bank is None else self.bank.score(),
            intervention=None if intervention is None else intervention.loaded(),
        )
        self._session: Session | None = None
        self._finalizer: weakref.finalize[..., Tracker] | None = None
        self._pending: list[Alert] = []
        self._asked_to_stop = False

    # -- the run ---------------------------------------------------------------------------------------------------

    def start(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        step: int = 0,
        config: Mapping[str, Any] | None = None,
        *,
        compiled: bool = False,
        optimizer: Any = None,
    ) -> None:
        """Training is about to take its first step, or its first after a resume.

        Args:
            model: the module that is trained, unwrapped, on its device. Must come before the first forward pass of
                a compiled model: what is compiled never notices hooks that come later.
            tokenizer: the run's; without one only weights, gradients and the training batch are watched.
            step: optimizer steps already done. 0 is a fresh start: what the folder holds of an earlier run is hidden.
            config: further settings to record, JSON values.
            compiled: the training step runs a compiled form of `model`. Its batches are then not read unless asked
                for: a hook splits the graph that is compiled, which costs time and may change how sums are rounded.
            optimizer: what updates the model, wrapped or not; pushes of rows are weighed by its state.

        Raises:
            InputError: a setting does not fit the model (a persona of another model, a prompt too long).
            JournalLockedError: another process records into this folder.
        """
        self.abandon()
        _end_earlier(self)
        references = References(self.output_dir / "reference", fresh=step == 0)
        model, compiled = getattr(model, "_orig_mod", model), compiled or hasattr(model, "_orig_mod")
        subject = Subject(model, tokenizer, step, references, compiled, optimizer)
        with undisturbed(model):
            plan = make_plan(self.wanted, subject, self.output_dir)
        for note in plan.notes:
            _log.warning("%s: %s", self.output_dir, note)
        session = Session(self._settings, model, step, self._config(plan, config))
        try:
            plan.write(self.output_dir)
            keep_personas(self.output_dir, plan.vectors)
            self._pending = session.begin(plan, subject)
            if self.bank is not None:
                self.bank.check(RunSeries.from_run(self.output_dir))
        except BaseException:
            session.abandon()
            raise
        self._session, self._asked_to_stop, self.wanted_recovery = session, False, None
        self._finalizer = weakref.finalize(self, session.abandon)
        if self._engage_for:
            self.engage(self._engage_for)
            self._engage_for = ""

    def begin_step(self) -> None:
        """Forward passes of a training step follow, until `end_step`."""
        if self._session is not None:
            self._session.begin_step()

    def before_update(self) -> None:
        """Gradients are complete and not yet used."""
        if self._session is not None:
            self._session.before_update()

    def end_step(self, step: int, logs: Mapping[str, Any] | None = None, *, last: bool = False) -> Decision:
        """An optimizer step is complete; measures if the schedule says so.

        Args:
            step: optimizer steps done, this one included.
            logs: the loop's own figures of this step (`loss`, `grad_norm`, …).
            last: no step follows: measure once more.

        Returns:
            what the loop is asked to do.
        """
        if self._session is None:
            return Decision()
        return self._decide(self._session.end_step(step, signals_from_logs(step, logs or {}), last=last))

    def logged(self, step: int, logs: Mapping[str, Any]) -> Decision:
        """The loop reported figures of a step that has ended before (`loss`, `eval_loss`, …)."""
        signals = signals_from_logs(step, logs)
        if self._session is None or not signals:
            return Decision()
        return self._decide(self._session.feed(signals))

    def save_state(self, step: int) -> None:
        """A checkpoint of this step is about to be saved: what probes have gathered so far is kept for a resume."""
        if self._session is not None:
            self._session.save_state(step)

    def checkpoint_saved(self, step: int, path: Path | str) -> None:
        """A checkpoint folder is complete on disk."""
        if self._session is not None:
            self._session.checkpoint_saved(step, Path(path))

    def failure(self, where: str, error: BaseException | str) -> None:
        """Counts and journals something that the caller caught."""
        if self._session is not None:
            self._session.pipeline.failure(where, self._session.step, error)

    def end(self, status: str | None = None) -> None:
        """Training is over: hooks come off, the report is written, what is left is sent.

        Args:
            status: `finished`, `failed` or `stopped`; by default `stopped` where an alert asked for it.
        """
        if self._session is not None and self._finalizer is not None:
            self._finalizer.detach()
            self._session.end(status or ("stopped" if self._asked_to_stop else "finished"))
        self._session = self._finalizer = None

    def abandon(self) -> None:
        """Ends a run that was never ended, as failed. Harmless where there is none."""
        if self._finalizer is not None:
            self._finalizer()
        self._session = self._finalizer = None

    def engage(self, reason: str = "asked") -> None:
        """Switches the intervention on from the next training pass; kept over a resume. Harmless when it is on.

        Args:
            reason: for the record, such as the alert that asked for it.

        Raises:
            InputError: the tracker was given no intervention, or is not tracking.
        """
        session, running = self._intervened()
        running.engage(session.step, reason)

    def engage_at_start(self, reason: str) -> None:
        """Has the intervention switched on when the next attempt at the run starts.

        Raises:
            InputError: the tracker was given no intervention.
        """
        if self._settings.intervention is None:
            raise InputError(_NO_INTERVENTION)
        self._engage_for = reason

    def _steer(self, alert: Alert) -> None:
        try:
            self.engage(alert.id)
        except InputError as error:
            self.failure("action steer", error)

    def release(self, reason: str = "asked") -> None:
        """Switches the intervention off; arguments and errors as `engage`."""
        session, running = self._intervened()
        running.release(session.step, reason)

    @property
    def intervention(self) -> RunningSteering | None:
        """What is done to training passes now; None where nothing was asked for, or nothing is tracked."""
        return None if self._session is None else self._session.intervention

    def _intervened(self) -> tuple[Session, RunningSteering]:
        if self._session is None or self._session.intervention is None:
            raise InputError(_NO_INTERVENTION)
        return self._session, self._session.intervention

    def may_decide(self, step: int) -> bool:
        """Whether `end_step` at this step can ask for anything; the same answer in every process of a training."""
        schedules = [self._settings.schedule, *(probe.schedule for probe in self.wanted.probes), *STANDARD_SCHEDULES]
        return any(schedule is not None and schedule.due(step) for schedule in schedules)

    def pushes(self, trait: str, *, last: int = 200, keep: int = 50) -> tuple[AttributionRow, ...]:
        """The rows that pushed the model towards a trait in the last steps, strongest first; at any moment of the run.

        Needs `pushes=True`. Scores are gaps; positive is towards the trait. `live_attribution` says more.

        Args:
            trait: a watched trait, or a query's whole name.
            last: how many steps back.
            keep: how many rows at either end.

        Raises:
            PathMissingError: no pushes are recorded.
            InputError: the trait is not watched.
        """
        if self._session is not None:
            self._session.save_readings()
        return ranked_pushes(self.output_dir, trait, last=last, keep=keep)

    @property
    def intervenes(self) -> bool:
        """Whether an alert asks the training loop for anything."""
        return bool(
            {"save", "stop", "rollback", "drop"} & (self.rules.actions if self.rules else frozenset(self.on_alert))
        )

    @property
    def strict(self) -> bool:
        """Whether what fails is raised."""
        return self._settings.strict

    @property
    def active(self) -> bool:
        """Whether a run is being tracked."""
        return self._session is not None

    @property
    def health(self) -> Health | None:
        """Whether anything failed so far; None where no run is being tracked."""
        return None if self._session is None else self._session.pipeline.health

    def _decide(self, alerts: Sequence[Alert]) -> Decision:
        alerts, self._pending = [*self._pending, *alerts], []
        if not alerts:
            return Decision()
        asked: set[str] = set()
        for alert in alerts:
            actions = requested_actions(alert, self.on_alert)
            asked |= set(actions)
            self.must_exit |= "exit" in actions
            if self.wanted_recovery is None and {"rollback", "drop"} & set(actions):
                self.wanted_recovery = WantedRecovery(alert, frozenset(actions))
            elif "steer" in actions:
                self._steer(alert)
            if "log" in actions:
                _log.warning("%s", describe(alert))
        decision = Decision(save="save" in asked, stop=bool(asked & {"stop", "rollback", "drop"}))
        self._asked_to_stop |= decision.stop
        return decision

    def _judges(self, detectors: Sequence[Detector] | None) -> Sequence[Detector]:
        if self.rules is not None:
            return self.rules.detectors()
        if detectors is not None:
            return detectors
        return default_detectors() if self.bank is None else calibrated_detectors(self.bank)

    def _config(self, plan: Plan, config: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            **(config or {}),
            "on_alert": list(self.on_alert),
            "rules": self.rules.to_json() if self.rules else None,
            "schedule": str(self._settings.schedule),
            "detectors": [str(getattr(one, "rule", type(one).__name__)) for one in self._settings.detectors],
            "probes": [probe.name for probe in plan.probes],
            **({} if self._settings.intervention is None else {"intervention": self._settings.intervention.settings()}),
            "personas": [f"{vector.trait} {vector.site} {vector.digest[:12]}" for vector in plan.vectors],
            "notes": list(plan.notes),
        }


_ACTIVE: weakref.WeakValueDictionary[Path, Tracker] = weakref.WeakValueDictionary()


def _end_earlier(tracker: Tracker) -> None:
    """A run that crashed in this process and is started again, as in a notebook, ends before it goes on."""
    folder = tracker.output_dir.resolve()
    earlier = _ACTIVE.get(folder)
    if earlier is not None and earlier is not tracker:
        earlier.abandon()
    _ACTIVE[folder] = tracker


def describe(alert: Alert) -> str:
    """An alert in one line."""
    interval = "" if alert.low is None else f" (at least {alert.low:.3g})"
    return (
        f"ALERT at step {alert.step}: {alert.signal} is {alert.value:.3g} {alert.unit}{interval}, above "
        f"{alert.threshold:g} since step {alert.since} [{alert.rule}]"
    )
