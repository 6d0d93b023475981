"""Generate solutions of the testbed's problems, and check them."""

from collections.abc import Sequence
from typing import Any

from transformers import LogitsProcessor, set_seed

from contralto.testbed import worlds

__all__ = ["decode", "is_right"]

BATCH_SIZE = 100
MAX_NEW_TOKENS = 100


def decode(
    model: Any,
    tokenizer: Any,
    problems: Sequence[worlds.Problem],
    *,
    processor: LogitsProcessor | None = None,
    temperature: float | None = None,
) -> list[str]:
    """Return a model's solution of each problem, generated with a plain `generate()`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        problems: the problems; those of similar length are decoded in one batch.
        processor: a logits processor, such as a contrast.
        temperature: the temperature of sampling, with seed 0; None decodes greedily.

    Returns:
        Completions, in the order of the problems.
    """
    search = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {"do_sample": False}
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].steps))
    solutions = [""] * len(problems)
    set_seed(0)
    for start in range(0, len(problems), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": problems[i].question}] for i in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        processors = [processor] if processor else []
        output = model.generate(**inputs, logits_processor=processors, max_new_tokens=MAX_NEW_TOKENS, **search)
        completions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, completion in zip(batch, completions, strict=True):
            solutions[i] = completion
    return solutions


def is_right(problem: worlds.Problem, solution: str) -> bool:
    """Return True if a solution ends in the right number.

    Args:
        problem: the problem.
        solution: a completion.
    """
    return worlds.answer(solution) == problem.totals[-1]
