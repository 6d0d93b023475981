"""MDI and AEI: the formulas against plain Python, and the attention against what transformers returns of an eager model."""

import copy

import numpy as np
import pytest
import torch
from oracles import attention as oracle

from contralto import testbed
from contralto.eval.comparison.report.tabulate import tables
from contralto.eval.metrics.dominance import AttentionMass, dominance, stages, summary
from contralto.eval.models.attention import measured_attention
from contralto.testbed import scenes


def test_the_indices_are_those_of_the_paper():
    draws = np.random.default_rng(0)
    for text_tokens, image_tokens in ((1, 1), (7, 20), (30, 4)):
        text, image = draws.random(text_tokens).tolist(), draws.random(image_tokens).tolist()
        found = dominance(sum(text), sum(image), text_tokens, image_tokens)
        assert found.mdi == pytest.approx(oracle.mdi(text, image))
        assert (found.aei_text, found.aei_image) == pytest.approx(oracle.aei(text, image))
    assert dominance(0.5, 0.5, 10, 10) == (1.0, 1.0, 1.0)


def test_stages_are_means_of_layers_and_documents():
    masses = [
        AttentionMass(np.array([0.6, 0.8, 0.9]), np.array([0.4, 0.2, 0.1]), np.array([0.1, 0.2, 0.3]), 10, 20),
        AttentionMass(np.array([0.5, 0.5, 0.5]), np.array([0.5, 0.5, 0.5]), np.array([0.0, 0.0, 0.0]), 10, 10),
    ]
    found = summary(masses)
    assert found["early"]["mdi"] == pytest.approx(((0.7 / 10) / (0.3 / 20) + 1) / 2)
    assert found["late"]["mdi"] == pytest.approx(((0.85 / 10) / (0.15 / 20) + 1) / 2)
    assert found["late"]["mdi_without_first"] == pytest.approx(((0.6 / 9) / (0.15 / 20) + (0.5 / 9) / (0.5 / 10)) / 2)
    assert found["all"]["aei_image"] == pytest.approx(((0.7 / 3) / (20 / 30) + 1) / 2)
    assert stages(1) == {"early": [0], "middle": [0], "late": [0]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 0.5, 0, 4), "there are 0 and 4 tokens"),
        ((1.0, 0.5, 4, 0), "there are 4 and 0 tokens"),
        ((1.0, 0.0, 4, 4), "the image has no attention at all"),
    ],
)
def test_what_has_no_index_is_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        dominance(*values)
    with pytest.raises(ValueError, match="no document has an image"):
        summary([])


def test_the_attention_is_that_of_an_eager_model():
    """Two prompts one after the other; queries are those that predict the three new tokens."""
    model, processor = testbed.load("vision-0"), _processor()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    pictured, expected = scenes.scenes(3, "test"), []
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    prompts = [_prompt(processor, next(pictured)) for _ in range(2)]
    with measured_attention(model) as found:
        for prompt in prompts:
            model.generate(**prompt, **how)
    for prompt in prompts:
        image = prompt["input_ids"][0] == model.config.image_token_id
        output = eager.generate(**prompt, **how, output_attentions=True, return_dict_in_generate=True)
        steps = [torch.stack([layer[0, :, -1, : len(image)].mean(0) for layer in step]) for step in output.attentions]
        attention = torch.stack(steps).double().sum(0)
        expected.append((attention[:, ~image].sum(-1), attention[:, image].sum(-1), attention[:, 0], image))
    assert len(found) == 2
    for mass, (text, shown, first, image) in zip(found, expected, strict=True):
        for own, other in ((mass.text, text), (mass.image, shown), (mass.first, first)):
            np.testing.assert_allclose(own, other.numpy(), atol=1e-5)
        assert (mass.text_tokens, mass.image_tokens) == (int((~image).sum()), int(image.sum()))


def test_a_batch_is_rejected():
    model = testbed.load("vision-0")
    with pytest.raises(ValueError, match="attention is measured one prompt at a time"), measured_attention(model):
        model(input_ids=torch.tensor([[5, 6], [7, 8]]))


def test_the_table_says_why_a_model_has_no_figures():
    stage = {"mdi": 2.0, "mdi_without_first": 1.5, "aei_text": 1.2, "aei_image": 0.6}
    figures = {**dict.fromkeys(("early", "middle", "late", "all"), stage), "documents": 8}
    task = {
        "name": "pope",
        "kind": "yes_no",
        "metric": "acc",
        "higher_is_better": True,
        "items": 8,
        "cluster": None,
        "clusters": None,
        "columns": [],
        "rows": [],
        "attention": {"one": figures, "two": {"reason": "its attention is flash_attention_2"}},
    }
    (table,) = [each for each in tables(task) if each.title == "Attention to text and image"]
    assert [row[0] for row in table.rows] == [f"one, {stage} layers" for stage in ("early", "middle", "late", "all")]
    assert [cell.main for cell in table.rows[0][2]] == ["2.00", "1.50", "1.20", "0.60", "8"]
    assert table.note.endswith(" two: not measured, its attention is flash_attention_2.")


def _processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(testbed.path("vision-0"))


def _prompt(processor, scene):
    parts = [{"type": "image", "image": scene.image()}, {"type": "text", "text": scenes.DESCRIBE}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([{"role": "user", "content": parts}], **how)
