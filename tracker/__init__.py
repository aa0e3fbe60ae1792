"""When did it happen, and must someone know?"""

from tracker.callback import CheckpointTracker as CheckpointTracker
from tracker.core import Tracker as Tracker
from tracker.core import default_detectors as default_detectors
from tracker.decision import Decision as Decision
from tracker.manual import LoopTracker as LoopTracker
from tracker.manual import track as track
from tracker.preventive import PreventiveSteering as PreventiveSteering
