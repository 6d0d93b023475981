"""Contrast prompts through `generate()`: beams, assisted decoding, reuse, one prompt for many rows; critics."""

import pytest
import torch
import zoo
from oracles import decoding as reference
from oracles import rules as oracle
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, LlamaConfig

from contralto import decoding, testbed
from contralto.decoding.branches import InputBranch, LayerBranch
from contralto.decoding.executors.score import score

STEPS = 8


def _setting(family="llama", batch=2):
    main, other = zoo.prompts(batch, seed=3), zoo.prompts(batch + 1, seed=4)[:0:-1]
    return zoo.build(family, seed=1), main, other


def _scorer(model, prompt, other):
    """CAD's scores of one row in float64: the contrast prompt, then what follows the main prompt."""

    def scores(ids):
        views = ids, torch.cat([other, ids[len(prompt) :]])
        return torch.tensor(oracle.cad(*(reference.next_logits(model, view) for view in views), alpha=0.7))

    return scores


def _trim(row, start):
    new = row[start:].tolist()
    return new[: new.index(zoo.EOS) + 1] if zoo.EOS in new else new


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "mamba", "bloom"))]
)
def test_beams(family):
    model, main, other = _setting(family)
    double = zoo.build(family, seed=1).double()
    inputs = zoo.pad(main)
    contrast = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad(other), alpha=0.7)
    found = model.generate(**inputs, logits_processor=[contrast], num_beams=3, max_new_tokens=STEPS, do_sample=False)
    for row, prompt, elsewhere in zip(found, main, other, strict=True):
        expected = reference.beam(_scorer(double, prompt, elsewhere), prompt, STEPS, zoo.EOS, num_beams=3)
        assert _trim(row, inputs["input_ids"].shape[1]) == expected


def test_assisted_decoding_and_reuse():
    model, (prompt,), (other,) = _setting(batch=1)
    inputs, contrast = zoo.pad([prompt]), zoo.pad([other])
    method = decoding.ContextAwareDecodingLogitsProcessor(model, contrast)
    how = {"logits_processor": [method], "max_new_tokens": STEPS, "do_sample": False}
    expected = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, assistant_model=zoo.build("llama", hidden=16, seed=5), **how), expected)
    assert torch.equal(model.generate(**inputs, **how), expected)
    assert torch.equal(
        model.generate(**inputs, custom_generate=method.loop(), max_new_tokens=STEPS, do_sample=False), expected
    )
    with pytest.raises(ValueError, match="belong to one batch of prompts, so create a new processor"):
        model.generate(**zoo.pad([prompt.flip(0)]), **how)


def test_a_text_that_goes_on():
    """A second turn: what was generated and what the user said then both follow the contrast prompt too."""
    model, (prompt,), (other,) = _setting(batch=1)
    method = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad([other]))
    how = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(**zoo.pad([prompt]), logits_processor=[method], **how)
    longer = torch.cat([first[0], torch.tensor([9, 11])])
    second = model.generate(longer[None], logits_processor=[method], **how)
    elsewhere = torch.cat([other, longer[len(prompt) :]])
    fresh = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad([elsewhere]))
    assert torch.equal(second, model.generate(longer[None], logits_processor=[fresh], **how))


def test_one_contrast_prompt_for_all_rows():
    model, main, (other, _) = _setting()
    inputs = zoo.pad(main)
    one = decoding.ContextAwareDecodingLogitsProcessor(model, {"input_ids": other[None]})
    each = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad([other, other]))
    found = [
        model.generate(**inputs, logits_processor=[m], max_new_tokens=STEPS, num_beams=2, do_sample=False)
        for m in (one, each)
    ]
    assert torch.equal(*found)
    fast = [
        model.generate(**inputs, custom_generate=m.loop(), max_new_tokens=STEPS, do_sample=False) for m in (one, each)
    ]
    assert torch.equal(*fast)


def test_the_number_of_rows_must_fit():
    model, main, other = _setting()
    method = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad([*other, other[0]]))
    with pytest.raises(ValueError, match="3 prompts, which do not fit 2 rows"):
        model.generate(**zoo.pad(main), logits_processor=[method], max_new_tokens=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: InputBranch(m, {"attention_mask": torch.ones(1, 2)}),
            "need input_ids, and contain only attention_mask",
        ),
        (lambda m: InputBranch(m, zoo.pad(zoo.prompts(2), side="right")), "padded on the right"),
        (lambda m: LayerBranch(m, [2]), "layers must be some of 0 to 1 of this model's 2 layers"),
        (lambda m: LayerBranch(m, []), "layers must be some of"),
        (
            lambda m: decoding.DoLaLogitsProcessor(m, layers="middle"),
            "'low', 'high' or a list of layer numbers, not 'middle'",
        ),
        (lambda m: decoding.DoLaLogitsProcessor(m, relative_top=2), "relative_top must lie in"),
        (lambda m: decoding.DoLaLogitsProcessor(m, form="js"), "form must be 'kl' or 'jsd', not 'js'"),
        (lambda m: decoding.RitualLogitsProcessor(m, zoo.pad(zoo.prompts(1)), kappa=-1), "kappa must be"),
        (lambda m: decoding.CriticGuidedLogitsProcessor(len, k=0), "k must be at least 1"),
        (
            lambda m: decoding.ContrastiveInputDecodingLogitsProcessor(m, zoo.prompts(1)[0][None], alpha=0.1),
            "form='probability' has no plausibility threshold",
        ),
        (
            lambda m: decoding.ContrastiveInputDecodingLogitsProcessor(m, zoo.prompts(1)[0][None], form="odds"),
            "form must be 'probability' or 'log_ratio'",
        ),
        (
            lambda m: decoding.ContrastiveDecodingLogitsProcessor(m, vision_inputs={"pixel_values": torch.ones(1)}),
            "is used as a text model here, so it cannot use pixel_values",
        ),
        (
            lambda m: decoding.ClassifierFreeGuidanceLogitsProcessor(
                m, zoo.pad(zoo.prompts(1)), attention_mask=torch.ones(1, 4)
            ),
            "attention_mask and negative_inputs are mutually exclusive",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build(zoo.build("llama"))


def test_dola_chooses_layers_by_name():
    model = testbed.load("expert")  # three layers, its embeddings tied to its head
    prompt = testbed.tokenizer()("Ben went out to the", return_tensors="pt")
    for layers, same in (("high", [1]), ("low", [1])):
        found = [
            model.generate(
                **prompt,
                logits_processor=[decoding.DoLaLogitsProcessor(model, layers=which)],
                max_new_tokens=6,
                do_sample=False,
            )
            for which in (layers, same)
        ]
        assert torch.equal(*found)


def test_m3id_grows_in_the_score_as_in_the_text():
    model, (prompt,), (other,) = _setting(batch=1)
    inputs = zoo.pad([prompt])
    method = decoding.M3IDLogitsProcessor(model, zoo.pad([other]), lam=0.3)
    how = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 5}
    output = model.generate(**inputs, logits_processor=[method], **how)
    new = output.sequences[:, len(prompt) :]
    said = [scores.log_softmax(-1)[0, token].item() for scores, token in zip(output.scores, new[0], strict=True)]
    found = score(method, model, inputs, new, masked=True)
    assert found.tokens[0].tolist() == pytest.approx(said, abs=1e-4)
    assert found.is_greedy.all()


def test_masked_scores_count_what_is_ruled_out():
    model, (prompt,), (other,) = _setting(batch=1)
    method = decoding.VisualContrastiveDecodingLogitsProcessor(
        model, zoo.pad([other]), beta=1.0
    )  # one token is plausible
    text = torch.arange(3, 10)[None]
    found = score(method, model, zoo.pad([prompt]), text, masked=True, floor=-77.0)
    assert found.ruled_out.item() >= 5
    assert (found.tokens == -77.0).sum() == found.ruled_out
    assert not found.is_greedy.any()
    assert score(method, model, zoo.pad([prompt]), text).ruled_out.item() == 0


def test_score_refuses_what_does_not_fit():
    model, main, other = _setting()
    method = decoding.ContextAwareDecodingLogitsProcessor(model, zoo.pad(other))
    with pytest.raises(ValueError, match="one continuation per prompt, not 3 for 2 prompts"):
        score(method, model, zoo.pad(main), torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="with tokens"):
        score(method, model, zoo.pad(main), torch.ones(2, 0, dtype=torch.long))


def _critic():
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1, **zoo.WIDE
    )
    return AutoModelForTokenClassification.from_config(config).eval()


def test_critic_guided_equals_the_reference():
    """A left-padded batch with a value head, against each row alone in float64."""
    model, main, _ = _setting()
    critic, inputs = _critic(), zoo.pad(main)
    guided = decoding.CriticGuidedLogitsProcessor(critic, k=4, attention_mask=inputs["attention_mask"])
    found = model.generate(**inputs, logits_processor=[guided], max_new_tokens=STEPS, do_sample=False)
    double, judge = zoo.build("llama", seed=1).double(), _critic().double()

    def value(ids, token):
        with torch.no_grad():
            return judge(input_ids=torch.cat([ids, torch.tensor([token])])[None]).logits[0, -1, 0].item()

    for row, prompt in zip(found, main, strict=True):

        def scores(ids):
            return torch.tensor(oracle.critic_guided(reference.next_logits(double, ids), lambda v: value(ids, v), k=4))

        expected = reference.greedy(scores, prompt, STEPS, zoo.EOS)
        assert _trim(row, inputs["input_ids"].shape[1]) == expected
    plain = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert not torch.equal(plain, found)


def test_a_function_is_a_critic():
    model, main, _ = _setting()
    inputs = zoo.pad(main)
    only_even = decoding.CriticGuidedLogitsProcessor(
        lambda ids, mask: 1e4 * (1 - 2 * (ids[:, -1] % 2)), k=zoo.VOCAB, attention_mask=inputs["attention_mask"]
    )
    output = model.generate(**inputs, logits_processor=[only_even], max_new_tokens=STEPS)
    assert (output[:, inputs["input_ids"].shape[1] :] % 2 == 0).all()


def test_other_heads_are_no_critics():
    model = zoo.build("llama")
    with pytest.raises(TypeError, match="one value per token, not 2 labels"):
        decoding.CriticGuidedLogitsProcessor(AutoModelForSequenceClassification.from_config(model.config))
    model.config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(model.config)
    guided = decoding.CriticGuidedLogitsProcessor(critic)
    with pytest.raises(TypeError, match="returns one value per sequence"):
        model.generate(**zoo.pad(zoo.prompts(1)), logits_processor=[guided], max_new_tokens=2)
