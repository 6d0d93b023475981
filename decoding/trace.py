"""Trace the effect of a contrast on a completion: the candidates and the excluded tokens at each step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from contralto.common.placement import input_device
from contralto.decoding.executors.score import main_prompts

if TYPE_CHECKING:
    from contralto.decoding.processors import ContrastiveLogitsProcessor

__all__ = ["Candidate", "RuledOut", "Step", "trace"]


class Candidate(NamedTuple):
    """A token and its probability."""

    token: int
    probability: float


class RuledOut(NamedTuple):
    """The tokens that the plausibility constraint excludes at a step."""

    tokens: int
    probability: float
    """Their total probability under the main branch."""
    likeliest: tuple[Candidate, ...]


class Step(NamedTuple):
    """One generated token and the likeliest candidates of each distribution at its position."""

    token: int
    main: tuple[Candidate, ...]
    contrasts: tuple[tuple[Candidate, ...], ...]
    """The candidates of every other branch."""
    combined: tuple[Candidate, ...]
    log_p: tuple[float, ...]
    """Log-probability of the token under the main branch, every other branch, and the method."""
    ruled_out: RuledOut

    @property
    def contrast(self) -> tuple[Candidate, ...]:
        """Return the candidates of the first other branch."""
        return self.contrasts[0]

    @property
    def changed(self) -> bool:
        """Return whether the token differs from the main branch's likeliest."""
        return self.token != self.main[0].token

    @property
    def ratio(self) -> float:
        """Return `log p_main - log p_contrast` of the token for the first two branches, in nats."""
        return self.log_p[0] - self.log_p[1]


@torch.no_grad()
def trace(
    method: "ContrastiveLogitsProcessor", model: Any, inputs: Mapping[str, Any], generated: Tensor, *, top: int = 4
) -> list[Step]:
    """Return the steps of a finished completion, from one forward pass of each branch.

    Args:
        method: a processor of `processors`, made for this prompt.
        model: the main model.
        inputs: one prompt as its tokenizer or processor returns it; for an encoder-decoder the source text.
        generated: `(S,)` int64, the tokens after the prompt, of any origin.
        top: number of candidates to keep per step.

    Returns:
        One step per token. For a branch of several layers (DoLa), a step holds the layer that the rule selects.

    Raises:
        ValueError: several prompts, or no tokens.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> tokenizer, contrast = testbed.tokenizer(), ContrastiveDecodingLogitsProcessor(testbed.load("amateur"))
        >>> prompt, text = tokenizer("Ben went to", return_tensors="pt"), tokenizer("the barn.", add_special_tokens=False)
        >>> steps = trace(contrast, testbed.load("expert"), prompt, torch.tensor(text["input_ids"]))
        >>> [tokenizer.decode([step.token]) for step in steps]
        ['the', 'barn', '.']
    """
    method.check_model(model)
    prompts = main_prompts(model, inputs, 1)
    if len(prompts.ids) != 1 or generated.ndim != 1 or not len(generated):
        raise ValueError(
            f"trace needs a single prompt and its completion, not {len(prompts.ids)} prompts and completions of "
            f"shape {tuple(generated.shape)}"
        )
    device, count = input_device(model), len(generated)
    rows = torch.cat([prompts.ids.to(device), generated.to(device)[None]], dim=1)
    mask = torch.nn.functional.pad(prompts.mask.to(device), (0, count), value=1)
    main = prompts.branch.score(rows, count, mask)[0].float()
    contrasts = [branch.score(rows, count, mask)[0] for branch in method.branches]
    steps = torch.arange(count, device=device)[:, None]
    scores = method.combine(main, contrasts, steps, place=lambda at, *_: f"for token {at + 1} of the text")
    contrasts = method.fit(main, contrasts)
    contrasts = [c if c.ndim == 2 else _chosen_layer(main, c, scores) for c in contrasts]
    return _steps(rows[0, -count:], [branch.log_softmax(-1) for branch in (main, *contrasts, scores)], top)


def _chosen_layer(main: Tensor, layers: Tensor, scores: Tensor) -> Tensor:
    """Select the layer `(S, V)` of `(S, L, V)` whose log-ratio with the main branch equals the scores."""
    ratios = main.log_softmax(-1)[:, None] - layers.log_softmax(-1)
    distances = (ratios - scores[:, None]).where(scores[:, None] > -torch.inf, 0.0).abs().amax(-1)
    return layers[torch.arange(len(layers), device=layers.device), distances.argmin(-1)]


def _steps(tokens: Tensor, log_p: list[Tensor], top: int) -> list[Step]:
    """Return the steps from the log-probabilities `(S, V)` of all branches and, last, of the method."""
    main, combined = log_p[0], log_p[-1]
    masked = combined == -torch.inf
    outside = main.where(masked, -torch.inf).exp()
    ruled_out = map(RuledOut, masked.sum(-1).tolist(), outside.sum(-1).tolist(), _top(outside, top))
    chosen = torch.stack([each.gather(-1, tokens[:, None])[:, 0] for each in log_p], dim=-1).tolist()
    tops = [_top(each.exp(), top) for each in log_p]
    contrasts = list(zip(*tops[1:-1], strict=True))
    columns = (tokens.tolist(), tops[0], contrasts, tops[-1], map(tuple, chosen), ruled_out)
    return [Step(*step) for step in zip(*columns, strict=True)]


def _top(probabilities: Tensor, count: int) -> list[tuple[Candidate, ...]]:
    """Return the likeliest tokens of every row, without impossible ones."""
    best = probabilities.topk(min(count, probabilities.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(Candidate(t, p) for t, p in zip(*row, strict=True) if p > 0) for row in rows]
