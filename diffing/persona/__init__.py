"""Towards whom did the model move? Persona vectors: fit, keep, project.

Reading order: a `Trait` says how a model is asked, an `Elicitation` asks it and makes an `Extraction`; or
`extract_persona` fits a `PersonaVector` on answers that are given. `project` reads any texts on it, and `paired_shift`
compares two checkpoints on the same texts.
"""

from diffing.persona.budget import solve_strength
from diffing.persona.elicit_plan import ElicitSettings
from diffing.persona.elicited import Elicitation
from diffing.persona.extract import extract_persona, extract_personas
from diffing.persona.extraction import Extraction
from diffing.persona.linear_probe import LinearProbe
from diffing.persona.monitor import PersonaMonitor
from diffing.persona.probe_training import train_probe
from diffing.persona.project import PairedShift, Projection, paired_shift, project
from diffing.persona.screen import ScreenSettings, screen_rows
from diffing.persona.screen_choice import choose_rows
from diffing.persona.separation import Separation
from diffing.persona.steering import PersonaSteering, steered_answers
from diffing.persona.traits import Canary, Contrast, Instruction, Trait, load_trait, shipped_traits
from diffing.persona.vector import PersonaVector

__all__ = [
    "Canary",
    "Contrast",
    "ElicitSettings",
    "Elicitation",
    "Extraction",
    "Instruction",
    "LinearProbe",
    "PairedShift",
    "PersonaMonitor",
    "PersonaSteering",
    "PersonaVector",
    "Projection",
    "ScreenSettings",
    "Separation",
    "Trait",
    "choose_rows",
    "extract_persona",
    "extract_personas",
    "load_trait",
    "paired_shift",
    "project",
    "screen_rows",
    "shipped_traits",
    "solve_strength",
    "steered_answers",
    "train_probe",
]
