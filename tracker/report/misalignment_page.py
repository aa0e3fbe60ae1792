"""What does a person see of an evaluation of misalignment?"""

from pathlib import Path
from diffing.misalignment.result import MisalignmentResult


def write_misalignment_report(result: MisalignmentResult, folder: Path) -> Path:
    """Not yet."""
    return folder / "misalignment.html"
