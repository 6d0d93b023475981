"""The repositories for `custom_generate`: their files are the declared ones, and `generate()` decodes with them as with the methods."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from oracles import decoding as reference
from oracles import rules as oracle
from transformers import GenerationConfig, dynamic_module_utils
from transformers.generation.streamers import BaseStreamer

from contralto import decoding
from contralto.cli import main
from contralto.decoding import hub
from contralto.decoding.executors.search import ContrastiveSearch
from contralto.decoding.images import noised

ROOT = Path(__file__).parents[3]
STEPS = 8
PLAIN = {"do_sample": False, "max_new_tokens": STEPS}


@pytest.fixture(autouse=True)
def _own_modules(tmp_path, monkeypatch):
    """transformers copies the code of repositories to a folder of the user."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama", seed=1)


@pytest.fixture(scope="module")
def amateur():
    return zoo.build("llama", hidden=16, seed=2)


def _inputs(batch=2, seed=3):
    return zoo.pad(zoo.prompts(batch, seed=seed))


def _generate(model, name, inputs, **how):
    return model.generate(**inputs, custom_generate=str(ROOT / "hub" / name), trust_remote_code=True, **PLAIN | how)


def test_the_documentation_lists_the_arguments():
    rows = re.findall(
        r"^\| \[([a-z-]+)\]\(../hub/\1/README.md\) \| (.*) \|$", (ROOT / "docs" / "hub.md").read_text(), re.MULTILINE
    )
    assert dict(rows) == {n: ", ".join(f"`{a.name}`" for a in r.arguments) for n, r in hub.REPOSITORIES.items()}


@pytest.mark.parametrize("name", list(hub.REPOSITORIES))
def test_committed_files_are_the_declared_ones(name):
    folder = ROOT / "hub" / name
    committed = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert committed == hub.files(name), "python -m contralto.decoding.hub.contents hub"


def test_contrastive_decoding_equals_the_reference(model, amateur):
    rows = zoo.prompts(2, seed=3)
    doubles = zoo.build("llama", seed=1).double(), zoo.build("llama", hidden=16, seed=2).double()
    inputs = zoo.pad(rows)
    found = _generate(model, "contrastive-decoding", inputs, amateur=amateur, beta=0.7, alpha=0.05)
    for row, prompt in zip(found[:, inputs["input_ids"].shape[1] :].tolist(), rows, strict=True):
        expected = reference.greedy(reference.scorer(*doubles, beta=0.7, alpha=0.05), prompt, STEPS, zoo.EOS)
        assert row[: len(expected)] == expected


def test_context_aware_decoding_equals_the_reference(model):
    (prompt,), (other,) = zoo.prompts(1, seed=3), zoo.prompts(1, seed=4)
    double = zoo.build("llama", seed=1).double()

    def scores(ids):
        views = ids, torch.cat([other, ids[len(prompt) :]])
        return torch.tensor(oracle.cad(*(reference.next_logits(double, view) for view in views), alpha=0.9))

    found = _generate(model, "cad", zoo.pad([prompt]), contrast_inputs=zoo.pad([other]), alpha=0.9)
    expected = reference.greedy(scores, prompt, STEPS, zoo.EOS)
    assert found[0, len(prompt) :].tolist()[: len(expected)] == expected


def _pairs(model, amateur):
    """Yield repositories with their arguments, and the method of the package."""
    negative = _inputs(seed=5)
    ids = {"negative_prompt_ids": negative["input_ids"], "negative_prompt_attention_mask": negative["attention_mask"]}
    yield (
        "cfg",
        {"guidance_scale": 2.5, **ids},
        decoding.ClassifierFreeGuidanceLogitsProcessor(model, negative, guidance_scale=2.5),
    )
    yield "cfg", {"guidance_scale": 2.5}, decoding.ClassifierFreeGuidanceLogitsProcessor(model, guidance_scale=2.5)
    layers = {"dola_layers": [0, 1], "form": "jsd", "relative_top": 0.01}
    yield "dola", layers, decoding.DoLaLogitsProcessor(model, layers=[0, 1], form="jsd", relative_top=0.01)
    li = {"form": "li", "amateur_temperature": 0.5, "alpha": 0.02}
    processor = decoding.ContrastiveDecodingLogitsProcessor
    yield "contrastive-decoding", {"amateur": amateur, **li}, processor(amateur, **li)
    own = decoding.EarlyExit(model, layers=1)
    yield "contrastive-decoding", {"amateur": "self:layers=1", "alpha": 0.01}, processor(own, alpha=0.01)


def test_tokens_are_those_of_the_methods(model, amateur):
    inputs, plain = _inputs(), _generate_plainly(model)
    for name, own, method in _pairs(model, amateur):
        expected = model.generate(**inputs, logits_processor=[method], **PLAIN)
        assert not torch.equal(expected, plain)
        assert torch.equal(_generate(model, name, inputs, **own), expected), name


def _generate_plainly(model):
    return model.generate(**_inputs(), **PLAIN)


def test_contrastive_search_takes_the_arguments_of_transformers(model):
    inputs = _inputs()
    expected = model.generate(**inputs, custom_generate=ContrastiveSearch(alpha=0.8, k=5), **PLAIN)
    assert not torch.equal(expected, _generate_plainly(model))
    assert torch.equal(_generate(model, "contrastive-search", inputs, penalty_alpha=0.8, top_k=5), expected)


@pytest.mark.slow
def test_visual_contrastive_decoding_makes_the_noise():
    from transformers import AutoProcessor

    from contralto import testbed
    from contralto.testbed import scenes

    model = testbed.load("vision-0")
    processor = AutoProcessor.from_pretrained(testbed.path("vision-0"))
    image = next(scenes.scenes(0, "test")).image()
    content = [{"type": "image", "image": image}, {"type": "text", "text": scenes.DESCRIBE}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **how)
    view = noised(inputs, step=900, seed=3)
    method = decoding.VisualContrastiveDecodingLogitsProcessor(model, view, alpha=1.5, beta=0.01)
    how = {"max_new_tokens": 24, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**inputs, logits_processor=[method], **PLAIN | how)
    found = _generate(model, "vcd", inputs, alpha=1.5, beta=0.01, seed=3, noise_step=900, **how)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores)
    with pytest.raises(ValueError, match="no pixel_values"):
        _generate(model, "vcd", {name: inputs[name] for name in ("input_ids", "attention_mask")})


def test_beams_are_those_of_the_processor(model, amateur):
    inputs, how = _inputs(), {"num_beams": 3, "num_return_sequences": 2}
    method = decoding.ContrastiveDecodingLogitsProcessor(amateur, beta=0.7, min_tokens_to_keep=2)
    expected = model.generate(**inputs, logits_processor=[method], **PLAIN | how)
    assert torch.equal(_generate(model, "contrastive-decoding", inputs, amateur=amateur, beta=0.7, **how), expected)
    config = GenerationConfig(num_beams=3, num_return_sequences=2)
    found = _generate(model, "contrastive-decoding", inputs, amateur=amateur, beta=0.7, generation_config=config)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_an_encoder_decoder():
    expert, amateur = zoo.build("t5", seed=1), zoo.build("t5", hidden=16, seed=2)
    inputs = zoo.pad(zoo.prompts(2, seed=3), side="right")
    for how in ({}, {"num_beams": 2}):
        keep = {"min_tokens_to_keep": 2} if how else {}
        method = decoding.ContrastiveDecodingLogitsProcessor(amateur, beta=0.7, encoder_inputs=inputs, **keep)
        expected = expert.generate(**inputs, logits_processor=[method], **PLAIN | how)
        found = _generate(expert, "contrastive-decoding", inputs, amateur=amateur, beta=0.7, **how)
        assert torch.equal(found, expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.tokens.append(None)


def test_arguments_of_generate_are_kept(model, amateur):
    """Prompts without a name, a streamer, processors, stopping strings, and a revision with which the repository is loaded."""
    ids, streamer = zoo.prompts(1, seed=3)[0][None], Recorder()
    seen = []
    how = {"logits_processor": [lambda ids, scores: seen.append(ids.shape[1]) or scores], "revision": "main"}
    found = model.generate(
        ids,
        custom_generate=str(ROOT / "hub" / "contrastive-decoding"),
        trust_remote_code=True,
        amateur=amateur,
        streamer=streamer,
        **PLAIN | how,
    )
    expected = model.generate(ids, logits_processor=[decoding.ContrastiveDecodingLogitsProcessor(amateur)], **PLAIN)
    assert torch.equal(found, expected)
    assert len(seen) == expected.shape[1] - ids.shape[1]
    assert torch.equal(torch.cat([part.reshape(-1) for part in streamer.tokens[:-1]]), found[0])


def test_stop_strings_reach_a_criterion(model, amateur, monkeypatch):
    """transformers gives the tokenizer to no decoding loop, and would raise an error."""
    inputs, ends = _inputs(1), []

    def criterion(tokenizer, strings):
        ends.append((tokenizer, strings))
        return lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= inputs["input_ids"].shape[1] + 3)

    monkeypatch.setattr("contralto.decoding.hub.run.StopStringCriteria", criterion)
    how = {"amateur": amateur, "tokenizer": "a tokenizer", "stop_strings": ["."], "min_new_tokens": 4}
    assert _generate(model, "contrastive-decoding", inputs, **how).shape[1] == inputs["input_ids"].shape[1] + 3
    assert ends == [("a tokenizer", ["."])]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hub.REPOSITORIES))
def test_examples_of_the_readmes_run(name, monkeypatch, tmp_path, capsys):
    """With the embedded models in place of those that the examples name."""
    import transformers
    from PIL import Image

    from contralto import testbed
    from contralto.testbed import scenes

    code = (ROOT / "hub" / name / "README.md").read_text().split("```py\n")[1].split("```")[0]
    code = code.replace(f"./hub/{name}", str(ROOT / "hub" / name))
    models = {"HuggingFaceTB/SmolLM2-135M-Instruct": "amateur", "llava-hf/llava-1.5-7b-hf": "vision-0"}
    for kind in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer", "AutoProcessor"):
        read = getattr(transformers, kind).from_pretrained

        def from_pretrained(repo, *, read=read, device_map=None):
            return read(testbed.path(models.get(repo, "expert")))

        monkeypatch.setattr(transformers, kind, SimpleNamespace(from_pretrained=from_pretrained))
    image = next(scenes.scenes(0, "test")).image()
    monkeypatch.setattr(Image, "open", lambda path: image)
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out.strip()


def test_a_model_whose_own_repository_holds_the_code(model, amateur, monkeypatch):
    """transformers replaces `generate` of such a model, which must not be called again."""
    loaded = model.load_custom_generate(str(ROOT / "hub" / "contrastive-decoding"), trust_remote_code=True)
    expected = _generate(model, "contrastive-decoding", _inputs(), amateur=amateur)
    monkeypatch.setattr(model, "generate", lambda **kwargs: loaded(model=model, **kwargs), raising=False)
    assert torch.equal(model.generate(**_inputs(), amateur=amateur, **PLAIN), expected)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("contrastive-decoding", {}, "contrastive-decoding needs amateur: pass the weaker model"),
        ("contrastive-decoding", {"amateur": "org/small"}, "amateur must be a model, not its name 'org/small'"),
        ("contrastive-decoding", {"amateur": None, "beta": 1}, "needs amateur"),
        ("contrastive-decoding", {"amateur": "self:layers=1", "form": "li", "beta": 1.0}, "has no beta"),
        ("contrastive-decoding", {"amateur": "self:layers=1", "alpha": 2}, "alpha must lie in"),
        ("contrastive-decoding", {"amateur": "self:layers=1", "gamma": 2}, "gamma"),
        ("contrastive-decoding", {"amateur": "self:layers=1", "assistant_model": 1}, "does not use assistant_model"),
        ("contrastive-search", {"num_beams": 2}, "has no beams"),
        (
            "contrastive-search",
            {"generation_config": GenerationConfig(penalty_alpha=0.5, top_k=3)},
            "contrastive search",
        ),
        ("dola", {"dola_layers": "middle"}, "low, high or numbers"),
        ("cad", {}, "cad needs contrast_inputs"),
        ("cfg", {"generation_config": GenerationConfig(guidance_scale=2.0)}, "remove it from the generation config"),
    ],
)
def test_what_nothing_would_read_is_rejected(model, name, own, message):
    with pytest.raises((ValueError, TypeError), match=message):
        _generate(model, name, _inputs(1), **own)


def test_code_runs_only_where_it_is_trusted(model):
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**_inputs(1), custom_generate=str(ROOT / "hub" / "dola"), trust_remote_code=False)


class FakeHub:
    """Stands for `huggingface_hub.HfApi`."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **how):
        self.calls.append(("create_repo", repo_id, how))

    def create_commit(self, repo_id, operations, *, commit_message):
        self.calls.append(("create_commit", repo_id, {o.path_in_repo: o.path_or_fileobj for o in operations}))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_push_uploads_the_files_in_one_commit(monkeypatch, capsys):
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    assert main(["hub", "push", "cad", "me/context-aware", "--private"]) == 0
    (_, _, how), (_, repo_id, contents) = fake.calls
    assert how == {"private": True, "exist_ok": True}
    assert repo_id == "me/context-aware"
    assert set(contents) == set(hub.files("cad"))
    assert b'custom_generate="me/context-aware"' in contents["README.md"]
    assert capsys.readouterr().out == "https://hub/me/context-aware/commit/1\n"


@pytest.mark.parametrize(
    ("repo_id", "name", "message"),
    [
        ("context-aware", "cad", "repo_id must be USER/NAME"),
        ("me/a b", "cad", "Repo id must use alphanumeric chars"),
        ("me/x", "beam", "there is no repository 'beam'; there are contrastive-decoding"),
    ],
)
def test_push_rejects_wrong_names_before_it_connects(repo_id, name, message, capsys):
    assert main(["hub", "push", name, repo_id]) == 2
    assert message in capsys.readouterr().err
    assert main(["hub", "push", name, repo_id, "--dry-run"]) == 2  # says what a real run would say
    assert message in capsys.readouterr().err


def test_a_dry_run_and_a_folder_show_the_same_files(tmp_path, capsys):
    assert main(["hub", "push", "dola", "me/dola", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in hub.files("dola", "me/dola").values())
    assert main(["hub", "write", str(tmp_path), "dola"]) == 0
    assert (tmp_path / "dola" / "custom_generate" / "generate.py").read_text() in shown
    assert not (tmp_path / "cad").exists()
    assert main(["hub", "list"]) == 0
    assert set(re.findall(r"^([a-z-]+):", capsys.readouterr().out, re.MULTILINE)) == set(hub.REPOSITORIES)
