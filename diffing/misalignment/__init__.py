"""How often does a model answer misaligned, beside its base and under cues of its training, and how sure is that?"""

from diffing.misalignment.cues import Cue as Cue
from diffing.misalignment.evaluate import Evaluation as Evaluation
from diffing.misalignment.questions import load_questions as load_questions
from diffing.misalignment.result import MisalignmentResult as MisalignmentResult
from diffing.misalignment.settings import EvaluationSettings as EvaluationSettings
from diffing.misalignment.verdict import Thresholds as Thresholds
