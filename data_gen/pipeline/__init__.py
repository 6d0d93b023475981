"""The pipeline: run strategies on rows, answer their requests, record the answers, and return the results.

`run` drives thousands of strategies at the same time. Each engine works in a thread of its own; the calling thread alone uses
the store and the strategies: it records outcomes, then sends them on. So every answer that a strategy has seen is on disk.

The data set is a function of the rows and the recorded answers: `replay` drives every strategy again, in the order of the rows,
without requests. An interrupted run that was resumed has the same answers as one that was not, so it has the same pairs, byte
for byte. Engines that compute batches need care for that: the last bits of a model's logits depend on the batch. Rows are
therefore driven in groups of fixed members, in step; the requests of a step make a round, which is always cut into the same
batches, and a batch is recorded whole. So a resumed run computes each batch with the members that it would have had.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.data_gen.pipeline.cluster import run_on_ray as run_on_ray
    from contralto.data_gen.pipeline.costs import Estimate as Estimate
    from contralto.data_gen.pipeline.costs import estimate as estimate
    from contralto.data_gen.pipeline.rows import Result as Result
    from contralto.data_gen.pipeline.rows import check as check
    from contralto.data_gen.pipeline.rows import pending as pending
    from contralto.data_gen.pipeline.rows import replay as replay
    from contralto.data_gen.pipeline.rows import shard_of as shard_of
    from contralto.data_gen.pipeline.runner import locked as locked
    from contralto.data_gen.pipeline.runner import run as run
    from contralto.data_gen.pipeline.shards import collect as collect

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "cluster": ["run_on_ray"],
        "costs": ["Estimate", "estimate"],
        "rows": ["Result", "check", "pending", "replay", "shard_of"],
        "runner": ["locked", "run"],
        "shards": ["collect"],
    },
)
