"""Float64 references of a real model: forwards of whole unpadded rows, without a cache."""

import functools

import torch
from torch.nn.functional import cosine_similarity

from contralto.align.amateur import cut_model
from contralto.decoding.inputs import Prompt
from contralto.decoding.methods import METHODS
from contralto.decoding.methods.reference import load

ELSEWHERE = {
    ("critic", ""): "its model classifies tokens: tests/decoding/methods/test_critic_method.py",
    (
        "cd",
        "released",
    ): "its candidates are those of all beams, not of a row: tests/decoding/methods/test_released_beam.py",
}
"""Methods and forms whose references are not scores of a row under language models, with the tests that have them."""
TEXT_METHODS = [
    (name, form)
    for name, method in METHODS.items()
    if not method.reads_images
    for form in (method.forms or {"": None})
    if (name, form) not in ELSEWHERE
]
"""Every declared method that contrasts no images, with each of its forms, but for those of `ELSEWHERE`."""
FIRST_LAYERS = (6, 10)
"""Depths of the models of the other branches: the first layers of the main model."""


def sentences(count):
    """Return sentences of which no two are equal."""
    things = ("lamp", "ladder", "kettle", "map", "violin", "basket", "clock", "hammer", "mirror", "blanket")
    return " ".join(f"The {things[i % 10]} of room {i} costs {7 * i % 83 + 2} coins." for i in range(count))


CONTRAST = "Write about the weather in one sentence."
PROMPTS = {
    "chat": ["What is the capital of France?", "Give me three reasons to read books every day, in a short list."],
    "plain": ["The three primary colors are", "Water boils at a temperature of 100 degrees because the"],
    "long": [f"{sentences(140)} The lamp of room 10 costs"],
}


def prompts_of(kind, tokenizer):
    """Return the prompts of a kind, with a contrast prompt; that of 1,500 tokens is cut to this length."""
    contents = PROMPTS[kind]
    if kind == "long":
        ids = tokenizer(contents[0])["input_ids"]
        contents = [tokenizer.decode(ids[-1500:])]
    return [Prompt(content, contrast=CONTRAST) for content in contents]


class References:
    """A model, the first layers of it as other models, and their float64 copies.

    Args:
        model: the model in the dtype under test; the copies have its weights.
    """

    def __init__(self, model):
        import copy

        self.model = model
        self.others = [cut_model(model, range(depth)) for depth in FIRST_LAYERS]
        self.doubles = [copy.deepcopy(each).double() for each in (model, *self.others)]

    @functools.lru_cache(maxsize=256)  # noqa: B019 (as long as the tests)
    @torch.no_grad()
    def states(self, which, ids, last):
        """Return the hidden states `(L + 1, last, D)` of the last positions of a row; all pass the final norm."""
        model = self.doubles[which]
        found = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        return torch.stack([*(model.model.norm(each[0, -last:]) for each in found[:-1]), found[-1][0, -last:]])

    @torch.no_grad()
    def logits(self, which, ids, last, layers=(-1,)):
        """Return the logits `(last, V)` of the last positions, or `(last, len(layers), V)` of several layers."""
        states = self.states(which, ids, last)
        found = [self.doubles[which].lm_head(states[layer]) for layer in layers]
        return found[0] if len(layers) == 1 else torch.stack(found, 1)

    def scores(self, config, row, views, new, layers, *, masked=True):
        """Return the scores `(S, V)` of every new token of a row, which are read after the prompt of each branch.

        Args:
            config: the method.
            row: the ids of the prompt.
            views: the ids of the other prompts.
            new: the ids of the new tokens.
            layers: the candidate layers of a method that contrasts them.
            masked: whether to apply the plausibility constraint.
        """
        method, count, read = config.declaration, len(new), tuple(new[:-1])
        main = self.logits(0, row + read, count)
        if not method.contrasts:
            return main
        form = method.forms[config.form or ""]
        parameters = config.rule_parameters | ({} if masked or form.mask is None else {form.mask: 0.0})
        if form.stacked:
            return load(form.rule)(main, self.logits(0, row + read, count, layers), **parameters)
        others = [self.logits(i, row + read, count) for i, _ in enumerate(method.models, 1)]
        others += [self.logits(0, view + read, count) for view in views]
        steps = [form.scores([each[t] for each in (main, *others)], step=t, **parameters) for t in range(count)]
        return torch.stack(steps)

    @torch.no_grad()
    def search_scores(self, row, new, *, k, alpha):
        """Return the scores `(S, V)` of contrastive search (2202.06417), -inf for tokens that are no candidates.

        The candidates of a step are read in one forward pass, in which each sees the row and itself.
        """
        found = []
        for t in range(len(new)):
            ids = row + tuple(new[:t])
            context = self.states(0, ids, len(ids))[-1]
            top = self.logits(0, ids, 1)[0].softmax(-1).topk(k)
            state = self._after(ids, top.indices)
            penalty = cosine_similarity(state[:, None], context[None], dim=-1).amax(-1)
            scores = torch.full((self.doubles[0].config.vocab_size,), -torch.inf, dtype=torch.float64)
            found.append(scores.index_put_((top.indices,), (1 - alpha) * top.values - alpha * penalty))
        return torch.stack(found)

    def _after(self, ids, candidates):
        """Return the last hidden states `(k, D)` of candidates for the token after a row."""
        n, k = len(ids), len(candidates)
        visible = torch.ones(n + k, n + k, dtype=torch.bool).tril()
        visible[n:, n:] = torch.eye(k, dtype=torch.bool)
        mask = torch.zeros(n + k, n + k, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
        positions = torch.tensor([*range(n), *[n] * k])
        output = self.doubles[0](
            torch.cat([torch.tensor(ids), candidates])[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        return output.hidden_states[-1][0, n:]
