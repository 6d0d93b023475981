"""What a contrast did to a text: every number of `trace` against float64 forwards, and the page that shows them."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import zoo
from oracles import decoding as reference
from oracles import rules as oracle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import llava as zoo_llava

from contralto import cli, decoding, testbed
from contralto.cli.explain_page import spell, visible
from contralto.decoding.trace import Candidate, RuledOut, Step, trace

# --------------------------------------------------------------------------------------------------------------- trace

TOP = 3
TEXT = [7, 30, 12, 5, 44]


def _layer(final, layers):
    """The layer whose distribution differs most from the last one's."""

    def divergence(layer):
        p, q = ([math.exp(x) for x in reference.log_softmax(logits)] for logits in (final, layer))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2

    return max(layers, key=divergence)


class Case(SimpleNamespace):
    """A method for one prompt of a family, and float64 logits of its branches after so many tokens of the text."""

    def __init__(self, family):
        self.family, self.encoded = family, family in zoo.ENCODER_DECODERS
        self.model, self.exact = zoo.build(family, seed=1), zoo.build(family, seed=1).double()
        self.others = [zoo.build(family, hidden=16, seed=seed) for seed in (2, 3)]
        self.exact_others = [zoo.build(family, hidden=16, seed=seed).double() for seed in (2, 3)]
        (self.prompt,), (self.contrast,) = zoo.prompts(1, seed=3), zoo.prompts(1, seed=4)
        self.inputs, self.other = zoo.pad([self.prompt]), zoo.pad([self.contrast[1:]])
        self.extra = {"encoder_inputs": self.inputs} if self.encoded else {}

    def logits(self, model, prompt, t):
        new = torch.tensor(TEXT[:t], dtype=torch.long)
        if self.encoded:
            start = torch.tensor([self.model.config.decoder_start_token_id])
            return reference.next_logits(model, torch.cat([start, new]), prompt)
        return reference.next_logits(model, torch.cat([prompt, new]))

    @torch.no_grad()
    def layers(self, t):
        ids = torch.cat([self.prompt, torch.tensor(TEXT[:t], dtype=torch.long)])
        return zoo.layer_logits(self.exact, self.family, ids, (0, 1))


def _cd(c):
    made = decoding.ContrastiveDecodingLogitsProcessor(c.others[0], beta=1.5, alpha=0.3, **c.extra)
    return (
        made,
        lambda e, t: [c.logits(c.exact_others[0], c.prompt, t)],
        lambda e, a, t: oracle.vcd(e, a, alpha=1.5, beta=0.3),
    )


def _cad(c):
    made = decoding.ContextAwareDecodingLogitsProcessor(c.model, c.other, alpha=2)
    return made, lambda e, t: [c.logits(c.exact, c.contrast[1:], t)], lambda e, a, t: oracle.cad(e, a, alpha=2)


def _m3id(c):
    made = decoding.M3IDLogitsProcessor(c.model, c.other, lam=0.4)
    return made, lambda e, t: [c.logits(c.exact, c.contrast[1:], t)], lambda e, a, t: oracle.m3id(e, a, t, lam=0.4)


def _dola(c):
    made = decoding.DoLaLogitsProcessor(c.model, layers=[0, 1], relative_top=0.05)
    return (
        made,
        lambda e, t: [_layer(e, c.layers(t))],
        lambda e, a, t: oracle.dola(e, c.layers(t), relative_top=0.05),
    )


def _proxy(c):
    made = decoding.ProxyTuningLogitsProcessor(*c.others, alpha=0.5, **c.extra)
    return (
        made,
        lambda e, t: [c.logits(model, c.prompt, t) for model in c.exact_others],
        lambda e, a, b, t: oracle.proxy_tuning(e, a, b, alpha=0.5),
    )


METHODS = {"cd": _cd, "cad": _cad, "m3id": _m3id, "dola": _dola, "proxy": _proxy}


def _likeliest(log_p):
    order = sorted(range(len(log_p)), key=lambda v: -log_p[v])[:TOP]
    return [(v, math.exp(log_p[v])) for v in order if log_p[v] > -math.inf]


def _same(found, log_p):
    expected = _likeliest(log_p)
    assert [c.token for c in found] == [token for token, _ in expected]
    assert [c.probability for c in found] == pytest.approx([p for _, p in expected], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "t5"))])
@pytest.mark.parametrize("name", METHODS)
def test_trace_equals_float64_forwards(name, family):
    if name in ("m3id", "dola") and family == "t5":
        pytest.skip("for decoder-only models")
    case = Case(family)
    method, branches, rule = METHODS[name](case)
    steps = trace(method, case.model, case.inputs, torch.tensor(TEXT), top=TOP)
    assert [step.token for step in steps] == TEXT
    for t, step in enumerate(steps):
        main = case.logits(case.exact, case.prompt, t)
        others = branches(main, t)
        scores = rule(main, *others, t)
        logs = [reference.log_softmax(logits) for logits in (main, *others, scores)]
        assert step.log_p == pytest.approx([log_p[TEXT[t]] for log_p in logs], abs=1e-3)
        for found, log_p in zip((step.main, *step.contrasts, step.combined), logs, strict=True):
            _same(found, log_p)
        outside = [p if score == -math.inf else -math.inf for p, score in zip(logs[0], scores, strict=True)]
        assert step.ruled_out.tokens == scores.count(-math.inf)
        assert step.ruled_out.probability == pytest.approx(sum(map(math.exp, outside)), abs=1e-4)
        _same(step.ruled_out.likeliest, outside)
        assert step.ratio == pytest.approx(logs[0][TEXT[t]] - logs[1][TEXT[t]], abs=1e-3)
        assert step.changed == (TEXT[t] != _likeliest(logs[0])[0][0])


def test_trace_looks_at_one_text():
    case = Case("llama")
    method = decoding.ContrastiveDecodingLogitsProcessor(case.others[0])
    for prompts, text in ((2, torch.tensor([5])), (1, torch.tensor([[5]])), (1, torch.tensor([], dtype=torch.long))):
        inputs = {name: value.expand(prompts, -1) for name, value in case.inputs.items()}
        with pytest.raises(ValueError, match=r"trace needs a single prompt and its completion"):
            trace(method, case.model, inputs, text)


# ------------------------------------------------------------------------------------------------------------ the page

SOLVED = "finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. wins 5: 11 + 5 = 16. sells 3: 16 - 3 = 13. #### 13"
QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"


@pytest.fixture
def explain(capsys, tmp_path):
    """Run the command; give its output and the page."""

    def call(*argv):
        page = tmp_path / "page.html"
        status = cli.main(["explain", "--html", str(page), *map(str, argv)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, page.read_text()

    return call


@pytest.mark.slow
def test_the_page_of_a_changed_answer(explain):
    """Greedily the expert stops after two steps; the contrast has it go on."""
    out, page = explain("--model", "testbed:expert", "--amateur", "testbed:amateur", QUESTION)
    assert out.startswith(f"{SOLVED}\n")
    assert "tokens that greedy search would not have chosen: 1 of 47" in out
    words = re.findall(r"<label [^>]*>(.*?)</label>", page)
    assert len(words) == 47
    assert words[:4] == ["finds", "4", ":", "9"]
    assert re.findall(r'class="changed">(.*?)</label>', page) == ["wins"]
    assert 'id="t21" aria-label="token 22:  wins" checked' in page  # the changed token is shown first
    assert "Greedy search would have chosen <b>·####</b>" in page
    assert "loses 2: 13 - 2 = 11. #### 11</div>" in page
    assert "beta 0.5, alpha 0.1" in page


def test_the_page_needs_nothing_else(explain):
    _, page = explain("--model", "testbed:expert", "--amateur", "testbed:amateur", "--max-new-tokens", 3, QUESTION)
    assert not re.findall(r"<script|<link|https?:|url\(|@import", page)
    opened = re.findall(r"<(\w+)[ >]", page)
    assert all(opened.count(tag) == page.count(f"</{tag}>") for tag in set(opened) - {"meta", "input", "html"})


@pytest.mark.parametrize(
    "name", ["dola", "cid", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cfg", "cad", "icd"))]
)
def test_every_method_of_texts(explain, name):
    other = [] if name in ("dola", "cfg") else ["--contrast-prompt", "<b>{prompt}</b> & more"]
    _, page = explain("--model", "testbed:expert", "--method", name, *other, "--max-new-tokens", 4, QUESTION)
    assert page.count("<label") == 4
    assert not other or f"&lt;b&gt;{QUESTION}&lt;/b&gt; &amp; more" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [("vcd", 2), ("ritual", 2), ("m3id", 1), ("vdd", 1), ("only", 1), ("avisc", 1), ("icd", 1), ("dola", 1)],
)
def test_every_method_of_images(explain, tmp_path, name, pictures):
    zoo_llava.save(tmp_path, pictures=1)
    how = ["--model", tmp_path, "--image", tmp_path / "0.png", "--method", name, "--max-new-tokens", 6]
    other = ["--contrast-prompt", "Is there no {prompt}"] if name == "icd" else []
    _, page = explain(*how, *other, "What is in the image?")
    assert page.count('<img src="data:image/png;base64,') == pictures
    assert page.count("<label") == 6


def test_encoder_decoders(explain, tmp_path):
    zoo.build("t5", vocab_size=len(testbed.tokenizer())).save_pretrained(tmp_path)
    testbed.tokenizer().save_pretrained(tmp_path)
    how = ["--model", tmp_path, "--raw", "--method", "cad", "--contrast-prompt", "Mia saw", "--max-new-tokens", 5]
    _, page = explain(*how, "Ben went out.")
    assert page.count("<label") == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "testbed:expert", "x"], "there is no contrast to explain: set --amateur, or --method cd"),
        (
            ["--model", "testbed:expert", "--method", "cad", "x"],
            "prompt 0 has no contrast prompt: set --contrast-prompt",
        ),
        (["--model", "testbed:expert", "--method", "cfg", "--top", "0", "x"], "--top must be at least 1, not 0"),
        (["--model", "testbed:expert", "--method", "cfg", "--kappa", "1", "x"], "--method cfg has no --kappa"),
        (
            ["--model", "testbed:expert", "--method", "cfg", "--dtype", "float99", "x"],
            "--dtype must be auto or a torch",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, tmp_path, argv, message):
    assert cli.main(["explain", "--html", str(tmp_path / "page.html"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# ------------------------------------------------------------------------------------------------- how tokens are written


def _bytes():
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_words_keep_their_spaces_and_letters_of_several_bytes_come_when_they_are_whole():
    for tokenizer, text in ((_bytes(), "a é\n b"), (testbed.tokenizer(), "Ben has 12 coins.")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        none = RuledOut(0, 0.0, ())
        one = (Candidate(ids[-1], 1.0),)
        steps = [Step(token, one, (one,), one, (0.0, 0.0, 0.0), none) for token in ids]
        tokens = spell(steps, [], tokenizer)
        assert "".join(token.text for token in tokens).replace("\ufffd", "").strip() == text
    assert [token.word for token in spell(steps, [], tokenizer)] == ["Ben", "has", "1", "2", "coins", "."]
    assert [token.space for token in spell(steps, [], tokenizer)] == ["", " ", " ", "", " ", ""]
    assert [visible(text) for text in (" a", "\n", "")] == ["·a", "↵", "∅"]


def test_the_help_lists_the_options_of_the_methods_that_it_has(capsys):
    """Those of methods without a page, such as search, scd and proxy, are not offered and not mentioned."""
    with pytest.raises(SystemExit):
        cli.main(["explain", "--help"])
    text = capsys.readouterr().out
    flags = {*re.findall(r"--[a-z][a-z0-9-]*", text)}
    assert not {"--draft-length", "--k", "--expert", "--antiexpert", "--expert-load-in-4bit"} & flags
    assert {"--amateur", "--amateur-load-in-4bit", "--load-in-4bit", "--relative-top", "--noise-step", "--lam"} <= flags
    assert not re.search(r"\b(scd|search|proxy)\b", text)
    words = " ".join(text.split())
    assert "--layers high --final-norm" in words  # the defaults
    assert "--beta 0.1 --no-normalize" in words
    assert "seed of the noise and transformations of images; tokens are chosen greedily" in words
    assert "or the model itself, weakened: self:layers=8" in words
    with pytest.raises(SystemExit):
        cli.main(["explain", "--model", "testbed:expert", "--k", "3", "x"])
    assert "there is no option --k" in capsys.readouterr().err
