"""SimCTG's contrast between tokens and CAL's weights by the image, against the formulas in plain Python; both trainers against stock TRL."""

import math

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from zoo import vision as zoo_vision

from contralto import testbed
from contralto.align.trainers import sft as simctg
from contralto.align.trainers.batches import IGNORED
from contralto.align.trainers.sft import (
    CALConfig,
    CALTrainer,
    SimCTGConfig,
    SimCTGTrainer,
    contrastive_loss,
    image_weights,
    isotropy,
)
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS


def _cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _contrast(states, kept, rho):
    """Equation 2 for one text."""
    h = [state for state, keep in zip(states, kept, strict=True) if keep]
    pairs = [(i, j) for i in range(len(h)) for j in range(len(h)) if i != j]
    terms = [max(0.0, rho - _cosine(h[i], h[i]) + _cosine(h[i], h[j])) for i, j in pairs]
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.2, 2.0])
def test_contrastive_loss_is_equation_2(rho):
    torch.manual_seed(0)
    states = torch.randn(4, 7, 3, dtype=torch.float64) + 0.4
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    expected = [_contrast(row.tolist(), kept.tolist(), rho) for row, kept in zip(states, mask, strict=True)]
    assert_close(contrastive_loss(states, mask, rho=rho), torch.tensor(expected, dtype=torch.float64))
    assert expected[3] == 0


def test_isotropy_is_one_less_the_mean_cosine():
    torch.manual_seed(0)
    states = torch.randn(3, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    rows = [
        [state for state, keep in zip(*pair, strict=True) if keep] for pair in zip(states.tolist(), mask, strict=True)
    ]
    expected = [
        1 - sum(_cosine(a, b) for a in row for b in row if a is not b) / (len(row) * (len(row) - 1)) for row in rows[:2]
    ]
    found = isotropy(states, mask)
    assert_close(found[:2], torch.tensor(expected, dtype=torch.float64))
    assert found[2].isnan()
    with pytest.raises(ValueError, match="the mask has shape"):
        isotropy(states, mask[:, 1:])


def test_contrastive_loss_has_gradients_where_cosines_are_close():
    torch.manual_seed(0)
    states = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda h: contrastive_loss(h, mask, rho=1.0), states)
    (grad,) = torch.autograd.grad(contrastive_loss(states, mask, rho=1.0).sum(), states)
    assert not grad[1, 2:].any()


def _weights(z, other, kept, low, high):
    clamped = [min(max(a - b, low), high) for a, b in zip(z, other, strict=True)]
    out = []
    for t in range(len(z)):
        near = [clamped[i] for i in (t - 1, t, t + 1) if 0 <= i < len(z) and kept[i]]
        out.append(sum(near) / len(near) if kept[t] else 0.0)
    return out


def test_image_weights_are_clamped_and_pooled():
    torch.manual_seed(1)
    z, other = torch.randn(3, 9) * 4, torch.randn(3, 9)
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 0, 0, 1], [0] * 9])
    found = image_weights(z, other, mask, low=0.5, high=4.0)
    for row in range(3):
        expected = _weights(z[row].tolist(), other[row].tolist(), mask[row].tolist(), 0.5, 4.0)
        assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(torch.ones(1, 2, 3), torch.ones(1, 2), rho=2.5), r"rho must lie in \[0, 2\]"),
        (lambda: contrastive_loss(torch.ones(1, 2, 3), torch.ones(1, 3)), "the mask has shape"),
        (lambda: image_weights(*[torch.ones(1, 2)] * 3, low=3.0, high=2.0), "bounds must be ordered"),
        (lambda: SimCTGConfig("out", rho=-0.1), "rho must lie in"),
        (lambda: SimCTGConfig("out", packing=True), "SimCTG contrasts the tokens of one"),
        (lambda: CALConfig("out", cal_low=6.0), "cal_low and cal_high must be ordered"),
        (lambda: CALConfig("out", loss_type="dft"), "use nll"),
        (
            lambda: SimCTGTrainer("model", SFTConfig("out", report_to="none", bf16=False)),
            "args must be a SimCTGConfig, not SFTConfig",
        ),
        (lambda: CALTrainer("model", SFTConfig("out", report_to="none", bf16=False)), "args must be a CALConfig"),
        (
            lambda: CALTrainer(
                "model",
                CALConfig("out", report_to="none", bf16=False),
                train_dataset=Dataset.from_list([{"messages": []}]),
            ),
            "with a column images",
        ),
    ],
)
def test_mistakes_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- the trainers


def _args(kind, folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "max_steps": 1, "logging_steps": 1, "dataloader_pin_memory": False}
    return kind(str(folder), **quiet | small | {"gradient_checkpointing": False} | options)


def _problems(size=6):
    found = []
    for problem in worlds.problems(0, "train"):
        prompt = [{"role": "user", "content": problem.question}]
        found.append({"prompt": prompt, "completion": [{"role": "assistant", "content": problem.solution()}]})
        if len(found) == size:
            return Dataset.from_list(found)


def _made(kind, config, folder, *, lora=False, **options):
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=1) if lora else None
    model = AutoModelForCausalLM.from_pretrained(testbed.path("amateur"))
    args = _args(config, folder, **options)
    how = {"processing_class": testbed.tokenizer(), "peft_config": peft_config}
    return kind(model, args=args, train_dataset=_problems(), **how)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_simctg_is_likelihood_and_contrast(tmp_path, lora):
    """By the model's own hidden states, whichever way TRL got its logits."""
    one = _made(SimCTGTrainer, SimCTGConfig, tmp_path, lora=lora, rho=0.9)
    stock = _made(SFTTrainer, SFTConfig, tmp_path, lora=lora)
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    loss = one.compute_loss(one.model.train(), dict(batch))
    plain = stock.compute_loss(stock.model.train(), dict(batch))
    out = one.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    states, kept = out.hidden_states[-1].double(), batch["labels"] != IGNORED
    expected = [_contrast(row.tolist(), keep.tolist(), 0.9) for row, keep in zip(states, kept, strict=True)]
    contrast = sum(expected) / len(expected)
    assert contrast > 0.1
    assert (loss - plain).item() == pytest.approx(contrast, rel=1e-4)
    assert one._metrics["train"]["contrastive_loss"] == pytest.approx([contrast], rel=1e-4)
    loss.backward()
    plain.backward()
    name, weight = next((name, each) for name, each in one.model.named_parameters() if each.requires_grad)
    own = stock.model.get_parameter(name).grad
    mine = contrastive_loss(out.hidden_states[-1], kept, rho=0.9).mean()
    (grad,) = torch.autograd.grad(mine, weight)
    assert_close(weight.grad - own, grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_accumulated_steps_are_one_step(tmp_path):
    """The same texts in one batch of six and in two of three: the contrast is a mean over texts in both."""
    weights = []
    for size, steps in ((6, 1), (3, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 1e-3}
        one = _made(SimCTGTrainer, SimCTGConfig, tmp_path, **options, optim="sgd", shuffle_dataset=False)
        one.train()
        weights.append({name: value.detach() for name, value in one.model.named_parameters()})
        assert "contrastive_loss" in one.state.log_history[0]
    for name, value in weights[0].items():
        assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_contrast_pulls_tokens_apart(tmp_path):
    def crowding(model):
        ids = testbed.tokenizer()(_problems()[0]["completion"][0]["content"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1]
        return contrastive_loss(states, torch.ones_like(ids), rho=1.0).item()

    found = []
    for kind, config, options in ((SFTTrainer, SFTConfig, {}), (SimCTGTrainer, SimCTGConfig, {"rho": 1.0})):
        one = _made(kind, config, tmp_path, max_steps=20, learning_rate=3e-3, **options)
        one.train()
        found.append(crowding(one.model))
    assert found[1] < 0.8 * found[0]


def _pictures(size=4):
    rows = []
    for i in range(size):
        picture = Image.new("RGB", (32, 32), (60 * i, 255 - 60 * i, 90))
        prompt = [{"role": "user", "content": "is there a cat?"}]
        completion = [{"role": "assistant", "content": "yes, a cat" if i % 2 else "no"}]
        rows.append({"images": [picture], "prompt": prompt, "completion": completion})
    return Dataset.from_list(rows)


def _seeing(kind, config, folder, **options):
    model = testbed.load("vision-0")
    args = _args(config, folder, per_device_train_batch_size=4, max_length=None, **options)
    return kind(model, args=args, train_dataset=_pictures())


def test_cal_weighs_the_likelihood(tmp_path):
    """By whole logits of the model, with images and with images masked by hand."""
    one, stock = _seeing(CALTrainer, CALConfig, tmp_path), _seeing(SFTTrainer, SFTConfig, tmp_path)
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    loss = one.compute_loss(one.model.train(), dict(batch))
    plain = {name: value for name, value in batch.items() if name != "labels"}
    hidden = batch["input_ids"] == one.model.config.image_token_id
    assert hidden.any()
    with torch.no_grad():
        seen = one.model(**plain).logits.double()
        unseen = one.model(**plain | {"attention_mask": batch["attention_mask"] * ~hidden}).logits.double()
    total, weight, spread = 0.0, 0.0, set()
    for row, labels in enumerate(batch["labels"][:, 1:].tolist()):
        kept = [label != IGNORED for label in labels]
        z, other = (
            [logits[row, t, max(label, 0)].item() for t, label in enumerate(labels)] for logits in (seen, unseen)
        )
        weights = _weights(z, other, kept, 1.0, 5.0)
        logs = seen[row].log_softmax(-1)
        total -= sum(
            w * logs[t, max(label, 0)].item() for t, (w, label) in enumerate(zip(weights, labels, strict=True))
        )
        weight += sum(weights)
        spread |= {round(w, 3) for w in weights if w}
    assert len(spread) > 3
    assert loss.item() == pytest.approx(total / weight, rel=1e-4)
    assert loss.item() != pytest.approx(stock.compute_loss(stock.model.train(), dict(batch)).item(), rel=1e-3)
    count = (batch["labels"][:, 1:] != IGNORED).sum().item()
    assert one._metrics["train"]["cal_weight"] == pytest.approx([weight / count], rel=1e-4)
    loss.backward()
    assert one.model.lm_head.weight.grad.any()
    with torch.no_grad():
        own, other = (each.compute_loss(each.model.eval(), dict(batch)) for each in (one, stock))
    assert_close(own, other)


@pytest.mark.slow
def test_cal_trains_with_an_adapter(tmp_path):
    args = _args(CALConfig, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_length=None)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=1)
    one = CALTrainer(testbed.load("vision-0"), args=args, train_dataset=_pictures(), peft_config=lora)
    one.train()
    assert one.state.log_history[0]["grad_norm"] > 0
    assert 1 <= one.state.log_history[0]["cal_weight"] <= 5
    one.save_model()
    card = (tmp_path / "README.md").read_text()  # not peft's draft
    assert "fine-tuned by CAL, with contralto on TRL" in card
    assert "| mean weight of a token | logged once |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("family", [each for each in zoo_vision.FAMILIES if each != "gemma3"])
def test_what_is_hidden_does_not_matter(family):
    """Another picture, the same logits of the text."""
    model = zoo_vision.build(family)
    inputs = zoo_vision.batch([case.original for case in zoo_vision.cases(family, 2)])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    text = (ids != model.config.image_token_id) & inputs["attention_mask"].bool()
    other, found = pixels * torch.randn_like(pixels), []  # what is padding stays 0
    for shown in (pixels, other):
        with torch.no_grad(), simctg._blind(model, ids):
            found.append(model(**inputs | {"pixel_values": shown}).logits[text])
    assert_close(found[1], found[0])
    with torch.no_grad():
        seen = [model(**inputs | {"pixel_values": shown}).logits[text] for shown in (pixels, other)]
    assert (seen[0] - seen[1]).abs().max() > 0.01
    assert (seen[0] - found[0]).abs().max() > 0.01


def test_a_mask_of_another_kind_is_refused():
    model = zoo_vision.build("gemma3")
    inputs = zoo_vision.batch([case.original for case in zoo_vision.cases("gemma3", 1)])
    with (
        pytest.raises(ValueError, match="Gemma3ForConditionalGeneration gives its language model another kind of mask"),
        torch.no_grad(),
        simctg._blind(model, inputs["input_ids"]),
    ):
        model(**inputs)
