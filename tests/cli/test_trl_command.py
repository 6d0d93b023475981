"""A command line of `trl dpo` and the same one of `contralto align`: the token ids that reach the model are the same."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from helpers.preference_rows import ONE, RAGGED, SCHEMAS, TEXTS, TWO, said, user

from contralto import testbed
from contralto.align import parsing
from contralto.cli import align as cli_align
from contralto.data_gen.checks import ches

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own command
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--audit", "off", "--monitor_pairs", "0"]
OURS = ("--audit", "--monitor_pairs")
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if thinking %}think{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = {
    "prompt": [{"role": "system", "content": "Be brief."}, user("Hi"), said("Hello"), user("Tom has 9 coins?")],
    "chosen": [said("9")],
    "rejected": [said("He has 4, and that is a long answer to a short question.")],
}
LONG = {"prompt": "Tom has 9 coins. " * 6, "chosen": "He has 9. " * 9, "rejected": "He has 4. " * 7}
CASES = {
    "texts": [TEXTS["explicit"], LONG],
    "conversations": [SCHEMAS["explicit prompt"], TALK],
    "tools": [ONE, TWO],
    "implicit texts": [
        {"chosen": "Tom has 9 coins.", "rejected": "Tom has 8 coins."},
        {"chosen": "a b c", "rejected": "a b dd"},
    ],
    "implicit conversations": [
        {n: TALK["prompt"] + TALK[n] for n in ("chosen", "rejected")},
        SCHEMAS["implicit prompt"],
    ],
    "transcripts": [SCHEMAS["transcripts"]] * 2,
    "prompt as transcript": [SCHEMAS["prompt as transcript"]] * 2,
    "rendered": [TEXTS["rendered"]] * 2,
    "other columns": [
        {**LONG, "id": "a", "score_chosen": 4.5, "meta": {"a": 1}},
        {**LONG, "score_chosen": 1, "meta": {"b": 2}},
    ],
    "template arguments": [{**row, "chat_template_kwargs": {"thinking": at > 0}} for at, row in enumerate((ONE, TWO))],
    "message keys": RAGGED["message keys"],
}
FLAGS = {
    "cut at the end": ["--max_length", "24"],
    "cut at the beginning": ["--max_length", "24", "--truncation_mode", "keep_end"],
    "evaluated": ["--eval_strategy", "steps"],
    "of another split": ["--dataset_train_split", "test"],
    "padded": ["--pad_to_multiple_of", "64", "--dataset_num_proc", "1", "--seed", "7"],
    "of another end": ["--pad_token", "<unk>"],
    "of a stream": ["--dataset_streaming", "true", "--max_steps", "1"],
}


@pytest.fixture
def model(tmp_path):
    """The student with a template that writes tools and calls."""
    folder = tmp_path / "model"
    shutil.copytree(testbed.path("student"), folder)
    tokenizer = testbed.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reaches(monkeypatch, tmp_path):
    """Return a function that gives what a command's model would be given."""
    caught = []
    monkeypatch.setattr(transformers.Trainer, "train", lambda trainer, **_: caught.append(trainer))
    for name in ("save_model", "end"):
        monkeypatch.setattr(transformers.Trainer, name, lambda *_, **__: None, raising=False)
        monkeypatch.setattr("contralto.align.trl_compat.PairTrainer.end", lambda _: None)

    def of(command, argv):
        argv = [str(word) for word in (*argv, "--output_dir", tmp_path / "out", *QUIET)]
        if command == "align":
            cli_align.run(argv)
        else:
            from trl.scripts import dpo

            for flag in OURS:
                del argv[argv.index(flag) : argv.index(flag) + 2]
            dpo.main(*dpo.make_parser().parse_args_and_config(argv))
        trainer = caught.pop()
        loaders = [trainer.get_train_dataloader()]
        loaders += [trainer.get_eval_dataloader()] if trainer.eval_dataset is not None else []
        return [batch for loader in loaders for batch in loader]

    return of


def written(folder, records, *, parquet=False):
    folder.mkdir()
    for split, rows in (("train", records), ("test", records[::-1][:1])):
        if parquet:
            Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(reaches, *argv):
    theirs, ours = reaches("dpo", argv), reaches("align", argv)
    assert len(theirs) == len(ours) > 0
    for expected, found in zip(theirs, ours, strict=True):
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert torch.equal(found[name], expected[name]), name


def slow(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", slow(CASES, ("texts",)))
def test_the_same_rows(model, reaches, tmp_path, case):
    compare(reaches, "--model_name_or_path", model, "--dataset_name", written(tmp_path / "data", CASES[case]))


@pytest.mark.parametrize("flags", slow(FLAGS, ()))
@pytest.mark.parametrize("case", slow(("texts", "conversations"), ("texts",)))
def test_the_same_flags(model, reaches, tmp_path, case, flags):
    data = written(tmp_path / "data", CASES[case] * 3)
    compare(reaches, "--model_name_or_path", model, "--dataset_name", data, *FLAGS[flags])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["texts", "implicit texts", "conversations"])
def test_the_same_parquet_files(model, reaches, tmp_path, case):
    compare(
        reaches, "--model_name_or_path", model, "--dataset_name", written(tmp_path / "data", CASES[case], parquet=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"streaming": True, "max_steps": 2}, {"test_split_size": 0.25, "eval_strategy": "steps"}], ids=str
)
def test_the_same_mixture(model, reaches, tmp_path, more):
    one, two = written(tmp_path / "one", CASES["texts"]), written(tmp_path / "two", CASES["rendered"])
    mixture = [
        {"path": str(one)},
        {"path": "json", "data_files": str(two / "train.jsonl"), "columns": ["prompt", "chosen", "rejected"]},
    ]
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(yaml.safe_dump({"datasets": mixture, **more}))
    compare(reaches, "--config", recipe, "--model_name_or_path", model)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["texts", "implicit texts"])
def test_the_same_without_a_template(model, reaches, tmp_path, case):
    (model / "chat_template.jinja").unlink()
    compare(reaches, "--model_name_or_path", model, "--dataset_name", written(tmp_path / "data", CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["texts", "conversations", "tools", "template arguments", "rendered"])
def test_ches_reads_the_same_tokens(model, reaches, tmp_path, case):
    data = written(tmp_path / "data", CASES[case])
    (batch,) = reaches(
        "align", ["--model_name_or_path", model, "--dataset_name", data, "--train_sampling_strategy", "sequential"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [
        ches._tokens(tokenizer, row, at, name, None)
        for name in ("chosen", "rejected")
        for at, row in enumerate(CASES[case])
    ]
    for text, ids, kept in zip(texts, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert text.ids == ids[kept].tolist()
    assert [len(text.ids) - text.prompt for text in texts] == batch["completion_mask"].sum(-1).tolist()


DIFFER = {"bf16", "mixed_precision", "dtype"}
"""Defaults of our own: bf16 where there is an accelerator, and adapters then in bfloat16; `distributed_state` has no equality."""
BASE = ["--output_dir", "out", "--report_to", "none", "--use_cpu", "true"]


def options(parser, *argv):
    """What a parser makes of flags, by name; None where it takes none of it."""
    try:
        parsed = parser.parse_args_and_config([*BASE, *argv])
    except (ValueError, OSError, ImportError, SystemExit):
        return None
    return {name: value for each in parsed for name, value in vars(each).items() if name != "distributed_state"}


def another(action):
    """A flag with a value that is not its default."""
    flag = next(
        (each for each in action.option_strings if "no_" in each and action.nargs == 0), action.option_strings[0]
    )
    if action.nargs == 0:
        return [flag]
    if action.choices:
        return [flag, str(next((each for each in action.choices if each != action.default), action.default))]
    if isinstance(action.default, bool):
        return [flag, str(not action.default)]
    return [flag, "3" if action.type is int else "0.25"]


@pytest.mark.slow
def test_every_option_arrives_or_is_refused():
    """All options of `trl dpo`, each with another value than its default: the same value, or an error; and the same defaults."""
    from trl.scripts.dpo import make_parser

    theirs, ours = options(make_parser()), options(parsing.make_parser())
    assert {name for name in theirs if ours[name] != theirs[name]} == DIFFER
    moved = set()
    for action in make_parser()._actions:
        if action.dest in ("help", "config") or action.option_strings[0] in BASE:
            continue
        expected, found = options(make_parser(), *another(action)), options(parsing.make_parser(), *another(action))
        if expected is None or found is None:
            continue
        assert found[action.dest] == expected[action.dest], action.option_strings
        if expected[action.dest] != theirs[action.dest]:
            moved.add(action.dest)
    assert len(moved) > 120


@pytest.mark.slow
def test_conversations_are_made_of_texts_when_it_is_asked(model, reaches, tmp_path):
    argv = ["--model_name_or_path", model, "--dataset_name", written(tmp_path / "data", CASES["texts"])]
    talks = [
        {name: [user(row[name]) if name == "prompt" else said(row[name])] for name in row} for row in CASES["texts"]
    ]
    spelled = ["--model_name_or_path", model, "--dataset_name", written(tmp_path / "talks", talks)]
    for found, expected in zip(reaches("align", [*argv, "--conversations"]), reaches("align", spelled), strict=True):
        assert torch.equal(found["input_ids"], expected["input_ids"])
    assert not torch.equal(reaches("align", argv)[0]["input_ids"], reaches("align", spelled)[0]["input_ids"])
