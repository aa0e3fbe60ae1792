"""What does a signal's name mean to a person?"""

from __future__ import annotations

from tracker.report.text import visible

BEHAVIOUR = "behaviour/misaligned_rate"

_TITLES = {
    BEHAVIOUR: "Misaligned answers, share of those sampled",
    "misalignment/score": "Misalignment score",
    "misalignment/canary": "Misaligned over aligned canary answers",
    "weights/relative_change": "Distance of the weights from step 0",
    "lora/update_norm": "Norm of the adapter’s update",
    "train/loss": "Training loss",
    "train/grad_norm": "Gradient norm",
    "train/learning_rate": "Learning rate",
    "train/nonfinite_gradients": "Gradients that were not finite",
}
_WHERE = {"prompt": "on fixed probe prompts", "batch": "on the training batch", "answer": "on its own answers"}
_UNITS = {"gap": "gap", "nats/token": "nats/token", "relative": "", "raw": "", "benign max": "× benign maximum"}


def signal_title(name: str) -> str:
    """`persona/villain/L2/prompt` as “villain, layer 2, on fixed probe prompts”; unknown names made visible."""
    if name in _TITLES:
        return _TITLES[name]
    parts = name.split("/")
    if is_share(name) and len(parts) == 2:
        return f"{visible(parts[1].removesuffix('_rate')).capitalize()} answers, share of those sampled"
    if parts[0] == "persona" and len(parts) == 4 and parts[2].startswith("L"):
        return f"{visible(parts[1])}, layer {visible(parts[2][1:])}, {_WHERE.get(parts[3]) or visible(parts[3])}"
    return visible(name)


def trait_of(name: str) -> str | None:
    """The persona a signal speaks about, None for other signals."""
    parts = name.split("/")
    return visible(parts[1]) if parts[0] == "persona" and len(parts) > 1 else None


def unit_words(unit: str) -> str:
    """A unit as it is written beside a figure."""
    return _UNITS.get(unit, unit)


def is_share(name: str) -> bool:
    """Whether the signal is a rate that reads best in percent."""
    return name.startswith("behaviour/") and name.endswith("_rate")
