"""What is the training loop asked to do?"""

from __future__ import annotations

from dataclasses import dataclass

ACTIONS = ("log", "save", "stop", "exit")
EXIT_CODE = 3  # of a training script that an alert asked to fail


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
