"""Preference pairs by contrast: recipes, strategies, engines and a store of answers.

`types` holds the types that strategies and engines exchange. A strategy (`strategies`) makes pairs of a row from answers to its
requests; an engine (`engines`) answers them; `store` keeps every answer on disk before it is used. A recipe (`recipe`) names all
of them in YAML, and `pipeline` runs it. `checks` writes columns about pairs and filters by them, `export` writes the data set
and `card` its card. `dataset` reads published preference data.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.data_gen.candidate_rows import load_candidates as load_candidates
    from contralto.data_gen.dataset import load_pairs as load_pairs
    from contralto.data_gen.dataset import stream_pairs as stream_pairs
    from contralto.data_gen.dataset import to_dataset as to_dataset
    from contralto.data_gen.scorers import RewardModel as RewardModel
    from contralto.data_gen.scorers import chrf as chrf
    from contralto.data_gen.types import Answer as Answer
    from contralto.data_gen.types import Ask as Ask
    from contralto.data_gen.types import Failure as Failure
    from contralto.data_gen.types import Labelled as Labelled
    from contralto.data_gen.types import Pair as Pair
    from contralto.data_gen.types import Rejected as Rejected
    from contralto.data_gen.types import Request as Request
    from contralto.data_gen.types import Row as Row
    from contralto.data_gen.types import Sampling as Sampling
    from contralto.data_gen.types import Strategy as Strategy
    from contralto.data_gen.unpaired_rows import load_unpaired as load_unpaired
    from contralto.data_gen.unpaired_rows import stream_unpaired as stream_unpaired

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "candidate_rows": ["load_candidates"],
        "dataset": ["load_pairs", "stream_pairs", "to_dataset"],
        "scorers": ["RewardModel", "chrf"],
        "types": ["Answer", "Ask", "Failure", "Labelled", "Pair", "Rejected", "Request", "Row", "Sampling", "Strategy"],
        "unpaired_rows": ["load_unpaired", "stream_unpaired"],
    },
)
