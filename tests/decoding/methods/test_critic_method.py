"""`--method critic` in commands, engines and evaluations, with a critic whose head is random."""

import pytest
import torch
from transformers import AutoModelForTokenClassification

from contralto import cli, testbed
from contralto.data_gen.engines.transformers import TransformersEngine
from contralto.data_gen.types import Ask, Sampling, make_request
from contralto.decoding import CriticGuidedLogitsProcessor
from contralto.eval.comparison.controls import generation_rows
from contralto.eval.comparison.decoders import parse_decoder

PROMPT = "Mia went to the barn. She"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("critic")
    torch.manual_seed(0)
    critic = AutoModelForTokenClassification.from_pretrained(testbed.path("expert"), num_labels=1)
    critic.score.weight.data.normal_()
    critic.save_pretrained(path)
    testbed.tokenizer().save_pretrained(path)
    return str(path)


def _generate(capsys, *argv):
    status = cli.main(["generate", "--model", "testbed:expert", "--method", "critic", *map(str, argv), PROMPT])
    out, err = capsys.readouterr()
    return status, out.strip(), err.strip().splitlines()[-1] if err.strip() else ""


def test_the_command_guides_by_a_critic(folder, capsys):
    how = ["--critic", folder, "--k", 3, "--raw", "--max-new-tokens", 8]
    status, out, line = _generate(capsys, *how)
    assert status == 0
    assert line.startswith(
        "critic: 2 models per token, of which the critic reads all 3 candidates in one forward pass;"
    )
    assert _generate(capsys, *how, "--executor", "processor")[1] == out
    model, tokenizer = testbed.load("expert"), testbed.tokenizer()
    critic = AutoModelForTokenClassification.from_pretrained(folder).eval()
    guided = CriticGuidedLogitsProcessor(critic, k=3)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, logits_processor=[guided], max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert out == text.strip()
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(plain, output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--critic", "testbed:amateur"], "testbed:amateur is no critic: it has 2 labels"),
        ([], "--method critic needs other models: set --critic"),
        (["--critic", "self:int4"], "must be the folder or hub id of a token classifier, not the model itself"),
        (["--critic", "FOLDER", "--adapters-off"], "--method critic has no --adapters-off"),
        (["--critic", "FOLDER", "--k", "0"], "k must be at least 1"),
        (["--critic", "FOLDER", "--beams", "2"], "has no beams"),
    ],
)
def test_what_cannot_be_right_is_an_error(flags, message, folder, capsys):
    status, _, line = _generate(capsys, *[folder if flag == "FOLDER" else flag for flag in flags])
    assert status != 0
    assert message in line


def test_a_critic_without_a_head_is_rejected(tmp_path, capsys):
    model = testbed.load("amateur")
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    testbed.tokenizer().save_pretrained(tmp_path)
    assert "it has no weights for score.bias, score.weight" in _generate(capsys, "--critic", tmp_path)[2]


def test_engines_guide_by_a_critic(folder):
    engine = TransformersEngine(model="testbed:expert", raw=True, method="critic", critic=folder, k=3)
    assert len(engine.identity["weights"]) == 2
    sampling = Sampling(max_new_tokens=6)
    asks = [Ask(role="target", prompt=PROMPT, seed=i) for i in range(2)]
    requests = [make_request(ask, engine=engine.identity, sampling=sampling, seed=0, row="1") for ask in asks]
    answers = [answer.text for outcomes in engine.answer(requests) for _, answer in outcomes]
    assert len(answers) == 2
    assert all(answers)


def test_a_comparison_has_no_critic_alone(folder):
    """A critic generates nothing by itself."""
    choice = parse_decoder(f"critic critic={folder} k=3")
    assert [row.name for row in generation_rows([choice], sampled=True)][:2] == ["greedy", choice.name]


@pytest.mark.slow
def test_an_evaluation_guides_by_a_critic(folder):
    from lm_eval.api.instance import Instance

    from contralto.eval import ContraltoLM

    lm = ContraltoLM(pretrained="testbed:expert", method="critic", critic=folder, k=3, batch_size=2)
    request = Instance("generate_until", {}, (PROMPT, {"until": ["\n"], "max_gen_toks": 6}), 0)
    assert lm.generate_until([request], disable_tqdm=True)[0]
    assert list(lm.models) == ["main", "critic"]
