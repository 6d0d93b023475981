"""Engines, one alive at a time, and the float64 oracle."""

import gc
import math
from functools import cache

import torch
from oracles import decoding as reference
from oracles import rules
from runner import RUNNER
from transformers import AutoModelForCausalLM
from vllm import LLM

from contralto import testbed
from contralto.decoding.vllm import make_llm

SMALL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 64}
EOS, MARKER = 3, 0
FEW_BLOCKS = 13 if RUNNER == "v1" else 12
"""Of the cache: growing texts are put off, or, where there is no time to grow, one branch of a text does not fit."""


def stock(model, **how):
    """An engine with vLLM's own scheduler."""
    return LLM(model, logits_processors=["contralto.decoding.vllm:PairedContrast"], **how)


class Engines:
    """Engines by their options; the last one is kept."""

    def __init__(self, model):
        self.model, self._llm, self._how = model, None, None

    def __call__(self, *, make=make_llm, **how):
        if self._llm is None or self._how != (make, how):
            self.close()
            self._llm = make(self.model, **{**SMALL, "enable_prefix_caching": False, **how})
            self._how = make, how
        return self._llm

    def close(self):
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()


def scheduler_of(llm):
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


SUBJECTS = ("Mia", "Ben", "Tom", "Sue", "The old fox", "He", "She")
BEGINNINGS = (
    "went out to the",
    "saw a",
    "was happy. She",
    "felt brave. He",
    "has 3 coins. He finds 4, loses 2. He",
    "found the",
)


def prompts(count):
    """So many texts, with two prompts each: a story's opening, and another one or none."""
    tokenizer = testbed.tokenizer()
    found = []
    for i in range(count):
        subject, other = SUBJECTS[i % 7], SUBJECTS[(i + 3) % 7]
        full = f"{other} {BEGINNINGS[(i // 7 + 2) % 6]} red wheel. {subject} {BEGINNINGS[i % 6]}"
        bare = full.split(". ")[-1] if i % 3 else BEGINNINGS[i % 6]
        if i % 5 == 0:  # problems end early
            full = (
                f"<|user|>{subject} has {i % 10} coins. {subject} finds {i % 7}, loses 2. How many coins?<|assistant|>"
            )
            bare = "<|user|>How many coins?<|assistant|>"
        found.append(([2, *_ids(tokenizer, full)], [2, *_ids(tokenizer, bare)]))
    return found


def _ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@cache
def model64(folder):
    """A model in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()


FORMULAS = {
    "cad": lambda e, a, step, **how: rules.cad(e, a, **how),
    "cd": lambda e, a, step, **how: reference.contrastive_decoding(e, a, **how),
    "cd li": lambda e, a, step, **how: reference.contrastive_decoding_li(e, a, **how),
    "cfg": lambda e, a, step, guidance_scale=1.5: rules.cfg(e, a, gamma=guidance_scale),
    "cid": lambda e, a, step, **how: rules.cid(e, a, **how),
    "cid log_ratio": lambda e, a, step, **how: rules.cid_log_ratio(e, a, **how),
    "icd": lambda e, a, step, **how: rules.vcd(e, a, **how),
    "vcd": lambda e, a, step, **how: rules.vcd(e, a, **how),
    "m3id": lambda e, a, step, lam=0.02, beta=0.1: rules.m3id(e, a, step, lam=lam, alpha=beta),
    "ritual": lambda e, a, step, **how: rules.ritual(e, a, **how),
    "ritual-vcd": lambda e, t, n, step, **how: rules.vcd_ritual(e, n, t, **how),
    "vdd": lambda e, a, step, **how: rules.vcd(e, a, **how),
    "proxy": lambda e, a, b, step, **how: rules.proxy_tuning(e, a, b, **how),
}


@torch.no_grad()
def oracle(models, branches, tokens, *, method, form=None, gate=None, choose=None, allowed=None, marker=MARKER, **how):
    """What should stand at every place of a text, by the papers' formulas in float64, given the tokens before it.

    One forward of the whole text per branch, no cache; the marker is impossible. If every token is the one that should stand
    there, the text is the oracle's. Returns the tokens, and the log-probabilities of the text's own tokens by branch.
    With a gate, the main model's own where its largest probability is at least that. `choose(scores, step)` draws; `allowed(before)` are the tokens that a grammar lets the main branch write.
    """
    formula = FORMULAS[f"{method} {form}" if form else method]
    seen = [_logits(model, branch, tokens) for model, branch in zip(models, branches, strict=True)]
    text, logs = [], [[] for _ in branches]
    for step, token in enumerate(tokens):
        logits = [branch[step] for branch in seen]
        if allowed is not None:
            kept = allowed(tokens[:step])
            logits[0] = [x if v in kept else -torch.inf for v, x in enumerate(logits[0])]
        for branch, log in zip(logits, logs, strict=True):
            log.append(reference.log_softmax(branch)[token])
            if marker is not None:
                branch[marker] = -torch.inf
        scores = formula(*logits, step=step, **how)
        if gate is not None and step and max(map(math.exp, reference.log_softmax(logits[0]))) >= gate:
            scores = logits[0]
        text.append(choose(scores, step) if choose else max(range(len(scores)), key=scores.__getitem__))
    return text, logs


def _logits(model, prompt, tokens):
    """The logits for each token of a text, in float64."""
    row = torch.tensor([[*prompt, *tokens[:-1]]])
    return model(row, use_cache=False).logits[0, len(prompt) - 1 :].double().tolist()


def has_ended(output, max_tokens, ends=(EOS,)):
    """Whether a text goes on to its end token or its length, and no further."""
    return output.tokens[-1] in ends if len(output.tokens) < max_tokens else not set(output.tokens[:-1]) & set(ends)
