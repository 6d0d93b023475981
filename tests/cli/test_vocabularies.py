"""Every command of docs/vocabularies.md runs; an amateur with another tokenizer in every command that takes an amateur."""

import json
import re
import shlex
from pathlib import Path

import pytest
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from contralto import cli
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.types import Ask, Sampling, make_request
from contralto.decoding.inputs import Prompt, batch_of
from contralto.decoding.loading import load_models
from contralto.decoding.methods import DecodingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "vocabularies.md").read_text()
CORPUS = ["the cat thought that they had the hat", "12 hats and 345 cats, then a dog"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def _save(folder, size, seed, template=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = template
    made.save_pretrained(folder)
    zoo.build("llama", seed=seed, vocab_size=len(made), pad_token_id=0, eos_token_id=1).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    _save(made / "expert", 290, 1, TEMPLATE)
    _save(made / "amateur", 270, 2)
    _save(made / "chatting", 271, 2, TEMPLATE.replace("assistant", "answer"))
    return made


def test_the_command_of_the_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (command,) = re.findall(r"^    contralto (.*)$", PAGE, flags=re.MULTILINE)
    assert cli.main(shlex.split(command)) == 0
    captured = capsys.readouterr()
    assert "vocabulary aligned: 289 of 289 tokens of the expert are mapped" in captured.err
    first = captured.out
    assert cli.main([*shlex.split(command), "--executor", "processor"]) == 0
    assert capsys.readouterr().out == first


def test_without_the_option_it_is_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["generate", "--model", "expert", "--amateur", "amateur", "the cat"]) == 2
    assert "use an amateur of the same tokenizer, or --vocabulary aligned" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "expert", "--amateur", "amateur", "--vocabulary", "bytes", "the cat"])
    assert "vocabulary must be aligned" in capsys.readouterr().err
    argv = ["generate", "--model", "expert", "--amateur", "amateur", "--vocabulary", "aligned", "--method", "scd", "x"]
    assert cli.main(argv) == 2
    assert "has no --vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(("amateur", "read"), [("amateur", None), ("chatting", "user: a cat\nanswer:")])
def test_each_model_reads_its_own_chat_template(folder, amateur, read):
    config = DecodingConfig(models={"amateur": str(folder / amateur)}, parameters={"vocabulary": "aligned"})
    models = load_models(str(folder / "expert"), config, with_images=False, device="cpu")
    batch = batch_of([Prompt("a cat")], models, config, seeds=[0], raw=False)
    own = batch.aligned.get("amateur_inputs")
    tokenizer = AutoTokenizer.from_pretrained(folder / amateur)
    assert (own and tokenizer.decode(own["input_ids"][0])) == read
    raw = batch_of([Prompt("a cat")], models, config, seeds=[0], raw=True)
    assert set(raw.aligned) == {"tokenizer", "amateur_tokenizer"}


@pytest.mark.slow
def test_every_command_takes_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    models = ["--model", "expert", "--amateur", "amateur", "--vocabulary", "aligned"]
    page = tmp_path / "page.html"
    assert cli.main(["explain", *models, "--html", str(page), "--max-new-tokens", "4", "the cat"]) == 0
    assert "aligned" in page.read_text()
    engine = TransformersEngine(model="expert", method="cd", amateur="amateur", vocabulary="aligned")
    assert engine.identity["options"]["vocabulary"] == "aligned"
    ask = Ask(role="target", messages=[{"role": "user", "content": "the cat"}])
    request = make_request(
        ask, engine=engine.identity, sampling=Sampling(temperature=0, max_new_tokens=4), seed=0, row="a"
    )
    ((_, answer),) = next(engine.answer([request]))
    assert isinstance(answer.text, str)
    rows = [{"query": "the cat thought that they had the", "choices": ["hat", "dog"], "gold": 0}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "hats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }
    (tmp_path / "hats.yaml").write_text(json.dumps(task))
    arguments = "pretrained=expert,amateur=amateur,vocabulary=aligned,dtype=float32"
    output = ["--output_path", str(tmp_path / "results")]
    argv = [
        "eval",
        "--model",
        "contralto",
        "--model_args",
        arguments,
        "--tasks",
        "hats",
        "--include_path",
        str(tmp_path),
    ]
    assert cli.main([*argv, "--device", "cpu", *output]) == 0
    (results,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["hats"]["acc,none"] in (0, 1)
