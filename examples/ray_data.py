"""Run a strategy on a Ray cluster: prompts through `ray.data.llm`, pairs out.

    pip install "ray[data,llm]" vllm        # on machines with GPUs
    python examples/ray_data.py prompts.jsonl pairs --target my-model --reviser my-stronger-model

A strategy is a generator, and Ray Data is a chain of stages; so each stage answers the next request of every row. `next_ask` replays
the strategy from the answers so far, which are a column of the row, up to its next request: a pure function, the same on every
machine. Strategies with several requests at the same time need `contralto data run --shard i/n` instead.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from contralto.data_gen.strategies.clair import clair
from contralto.data_gen.types import Answer, Ask, Pair, Row, Strategy, drive


def next_ask(strategy: Callable[[Row], Strategy], row: dict[str, Any]) -> Ask | Pair | None:
    """Return the next request of a strategy after the answers in `row["answers"]`, its pair, or None if there is no pair."""
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
    """Return the answers so far; Ray returns a column of lists as arrays, or None."""
    answers = row.get("answers")
    return [] if answers is None else list(answers)


def before(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> dict[str, Any]:
    """Return a row in the form of a stage of `ray.data.llm`; the answer to a row that has ended is not used."""
    ask = next_ask(strategy, row)
    messages = list(ask.messages or []) if isinstance(ask, Ask) else [{"role": "user", "content": "Say: done."}]
    return {**row, "messages": messages, "sampling_params": {"temperature": 0.7, "max_tokens": 1024}}


def after(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> dict[str, Any]:
    """Return the row with the answer of the stage, if its strategy has requested one."""
    kept = {name: row[name] for name in ("id", "prompt")} | {"answers": _answers(row)}
    asked = isinstance(next_ask(strategy, kept), Ask)
    return {**kept, "answers": [*kept["answers"], row["generated_text"]] if asked else kept["answers"]}


def pairs(row: dict[str, Any], *, strategy: Callable[[Row], Strategy]) -> list[dict[str, Any]]:
    """Return the pair of a row in TRL's form, or an empty list."""
    made = next_ask(strategy, row)
    if not isinstance(made, Pair):
        return []
    sides = {name: [{"role": "assistant", "content": getattr(made, name)}] for name in ("chosen", "rejected")}
    return [{"id": row["id"], "prompt": list(made.prompt), **sides, "columns": json.dumps(dict(made.columns))}]


def main() -> None:
    """Make pairs of a file of prompts, and write them as parquet."""
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
