"""How is a Hugging Face Trainer tracked? By translation only: its events become the tracker's calls."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from diffing.errors import InputError, PalimpsestError
from tracker.checkpoint_folder import find_checkpoint, why_incomplete
from tracker.core import Tracker
from tracker.decision import EXIT_CODE, Decision
from tracker.processes import agree, n_processes

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def _never_raises(
    event: Callable[Concatenate[CheckpointTracker, _P], None],
) -> Callable[Concatenate[CheckpointTracker, _P], None]:
    """An exception in a callback would end the training; it is journalled instead."""

    @functools.wraps(event)
    def guarded(self: CheckpointTracker, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            if self.tracker.strict:
                raise
            self._failed(event.__name__, error)

    return guarded


class CheckpointTracker(TrainerCallback):
    """Tracks a fine-tune: `Trainer(..., callbacks=[CheckpointTracker(output_dir="runs/tracked")])`.

    Takes the settings of `Tracker`. With none but an output folder it watches the shipped traits, canaries, weights
    and gradients. The trained weights are the same, bit for bit, as without it.

    A resumed training goes on in the same folder: what was measured after the checkpoint is hidden, and the series
    reads as if nothing had happened. Its state is its own folder, never the Trainer's: it can be added to a training
    that is resumed, and left out of one. Several in one Trainer need a folder each. Trials of a hyperparameter search
    get `trial-0`, `trial-1`, … inside the folder.

    Only the first process of a distributed training measures and records; when an alert asks to save or stop, all
    processes are told. Sharded models (FSDP, DeepSpeed ZeRO-3, tensor parallelism) are not measured, and a line at the
    start says so.

    Args:
        output_dir: the run directory; not the Trainer's own, though it may lie inside that.
        settings: as for `Tracker`.

    Raises:
        InputError: a setting is not usable.
    """

    def __init__(self, output_dir: Path | str = "runs/tracked", **settings: Any) -> None:
        self._output_dir = Path(output_dir)
        self._settings = settings
        self.tracker = Tracker(self._output_dir, **settings)
        self._state: TrainerState | None = None
        self._trials = 0
        self._kept: set[int] = set()
        self._saved: set[int] = set()
        self._held = Decision()

    # -- start and end -------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Binds the tracker to the model; what cannot work raises here, in the first second.

        Raises:
            InputError: a setting does not fit the model.
            JournalError: the folder cannot be recorded into.
        """
        self.tracker.abandon()
        self._state, self._kept, self._saved, self._held = state, set(), set(), Decision()
        if not state.is_world_process_zero:
            return
        if state.is_hyper_param_search:
            self.tracker = Tracker(self._output_dir / f"trial-{self._trials}", **self._settings)
            self._trials += 1
        _claim(self)
        config = {**_trainer_settings(args), "max_steps": state.max_steps, "processes": args.world_size}
        try:
            self.tracker.start(
                kwargs["model"],
                _tokenizer(kwargs.get("processing_class")),
                state.global_step,
                config,
                compiled=bool(args.torch_compile),
                optimizer=kwargs.get("optimizer"),
            )
        except PalimpsestError:
            raise
        except Exception:
            if self.tracker.strict:
                raise
            _log.exception("Tracking could not start and is off for this run; training goes on.")

    @_never_raises
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the run; a checkpoint that was saved without an event (on SIGTERM) is recorded first."""
        if getattr(args, "enable_jit_checkpoint", False):
            for step in sorted({state.global_step - 1, state.global_step} - self._saved):
                self._record_checkpoint(args, step, expected=False)
        self.tracker.end()
        if self.tracker.must_exit:
            _log.error("An alert asked this script to fail: palimpsest alerts %s", self.tracker.output_dir)
            raise SystemExit(EXIT_CODE)

    # -- one step ------------------------------------------------------------------------------------------------

    @_never_raises
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The forward passes of a step follow."""
        self.tracker.begin_step()

    @_never_raises
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete, and clipped."""
        self.tracker.before_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Parameters are new: measures, and may ask to save or to stop."""
        self._measure(state)
        self._obey(args, state, control, now=self.tracker.may_decide(state.global_step) or _is_last(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer's own figures, TRL's included."""
        self._record_logs(state, kwargs.get("logs") or {})
        self._obey(args, state, control, now=True)

    @_never_raises
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint of this epoch may follow."""
        self._keep_state(state, control)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @_never_raises
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written; it counts when it is complete."""
        if self.tracker.active:
            if state.global_step not in self._kept:
                self.tracker.save_state(state.global_step)
            self._record_checkpoint(args, state.global_step)

    def _record_checkpoint(self, args: TrainingArguments, step: int, *, expected: bool = True) -> None:
        folder = find_checkpoint(Path(str(args.output_dir)), step)
        lacking = "there is no such folder" if folder is None else why_incomplete(folder)
        if lacking is None and folder is not None:
            self._saved.add(step)
            self.tracker.checkpoint_saved(step, folder.absolute())
        elif expected:
            self.tracker.failure("checkpoint", f"checkpoint-{step} is not complete and does not count: {lacking}")

    def _keep_state(self, state: TrainerState, control: TrainerControl) -> None:
        # Before the checkpoint is written: a kill in between must not leave a checkpoint without it.
        if control.should_save and state.global_step not in self._kept:
            self.tracker.save_state(state.global_step)
            self._kept.add(state.global_step)

    # -- decisions -----------------------------------------------------------------------------------------------

    @_never_raises
    def _measure(self, state: TrainerState) -> None:
        self._held |= self.tracker.end_step(state.global_step, last=_is_last(state))

    @_never_raises
    def _record_logs(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        self._held |= self.tracker.logged(state.global_step, logs)

    def _obey(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, now: bool) -> None:
        """Sets the Trainer's flags; all processes must set the same ones at the same step, or they wait for ever."""
        decision = self._held
        if n_processes() > 1:
            if not now or not self.tracker.intervenes:
                return
            decision = agree(decision, args.device)
        self._held = Decision()
        control.should_save |= decision.save
        control.should_training_stop |= decision.stop
        self._keep_unfailing(state, control)

    @_never_raises
    def _keep_unfailing(self, state: TrainerState, control: TrainerControl) -> None:
        self._keep_state(state, control)

    def _failed(self, event: str, error: Exception) -> None:
        self.tracker.failure(f"callback {event}", error)


_CLAIMED: weakref.WeakValueDictionary[Path, CheckpointTracker] = weakref.WeakValueDictionary()


def _claim(callback: CheckpointTracker) -> None:
    """Two callbacks of one training that write to one folder would each hide what the other measured."""
    folder = callback.tracker.output_dir.resolve()
    other = _CLAIMED.get(folder)
    if other is not None and other is not callback and other.tracker.active and other._state is callback._state:
        raise InputError(
            f"Expected a folder for each CheckpointTracker, got {folder} twice in one Trainer. "
            "Give each its own output_dir."
        )
    _CLAIMED[folder] = callback


def _is_last(state: TrainerState) -> bool:
    # Not where somebody asked to stop: the run may be resumed there, and would then have one point too many.
    return state.global_step >= state.max_steps


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer, also of a multimodal processor; None for what has none."""
    found = getattr(processing_class, "tokenizer", processing_class)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


_RECORDED = (
    *("output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "optim"),
    *("max_grad_norm", "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "bf16", "fp16", "activation_checkpointing", "torch_compile", "label_smoothing_factor"),
)


def _trainer_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings that decide what training does; no tokens, no machine."""
    found = {name: getattr(args, name, None) for name in _RECORDED}
    plain = {name: getattr(value, "value", value) for name, value in found.items() if value is not None}
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in plain.items()}
