"""Does this series mean that someone should know? A detector is a deterministic function of the measurements."""

from __future__ import annotations

from tracker.detectors.contract import Detector
from tracker.detectors.e_detector import EDetector
from tracker.detectors.e_family import EFamily
from tracker.detectors.effect_floor import EffectFloor
from tracker.detectors.max_over_run import MaxOverRun
from tracker.detectors.non_finite import NonFinite

__all__ = ["Detector", "EDetector", "EFamily", "EffectFloor", "MaxOverRun", "NonFinite"]
