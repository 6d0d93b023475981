"""The same strategy on a Ray cluster: a column of prompts through `ray.data.llm`, pairs out.

    pip install "ray[data,llm]" vllm        # on machines with GPUs
    python examples/ray_data.py prompts.jsonl pairs --target my-model --reviser my-stronger-model

A strategy is a generator, and Ray Data is a chain of stages; so each stage answers the next ask of every row. `next_ask` drives
the strategy from the answers so far, which travel with the row, until it wants to know something new: a pure function, the same
on every machine. Strategies that ask several things at once need `contralto data run --shard i/n` instead.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from contralto.data_gen.strategies.clair import clair
from contralto.data_gen.types import Answer, Ask, Pair, Row, Strategy, drive


def next_ask(strategy: Callable[[Row], Strategy], row: dict[str, Any]) -> Ask | Pair | None:
    """What a strategy wants to know next, given the answers in `row["answers"]`; or its pair; or None if there is none."""
    columns = {name: value for name, value in row.items() if name != "answers"}
    driven = drive(strategy({"images": (), **columns, "prompt": [{"role": "user", "content": row["prompt"]}]}))
    try:
        asks = next(driven)
        for text in _answers(row):
            asks = driven.send([Answer(text=text)])
    except StopIteration as end:
        [made] = end.value
        return made if isinstance(made, Pair) else None
    if len(asks) != 1:
        raise ValueError("this example answers one ask at a time: use contralto data run --shard i/n")
    return asks[0]


def _answers(row: dict[str, Any]) -> list[str]:
    """The answers so far; a column of lists comes back from Ray as arrays, or None."""
    said = row.get("answers")
    return [] if said is None else list(said)


def before(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> dict[str, Any]:
    """A row as a stage of `ray.data.llm` reads it. A row that has ended says nothing that matters."""
    ask = next_ask(strategy, row)
    messages = list(ask.messages or []) if isinstance(ask, Ask) else [{"role": "user", "content": "Say: done."}]
    return {**row, "messages": messages, "sampling_params": {"temperature": 0.7, "max_tokens": 1024}}


def after(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> dict[str, Any]:
    """The row with the stage's answer, if its strategy had asked."""
    kept = {name: row[name] for name in ("id", "prompt")} | {"answers": _answers(row)}
    asked = isinstance(next_ask(strategy, kept), Ask)
    return {**kept, "answers": [*kept["answers"], row["generated_text"]] if asked else kept["answers"]}


def pairs(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> list[dict[str, Any]]:
    """The pair of a row in TRL's form, or nothing."""
    made = next_ask(strategy, row)
    if not isinstance(made, Pair):
        return []
    said = {name: [{"role": "assistant", "content": getattr(made, name)}] for name in ("chosen", "rejected")}
    return [{"id": row["id"], "prompt": list(made.prompt), **said, "columns": json.dumps(dict(made.columns))}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="JSON lines with id and prompt")
    parser.add_argument("target_folder", help="where the pairs go, as parquet")
    parser.add_argument("--target", required=True, help="the model that answers")
    parser.add_argument("--reviser", required=True, help="the model that revises")
    parser.add_argument("--workers", type=int, default=1, help="copies of each model")
    args = parser.parse_args()
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    strategy = partial(clair)
    rows = ray.data.read_json(args.source, lines=True)
    for model in (args.target, args.reviser):
        config = vLLMEngineProcessorConfig(model_source=model, concurrency=args.workers)
        stage = build_processor(
            config, preprocess=partial(before, strategy=strategy), postprocess=partial(after, strategy=strategy)
        )
        rows = stage(rows)
    rows.flat_map(partial(pairs, strategy=strategy)).write_parquet(args.target_folder)


if __name__ == "__main__":
    main()
