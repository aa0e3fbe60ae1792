"""How well does an answer score by a rubric, who says so, and how far is that to be believed?"""

from diffing.judging.judge import Exchange as Exchange
from diffing.judging.judge import Judge as Judge
from diffing.judging.judge import Option as Option
from diffing.judging.judge import Reason as Reason
from diffing.judging.judge import Rubric as Rubric
from diffing.judging.judge import Score as Score
