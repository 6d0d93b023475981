"""Contrast prompts of requests in the chat template: only the text of one turn is replaced."""

from functools import cache

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from contralto import testbed
from contralto.common.messages import contrasted
from contralto.decoding.inputs import Prompt, render
from contralto.decoding.loading import Models
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.vlm import ContraltoVLM

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""A template that begins with BOS, as Gemma's."""
SYSTEM = {"role": "system", "content": "Be brief."}
EXAMPLE = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
ASKED = {"role": "user", "content": "Two?"}
BEGUN = {"role": "assistant", "content": "It is"}


@cache
def _lm():
    lm = ContraltoLM("testbed:expert")
    lm.tokenizer = testbed.tokenizer()
    lm.tokenizer.chat_template = GEMMA
    return lm


def _job(lm, context, doc=None, more=()):
    return next(iter(lm.eval_requests([Instance("generate_until", doc or {}, (context, {}, *more), 0)])))


@pytest.mark.parametrize(
    "chat",
    [[ASKED], [SYSTEM, ASKED], [*EXAMPLE, ASKED], [SYSTEM, *EXAMPLE, ASKED], [ASKED, BEGUN], [*EXAMPLE, ASKED, BEGUN]],
    ids=[
        "alone",
        "system",
        "examples as turns",
        "system and examples",
        "a begun answer",
        "examples and a begun answer",
    ],
)
def test_only_the_last_turn_is_another(chat):
    lm = _lm().decoding_by(method="cad", contrast_prompt="Ignore. {prompt} {hint}")
    context = lm.apply_chat_template([dict(message) for message in chat], chat[-1]["role"] != "assistant")
    other = lm.contrasted(_job(lm, context, {"hint": "Hm."})).context
    assert other == context.replace("Two?", "Ignore. Two? Hm.")
    assert (other.count(lm.tokenizer.bos_token), context.count("Two?")) == (1, 1)
    ids = lm.tok_encode(other)
    assert ids.count(lm.tokenizer.bos_token_id) == 1
    # generate renders the same
    models = Models(None, (), lm.tokenizer)
    asked = Prompt(contrasted(chat, "Ignore. {prompt} Hm."))
    assert render(asked, models, raw=False) == other


def test_examples_in_one_turn_are_part_of_the_prompt():
    lm = _lm().decoding_by(method="icd", contrast_prompt="Ignore. {prompt}")
    context = lm.apply_chat_template([{"role": "user", "content": "One? 1.\n\nTwo?"}])
    assert lm.contrasted(_job(lm, context)).context == context.replace("One?", "Ignore. One?")


def test_images_stay_in_the_turn():
    lm = ContraltoVLM("testbed:vision-0").decoding_by(method="icd", contrast_prompt="Is it? {prompt}")
    contexts = [
        lm.apply_chat_template([{"role": "user", "content": f"<image>{text}"}]) for text in ("What?", "Is it? What?")
    ]
    assert lm.contrasted(_job(lm, contexts[0])).context == contexts[1]


def test_prompts_of_unknown_conversations_are_rejected():
    lm = _lm().decoding_by(method="cad", contrast_prompt="{hint}")
    lm.apply_chat_template([dict(ASKED)])
    with pytest.raises(ValueError, match="these prompts were rendered elsewhere: leave cache_requests out"):
        lm.contrasted(_job(lm, "<bos>something else", {"hint": "Hm."}))
    unconditional = lm.contrasted(_job(lm, "", {"hint": "Hm."})).context
    assert unconditional == lm.apply_chat_template([{"role": "user", "content": "Hm."}])
