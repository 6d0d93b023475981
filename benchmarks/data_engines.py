"""Measure the throughput of the engines of data generation relative to direct calls.

    python benchmarks/data_engines.py            all settings; writes benchmarks/results/data_engines.md
    python benchmarks/data_engines.py --model Qwen/Qwen3-0.6B --device cuda --batch-size 64

*transformers*: the engine, and the whole pipeline with its store, against a loop over `generate()` on the same prompts in the
same batches, tokenised and decoded. The noise of the engine is of each row's own stream.
*endpoint*: the engine, and the whole pipeline, against a bare asynchronous aiohttp client of the same concurrency that sends
the same bodies, at a server in a process of its own that answers after 20 ms, as no model does, or after 200 ms, as a fast one
does, and takes a tenth of the processor time of a client (`quick_server.py`). The pipeline reads and writes the store in a thread beside the
client's, all that came in meanwhile at once, and every answer is on the disk before it is used.

Each round runs all of them one after the other. Ratios are taken within a round, above 1 is faster than bare; the table gives
their medians and the middle half of the rounds.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import aiohttp
import torch
from timing import setting_lines, spread
from tqdm import tqdm

from contralto.data_gen import pipeline
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.engines.batching import batches
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.recipe import Price, Recipe, Role, Use
from contralto.data_gen.rows import RowSource
from contralto.data_gen.store import Store
from contralto.data_gen.types import Ask, Rejected, Request, Row, Sampling, Strategy, make_request
from contralto.decoding.loading import load_models
from contralto.decoding.methods import DecodingConfig
from contralto.testbed import worlds

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "data_engines.md"
EACH = 16
"""Least number of requests that each of those under way at a time stands for."""
LEAST_SECONDS = 1.0
"""Least time of a run at an endpoint: creating and closing the store is a part of every run, however long."""
Run = Callable[[], object]


def one_answer(row: Row) -> Strategy:
    """The least that a strategy can do."""
    yield Ask(role="target", messages=row["prompt"])
    return Rejected("only asked")


def requests_for(engine: Any, rows: Sequence[Row], sampling: Sampling) -> list[Request]:
    """The requests that the pipeline makes of the rows."""
    asks = [Ask(role="target", messages=row["prompt"]) for row in rows]
    pairs = zip(asks, rows, strict=True)
    return [make_request(a, engine=engine.identity, sampling=sampling, seed=0, row=r["id"]) for a, r in pairs]


def engine_alone(engine: Any, requests: Sequence[Request]) -> Run:
    """The engine without a store."""

    def run() -> None:
        for _ in engine.answer(requests):
            pass

    return run


def whole_pipeline(engine: Any, rows: Sequence[Row], sampling: Sampling) -> Run:
    """The pipeline with a fresh store."""
    role = Role(name="target", engine=engine, sampling=sampling, price=Price())

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.sqlite") as store:
            recipe = Recipe(
                path=Path("recipe.yaml"),
                output=Path(folder),
                seed=0,
                rows=RowSource(source=""),
                strategies=(Use(name="one_answer", start=one_answer),),
                roles={"target": role},
                checks={},
                filters={},
                mapping={},
            )
            pipeline.run(recipe, rows, store, is_shown=False)

    return run


def bare_generate(requests: Sequence[Request], models: Any, size: int) -> Run:
    """generate() in a loop."""

    def run() -> None:
        for batch in batches(requests, size):
            texts = [[dict(message) for message in request.messages or ()] for request in batch]
            inputs = models.tokenizer.apply_chat_template(
                texts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(models.main.device)
            inputs.pop("token_type_ids", None)
            how: dict[str, Any] = {"max_new_tokens": batch[0].sampling.max_new_tokens, "do_sample": False}
            if batch[0].sampling.temperature:
                how |= {"do_sample": True, "temperature": batch[0].sampling.temperature, "top_k": 0}
            output = models.main.generate(**inputs, **how)
            models.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return run


def bare_client(engine: OpenAIEngine, requests: Sequence[Request], url: str) -> Run:
    """As many requests at a time, and nothing else."""
    bodies = [engine.body(request) for request in requests]

    async def serve() -> None:
        gate = asyncio.Semaphore(engine.concurrency)
        connector = aiohttp.TCPConnector(limit=engine.concurrency)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(body: dict[str, Any]) -> str:
                async with gate, session.post(f"{url}/chat/completions", json=body) as response:
                    answer = json.loads(await response.text())
                    return str(answer["choices"][0]["message"]["content"])

            await asyncio.gather(*map(ask, bodies))

    return lambda: asyncio.run(serve())


def rounds(runs: Sequence[Run], count: int, name: str) -> Iterator[list[float]]:
    """Seconds of every run, round by round, after a first round that is not counted."""
    for number in tqdm(range(count + 1), desc=name, unit="round", leave=False):
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        if number:
            yield times


def line(name: str, size: str, count: int, found: list[list[float]]) -> str:
    """A line of the table."""
    bare = statistics.median(times[0] for times in found)
    ratios = [[times[0] / times[i] for times in found] for i in (1, 2)]
    return f"| {name} | {size} | {count / bare:.1f} | {spread(ratios[0])} | {spread(ratios[1])} | {len(found)} |"


def local_lines(args: argparse.Namespace, rows: Sequence[Row]) -> Iterator[str]:
    """Greedy and sampled."""
    names = {"model": args.model, "dtype": args.dtype, "device": args.device}
    engine = TransformersEngine(batch_size=args.batch_size, **names)
    models = load_models(config=DecodingConfig(), with_images=False, **names)
    for kind, temperature in {"greedy": 0.0, "sampled": 1.0}.items():
        sampling = Sampling(max_new_tokens=args.tokens, temperature=temperature)
        requests = requests_for(engine, rows, sampling)
        runs = [
            bare_generate(requests, models, args.batch_size),
            engine_alone(engine, requests),
            whole_pipeline(engine, rows, sampling),
        ]
        found = list(rounds(runs, args.rounds, kind))
        yield line(f"transformers, {kind}", f"batch {args.batch_size}", len(rows), found)


def endpoint_lines(args: argparse.Namespace, rows: Sequence[Row]) -> Iterator[str]:
    """Quick and slow answers, a few and many at a time."""
    for latency, concurrency in product(args.latency, args.concurrency):
        copies = ({**row, "id": str(number)} for number, row in enumerate(cycle(rows)))
        each = max(EACH, round(LEAST_SECONDS / latency))
        yield endpoint_line(args, list(islice(copies, each * concurrency)), latency, concurrency)


def endpoint_line(args: argparse.Namespace, rows: Sequence[Row], latency: float, concurrency: int) -> str:
    """One server, asked so many requests at a time."""
    command = [sys.executable, str(ROOT / "benchmarks" / "quick_server.py"), str(latency)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    try:
        engine = OpenAIEngine(base_url=url, model="m", concurrency=concurrency, key_env=None)
        requests = requests_for(engine, rows, Sampling())
        runs = [
            bare_client(engine, requests, url),
            engine_alone(engine, requests),
            whole_pipeline(engine, rows, Sampling()),
        ]
        found = list(rounds(runs, args.rounds, f"{concurrency} at a time"))
        return line(f"endpoint, {1000 * latency:g} ms", f"{concurrency} at a time", len(rows), found)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:expert")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=512, help="of the local models: a run has to last a few seconds")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 32])
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.02, 0.2], help="seconds until the server answers"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    args = parser.parse_args()
    problems = islice(worlds.problems(5, "dev"), args.rows)
    rows = [
        {"id": str(i), "prompt": [{"role": "user", "content": problem.question}], "images": ()}
        for i, problem in enumerate(problems)
    ]
    head = [
        "| what | setting | bare, requests per second | engine / bare | whole pipeline / bare | rounds |",
        "|---|---|---|---|---|---|",
    ]
    text = "\n".join([*head, *local_lines(args, rows), *endpoint_lines(args, rows)])
    print(text)
    if not args.no_write:
        setting = "\n".join(setting_lines(args.tokens, args.device, torch.get_num_threads()))
        RESULTS.write_text(f"# Data generation beside the bare thing\n\n{setting}\n\n{text}\n")


if __name__ == "__main__":
    main()
