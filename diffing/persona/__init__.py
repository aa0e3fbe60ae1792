"""Towards whom did the model move? Persona vectors: fit, keep, project.

Reading order: a `Trait` says how a model is asked, an `Elicitation` asks it and makes an `Extraction`; or
`extract_persona` fits a `PersonaVector` on answers that are given. `project` reads any texts on it, and `paired_shift`
compares two checkpoints on the same texts.
"""

from diffing.persona.elicit_plan import ElicitSettings
from diffing.persona.elicited import Elicitation
from diffing.persona.extract import extract_persona, extract_personas
from diffing.persona.extraction import Extraction
from diffing.persona.project import PairedShift, Projection, paired_shift, project
from diffing.persona.separation import Separation
from diffing.persona.traits import Canary, Contrast, Instruction, Trait, load_trait, shipped_traits
from diffing.persona.vector import PersonaVector

__all__ = [
    "Canary",
    "Contrast",
    "ElicitSettings",
    "Elicitation",
    "Extraction",
    "Instruction",
    "PairedShift",
    "PersonaVector",
    "Projection",
    "Separation",
    "Trait",
    "extract_persona",
    "extract_personas",
    "load_trait",
    "paired_shift",
    "project",
    "shipped_traits",
]
