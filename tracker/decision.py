"""What is the training loop asked to do?"""

from __future__ import annotations

from dataclasses import dataclass

from tracker.signals import Alert

# `rollback` and `drop` stop the training; `train_with_recovery` goes on from there.
ACTIONS = ("log", "save", "stop", "exit", "steer", "rollback", "drop")
EXIT_CODE = 3  # of a training script that an alert asked to fail


@dataclass(frozen=True)
class WantedRecovery:
    """What an alert asked for that a stopped training has to do before it goes on.

    Attributes:
        alert: the first that asked.
        actions: `rollback` or `drop`, and `steer` where that was asked as well.
    """

    alert: Alert
    actions: frozenset[str]


@dataclass(frozen=True)
class Decision:
    """What the training loop is asked to do after a step.

    Attributes:
        save: save a checkpoint now.
        stop: take no further step.
    """

    save: bool = False
    stop: bool = False

    def __or__(self, other: Decision) -> Decision:
        return Decision(self.save or other.save, self.stop or other.stop)
