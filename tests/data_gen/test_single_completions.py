"""Strategies that make single completions: their data set, its card, the commands, and the trainers that read it."""

import json
import sys

import pytest
import yaml

from contralto import cli
from contralto.data_gen import load_pairs, load_unpaired
from contralto.data_gen.types import Ask, Labelled, Pair, Rejected, drive

STRATEGIES = '''
from contralto.data_gen import Ask, Labelled, Pair, Rejected

def labelled(row, *, wrong=True):
    """The row's reply to learn, and its reverse to avoid."""
    answer = yield Ask(role="target", messages=row["prompt"])
    columns = {"length": len(answer.text)}
    made = [Labelled(prompt=row["prompt"], completion=answer.text, columns=columns)]
    return made + [Labelled(prompt=row["prompt"], completion=answer.text[::-1], label=False, columns=columns)] * wrong

def paired(row):
    answer = yield Ask(role="target", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=answer.text, rejected=answer.text[::-1])

def echo(request):
    return "so " + request.messages[-1]["content"]
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a recipe beside strategies of its own, and returns its path."""
    sys.modules.pop("single_strategies", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "single_strategies.py").write_text(STRATEGIES)
    rows = [{"id": f"r{i}", "prompt": f"question {i}", "label": "mine", "topic": i} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def written(*strategies, **more):
        path = tmp_path / "recipe.yaml"
        recipe = {
            "output": "out",
            "rows": "rows.jsonl",
            "strategies": [f"single_strategies:{name}" if isinstance(name, str) else name for name in strategies],
            "roles": {"target": {"engine": "function", "use": "single_strategies:echo"}},
        }
        path.write_text(yaml.safe_dump(recipe | more))
        return path

    yield written
    sys.modules.pop("single_strategies", None)


def test_a_data_set_of_completions(write, tmp_path, capsys):
    path = write("labelled")
    assert cli.main(["data", "run", str(path)]) == 0
    folder = tmp_path / "out" / "dataset"
    assert f"{folder}: 8 completions, 0 rejected, 0 failed" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    first = lines[0]
    assert (first["prompt"], first["completion"], first["label"]) == (
        [{"role": "user", "content": "question 0"}],
        [{"role": "assistant", "content": "so question 0"}],
        True,
    )
    assert (first["strategy"], first["source_label"], first["topic"]) == ("labelled", "mine", 0)
    assert [line["label"] for line in lines] == [True, False] * 4
    assert not {"chosen", "rejected"} & first.keys()
    read = load_unpaired(folder)
    assert (len(read), read[1]["label"], read[1]["completion"][0]["content"]) == (8, False, "0 noitseuq os")
    card = (folder / "README.md").read_text()
    assert "8 completions of 4 prompts" in card
    assert "| labelled | 8 | 4 | 4 |" in card
    assert "tags: [sft, synthetic, contralto]" in card
    assert "so question 0" in card
    for word in ("Jaccard", "preference", "rejected as lists", "plots/"):
        assert word not in card
    assert not (folder / "plots").exists()
    assert cli.main(["data", "status", str(path)]) == 0
    assert "8" in capsys.readouterr().out
    assert cli.main(["data", "preview", str(path), "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "to learn" in shown
    assert "to avoid" in shown


def test_filters_read_the_columns_of_completions(write, tmp_path, capsys):
    path = write("labelled", filters={"label": True})
    assert cli.main(["data", "run", str(path)]) == 0
    assert "4 completions, 0 rejected, 0 failed, 4 dropped by filters" in capsys.readouterr().out
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dataset" / "rejected.jsonl").read_text().splitlines()]
    assert dropped[0]["completion"] == [{"role": "assistant", "content": "0 noitseuq os"}]


@pytest.mark.parametrize(
    ("strategies", "more", "message"),
    [
        (
            ["labelled"],
            {"checks": {"contrast": {}}},
            "labelled makes single completions, and checks measure pairs: leave checks out",
        ),
        (["labelled", "paired"], {}, "labelled makes single completions, and another strategy pairs"),
    ],
)
def test_what_completions_cannot_have_is_said(write, capsys, strategies, more, message):
    assert cli.main(["data", "run", str(write(*strategies, **more))]) == 2
    assert message in capsys.readouterr().err


def test_completions_to_learn_are_read_for_fine_tuning(write, tmp_path):
    assert cli.main(["data", "run", str(write("labelled"))]) == 0
    rows = load_pairs(tmp_path / "out" / "dataset", needs_rejected=False)
    assert [row["chosen"][0]["content"] for row in rows] == [f"so question {i}" for i in range(4)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 0"}]
    (tmp_path / "texts.jsonl").write_text(
        '{"question": "2 + 2?", "completion": "4", "label": 1}\n{"question": "2 + 3?", "completion": "6", "label": 0}\n'
        '{"question": "2 + 1?", "completion": "3"}\n'
    )
    nectar = {"prompt": "2 + 2?", "completion": "4", "answers": ["4", "four"]}
    (tmp_path / "forms.jsonl").write_text(json.dumps(nectar))
    assert load_pairs(tmp_path / "forms.jsonl", needs_rejected=False)[0]["answers"] == ["4", "four"]
    (one, other) = load_pairs(tmp_path / "texts.jsonl", needs_rejected=False, columns={"prompt": "question"})
    assert (one["prompt"], one["chosen"], other["chosen"]) == ("2 + 2?", "4", "3")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "2 + 2?", "completion": "4", "label": false}\n')
    with pytest.raises(ValueError, match="has no rows"):
        load_pairs(tmp_path / "bad.jsonl", needs_rejected=False)


@pytest.mark.slow
def test_fine_tuning_reads_the_data_set_here_and_in_trl(write, tmp_path):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from contralto import testbed
    from contralto.align import run as align_run

    assert cli.main(["data", "run", str(write({"use": "single_strategies:labelled", "wrong": False}))]) == 0
    data = str(tmp_path / "out" / "dataset")
    few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    few += ["--report_to", "none", "--use_cpu", "true"]
    model = ["--model_name_or_path", "testbed:amateur", "--dataset_name", data]
    align_run.run(["distill_sft", *model, *few, "--output_dir", str(tmp_path / "tuned")], launched=True)
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    args = SFTConfig(str(tmp_path / "trl"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(str(testbed.path("amateur")), args=args, train_dataset=load_dataset(data, split="train"))
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_an_empty_completion_is_rejected():
    def silent(row):
        yield Ask(role="target", messages=row["prompt"])
        return [Labelled(prompt=row["prompt"], completion=" \n"), Labelled(prompt=row["prompt"], completion="x")]

    driven = drive(silent({"prompt": [{"role": "user", "content": "?"}]}))
    next(driven)
    with pytest.raises(StopIteration) as end:
        driven.send([None])
    empty, whole = end.value.value
    assert empty == Rejected("the completion is empty")
    assert (whole.completion, whole.label) == ("x", True)
    assert not isinstance(whole, Pair)
