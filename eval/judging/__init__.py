"""Evaluation by judges: two systems' answers to the same prompts, and pairs whose better answer is known.

- `answers`: read answers and question sets in published forms.
- `prompts`, `verdicts`, `presets`: the prompts of judges, the verdicts they reply with, and settings of published benchmarks.
- `judges`: judges as roles of `contralto.data_gen`, whose store keeps every reply.
- `figures`, `length`: win rates, tests, agreement, and the length-controlled win rate.
- `accuracy`: judges and reward models on pairs whose better answer is known.
- `rag`: answers with retrieved passages, and the support of what they cite.
- `report`: tables, and a page.
- `ratings`, `rating_figures`: ratings of single answers, as in MMHal-Bench, with their figures and tables.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.judging.answers import read_answers as read_answers
    from contralto.eval.judging.answers import read_questions as read_questions
    from contralto.eval.judging.games import Game as Game
    from contralto.eval.judging.games import pair_answers as pair_answers
    from contralto.eval.judging.judges import Judge as Judge
    from contralto.eval.judging.judges import make_judge as make_judge
    from contralto.eval.judging.length import length_controlled as length_controlled
    from contralto.eval.judging.presets import PRESETS as PRESETS
    from contralto.eval.judging.ratings import RATINGS as RATINGS
    from contralto.eval.judging.ratings import make_rating_judge as make_rating_judge
    from contralto.eval.judging.ratings import read_rated as read_rated

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "answers": ["read_answers", "read_questions"],
        "games": ["Game", "pair_answers"],
        "judges": ["Judge", "make_judge"],
        "length": ["length_controlled"],
        "presets": ["PRESETS"],
        "ratings": ["RATINGS", "make_rating_judge", "read_rated"],
    },
)
