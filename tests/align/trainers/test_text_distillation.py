"""A teacher with another tokenizer: loss and gradients from whole logits in float64, what it reads, one vocabulary, what is rejected."""

import itertools
import json
import math

import pytest
import torch
import zoo
from datasets import Dataset
from helpers.ranks import run_ranks
from helpers.vocabularies import byte_level
from oracles import align as plain
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tokenizers import normalizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.align import parsing
from contralto.align import run as align_run
from contralto.align.losses.cross_tokenizer import MatchedTokens, gold, universal_logit_distance
from contralto.align.trainers.distillation import DistillationPairTrainer
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.align.trainers.text_alignment import OtherTokens, SameTokens
from contralto.align.trainers.text_comparison import COMPARISONS
from contralto.cli import align as cli_align
from contralto.testbed import worlds

SPECIAL = ["<|user|>", "<|bot|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
END = 4
"""The teacher's token that ends a turn; 1 ends its texts."""


def pairs(size=6, seed=0):
    """Rows of solutions that the student's tokenizer spells, of different lengths."""
    problems = [problem for problem in itertools.islice(worlds.problems(seed, "train"), 4 * size)][:size]
    rows = []
    for i, problem in enumerate(problems):
        rejected = problems[i - 1].solution(stop_after=1)
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": problem.solution()}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return Dataset.from_list(rows)


def _texts():
    return [p.question + " " + p.solution() for p in itertools.islice(worlds.problems(5, "train"), 60)]


def _save(folder, tokenizer, family, hidden, seed, ends, width=512):
    shape = {"hidden": hidden, "seed": seed, "max_position_embeddings": width, "initializer_range": 0.2}
    model = zoo.build(family, vocab_size=len(tokenizer), **shape)
    for each in (model.config, model.generation_config):
        each.pad_token_id, each.bos_token_id, each.eos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id, ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: the student; teachers with a template, without one, with its tokenizer, with a short context."""
    root, tokenizer = tmp_path_factory.mktemp("models"), testbed.tokenizer()
    chats, plain_texts = (byte_level(400, _texts(), SPECIAL) for _ in range(2))
    chats.chat_template = TEMPLATE
    own = tokenizer.eos_token_id
    return {
        "student": _save(root / "student", tokenizer, "llama", 16, 0, own),
        "teacher": _save(root / "teacher", chats, "qwen3", 24, 1, [1, END]),
        "plain": _save(root / "plain", plain_texts, "qwen3", 24, 1, 1),
        "same": _save(root / "same", tokenizer, "qwen3", 24, 2, own),
        "short": _save(root / "short", chats, "qwen3", 24, 1, [1, END], width=40),
    }


def lora():
    shape = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(init_lora_weights=False, **shape)


def config(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "num_train_epochs": 1, "logging_steps": 1}
    return DistillationConfig(str(folder / "out"), **quiet | small | options)


def trainer(folder, model, *, dataset=None, teacher=None, peft_config=None, eval_dataset=None, **options):
    data = {"train_dataset": dataset or pairs(), "eval_dataset": eval_dataset}
    return DistillationPairTrainer(model, teacher, args=config(folder, **options), peft_config=peft_config, **data)


def _step(one):
    """The loss of a batch, gradients by name, metrics, the batch."""
    one.model.zero_grad()
    one._metrics["train"].clear()
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    loss = one._compute_loss(one.model.train(), dict(batch), return_outputs=False)
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in one.model.named_parameters() if weight.grad is not None}
    return loss.detach(), grads, {name: values[-1] for name, values in one._metrics["train"].items()}, batch


# ------------------------------------------------------------------------------------------- loss and gradients, exactly


class Row:
    """A completion as both models read it, by tokens and texts alone."""

    def __init__(self, batch, row, tokenizer):
        own = testbed.tokenizer()
        scored = batch["completion_mask"][row].bool()
        kept = batch["attention_mask"][row].bool()
        self.ids = batch["input_ids"][row][kept]
        self.start = int(scored.nonzero()[0])
        completion = self.ids[self.start :].tolist()
        text = own.decode(completion, skip_special_tokens=True).strip()
        prompt = own.decode(self.ids[: self.start], skip_special_tokens=True).strip()
        chat = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        read = [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
        self.teacher_ids, self.teacher_start = torch.tensor(before + read), len(before)
        assert completion[-1] == own.eos_token_id
        pieces = [own.convert_ids_to_tokens(i).replace("▁", " ") for i in completion[:-1]]
        pieces[0] = pieces[0].lstrip(" ")
        of_teacher = [tokenizer.decode([i]) for i in read[:-1]]
        assert "".join(pieces) == "".join(of_teacher) == text
        self.runs = [*self._runs(pieces, of_teacher), ([len(pieces)], [len(of_teacher)])]

    @staticmethod
    def _runs(pieces, of_teacher):
        runs, own, other, a, b = [], [], [], "", ""
        left, right = iter(enumerate(pieces)), iter(enumerate(of_teacher))
        while len(a) < sum(map(len, pieces)) or len(b) < sum(map(len, of_teacher)):
            if len(a) <= len(b):
                i, piece = next(left)
                own.append(i)
                a += piece
            else:
                j, piece = next(right)
                other.append(j)
                b += piece
            if len(a) == len(b) and own and other:
                runs.append((own, other))
                own, other = [], []
        return runs

    def logits(self, student, of_teacher):
        """`(tokens, V)` of the student, `(tokens, W)` of the teacher, before each token of the completion."""
        z = student(input_ids=self.ids[None]).logits[0, self.start - 1 : -1]
        with torch.no_grad():
            x = of_teacher(input_ids=self.teacher_ids[None]).logits[0, self.teacher_start - 1 : -1]
        return z, x


def _pairs_of(own, other):
    """The tokens of the same text, by strings alone."""
    names = {own.convert_ids_to_tokens(i).replace("▁", " "): i for i in range(len(own))}
    found = [
        (names[text], i)
        for i in range(len(other))
        if (text := other.convert_ids_to_tokens(i).replace("Ġ", " ")) in names
    ]
    ended = [(a, b) for a, b in found if a != own.eos_token_id and b != END]
    return sorted([*ended, (own.eos_token_id, END)])


def _expected(one, of_teacher, batch, options):
    """The loss as a tensor with a gradient, checked in plain Python."""
    args, tokenizer = one.args, AutoTokenizer.from_pretrained(of_teacher.name_or_path)
    matched = _pairs_of(testbed.tokenizer(), tokenizer)
    size, total, temperature = len(batch["input_ids"]) // 2, 0.0, args.temperature
    name, at = args.loss_type[0], 0 if options.get("merge", "observed") == "observed" else -1
    for i in range(2 * size):
        weight = args.weights[i >= size]
        if not weight:
            continue
        row = Row(batch, i, tokenizer)
        z, x = row.logits(one.model, of_teacher)
        runs = row.runs
        if name == "uld" and options.get("pairing") != "text":
            runs = [([k], [k]) for k in range(min(len(z), len(x)))]
        targets = row.ids[row.start :], row.teacher_ids[row.teacher_start :]
        logs = [(each / temperature).log_softmax(-1) for each in (z, x)]
        values = []
        for run in runs:
            others = [[k for k in run[side] if k != run[side][at]] for side in (0, 1)]
            scales = [sum((logs[side][k, targets[side][k]] for k in others[side]), torch.zeros(())) for side in (0, 1)]
            rows = z[run[0][at]], x[run[1][at]]
            scaled = {"student_log_scale": scales[0], "teacher_log_scale": scales[1], "temperature": temperature}
            numbers = [[v / temperature for v in each.tolist()] for each in rows]
            c, d = (math.exp(float(scale.detach())) for scale in scales)
            if name == "uld":
                values.append(universal_logit_distance(*rows, **scaled))
                expected = plain.uld(*numbers, c, d)
            else:
                weights = options.get("matched_weight"), options.get("unmatched_weight")
                ids = MatchedTokens(*torch.tensor(matched).T)
                values.append(
                    gold(*rows, ids, beta=args.beta, matched_weight=weights[0], unmatched_weight=weights[1], **scaled)
                )
                expected = plain.gold(*numbers, matched, c, d, beta=args.beta, weights=weights if weights[0] else None)
            assert values[-1].item() == pytest.approx(expected, rel=1e-6)
        total = (
            total
            + weight
            / size
            * options.get("distillation_weight", 1.5 if name == "uld" else 1.0)
            * torch.stack(values).mean()
        )
        crossentropy = options.get("crossentropy_weight", 1.0 if name == "uld" else 0.0)
        if i < size and crossentropy:
            likelihood = z.log_softmax(-1).gather(-1, targets[0][:, None]).mean()
            total = total - weight / size * crossentropy * likelihood
    return total


CASES = [
    {"loss_type": "uld"},
    {"loss_type": "uld", "pairing": "text", "merge": "bayesian", "temperature": 1.7, "lmbda": 0.5},
    {"loss_type": "gold"},
    {"loss_type": "gold", "matched_weight": 0.6, "unmatched_weight": 0.4, "beta": 0.9, "merge": "bayesian"},
    {"loss_type": "gold", "crossentropy_weight": 0.5, "distillation_weight": 2.0, "lmbda": 0.25, "temperature": 0.8},
]


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [pytest.param(case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(CASES)],
    ids=str,
)
def test_loss_and_gradients_equal_whole_logits_in_float64(models, tmp_path, options, adapter):
    student, of_teacher = (
        AutoModelForCausalLM.from_pretrained(models[name]).double() for name in ("student", "teacher")
    )
    peft_config = lora() if adapter else None
    one = trainer(tmp_path, student, teacher=of_teacher, peft_config=peft_config, **options)
    found, grads, metrics, batch = _step(one)
    one.model.zero_grad()
    expected = _expected(one, of_teacher, batch, options)
    assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-9)
    expected.backward()
    compared = {name: weight.grad for name, weight in one.model.named_parameters() if weight.grad is not None}
    assert compared.keys() == grads.keys()
    for name, grad in compared.items():
        assert_close(grads[name], grad, rtol=1e-4, atol=1e-8)
    if options.get("pairing", options["loss_type"]) != "uld":
        assert metrics["aligned/chosen"] == 1
    assert ("aligned/rejected" in metrics) == (one.args.weights[1] > 0)
    assert ("crossentropy/chosen" in metrics) == (one.args.text_options.crossentropy > 0)


def test_the_log_compares_the_likelihood_of_texts(models, tmp_path):
    """Of the teacher per token of the student, so that both are of the same text and the same number of tokens."""
    student, of_teacher = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("student", "teacher"))
    one = trainer(tmp_path, student, teacher=of_teacher, loss_type="gold", per_device_train_batch_size=1)
    _, _, metrics, batch = _step(one)
    row = Row(batch, 0, AutoTokenizer.from_pretrained(models["teacher"]))
    z, x = row.logits(one.model, of_teacher)
    for name, logits, ids in (
        ("logps", z, row.ids[row.start :]),
        ("teacher_logps", x, row.teacher_ids[row.teacher_start :]),
    ):
        expected = logits.log_softmax(-1).gather(-1, ids[:, None]).sum().item() / len(z)
        assert metrics[f"{name}/chosen"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- what the teacher reads


def _read(one, batch):
    """The teacher's rows, and the spans."""
    from contralto.align.trainers.batches import PairBatch

    return one._text.read(one.weighted(PairBatch.of(batch)))


def test_the_teacher_reads_its_own_template_or_the_students_text(models, tmp_path):
    for name in ("teacher", "plain"):
        one = trainer(tmp_path, models["student"], teacher_model_name_or_path=models[name], loss_type="gold")
        batch, _ = _read(one, one._prepare_inputs(next(iter(one.get_train_dataloader()))))
        tokenizer = AutoTokenizer.from_pretrained(models[name])
        texts = [
            tokenizer.decode(row[mask.bool()])
            for row, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
        ]
        chats = {(r["prompt"][0]["content"], r[side][0]["content"]) for r in pairs() for side in ("chosen", "rejected")}
        form = {"teacher": "<|user|>{}<|end|>\n<|bot|>{}<|end|>", "plain": "<|user|>{}<|assistant|>{}<eos>"}[name]
        assert set(texts) <= {form.format(*chat) for chat in chats}


def test_plain_texts_are_read_with_the_spaces_of_each_tokenizer(models, tmp_path):
    rows = [
        {"prompt": p.question, "chosen": " " + p.solution(), "rejected": " 4"}
        for p in itertools.islice(worlds.problems(0, "train"), 3)
    ]
    one = trainer(
        tmp_path,
        models["student"],
        dataset=Dataset.from_list(rows),
        teacher_model_name_or_path=models["teacher"],
        loss_type="gold",
    )
    own = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    batch, spans = _read(one, own)
    tokenizer = AutoTokenizer.from_pretrained(models["teacher"])
    texts = {
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    }
    assert texts == {f"{row['prompt']}{row[side]}<|end|>" for row in rows for side in ("chosen", "rejected")}
    assert spans.tokens.tolist() == own["completion_mask"].sum(-1).tolist()


def test_words_that_the_student_does_not_know_are_left_out_and_counted(models, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Mia has 4 coins."}],
        "chosen": [{"role": "assistant", "content": "finds 4: zebra 4 = 8."}],
        "rejected": [{"role": "assistant", "content": "finds 4."}],
    }
    options = {"teacher_model_name_or_path": models["teacher"], "loss_type": "gold", "per_device_train_batch_size": 1}
    _, _, metrics, batch = _step(trainer(tmp_path, models["student"], dataset=Dataset.from_list([row]), **options))
    unknown = (batch["input_ids"][0] == testbed.tokenizer().unk_token_id).sum().item()
    assert unknown == 1
    assert metrics["aligned/chosen"] == pytest.approx(1 - 1 / batch["completion_mask"][0].sum().item())
    assert metrics["aligned/rejected"] == 1


def test_the_student_writes_and_the_teacher_reads_it(models, tmp_path):
    """Completions that are sampled in the step, whose text nobody has tokenised for the teacher."""
    options = {
        "loss_type": "gold",
        "on_policy": 1.0,
        "max_new_tokens": 6,
        "teacher_model_name_or_path": models["teacher"],
    }
    one = trainer(tmp_path, models["student"], dataset=pairs().remove_columns("rejected"), **options)
    one.train()
    lines = [line for line in one.state.log_history if "loss/rejected" in line]
    assert len(lines) == 2
    assert all(line["loss/rejected"] > 0 and 0 < line["aligned/rejected"] <= 1 for line in lines)


def test_evaluation_reads_prompts_of_its_own(models, tmp_path):
    options = {"loss_type": "gold", "teacher_model_name_or_path": models["teacher"], "eval_strategy": "epoch"}
    one = trainer(tmp_path, models["student"], eval_dataset={"held": pairs(4, 5), "train": pairs()}, **options)
    found = one.evaluate()
    assert found["eval_held_loss"] != found["eval_train_loss"]
    lines = [line for line in one.state.log_history if "eval_aligned/chosen" in line]
    assert [line["eval_aligned/chosen"] for line in lines] == [1, 1]


# ------------------------------------------------------------------------------------------------------- one vocabulary


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_gold_of_one_vocabulary_is_the_jensen_shannon_divergence(models, tmp_path, beta):
    """The teacher reads the student's tokens; loss and gradients are those of the loss jsd."""
    steps = []
    for loss in ("gold", "jsd"):
        one = trainer(tmp_path, models["student"], teacher_model_name_or_path=models["same"], loss_type=loss, beta=beta)
        steps.append((one, *_step(one)))
    assert isinstance(steps[0][0]._text.alignment, SameTokens)
    assert steps[1][0]._text is None
    assert_close(steps[0][1], steps[1][1], rtol=1e-5, atol=1e-7)
    assert_close(steps[0][2], steps[1][2], rtol=1e-3, atol=1e-6)
    for name in ("loss/chosen", "loss/rejected", "logps/chosen", "teacher_logps/rejected"):
        assert steps[0][3][name] == pytest.approx(steps[1][3][name], rel=1e-5)


def test_the_alignment_of_equal_tokenizers_is_the_same_as_none(models, tmp_path):
    """Forced through text, all but the spaces of a template agree: the divergence of every token is that of jsd."""
    one = trainer(tmp_path, models["student"], teacher_model_name_or_path=models["same"], loss_type="gold")
    direct = _step(one)
    teacher, tokenizer = one.unwrap(one.ref_model), testbed.tokenizer()
    aligned = OtherTokens(one.policy, tokenizer, teacher, tokenizer, pairing="text", merge="observed")
    for row in one.train_dataset:
        assert aligned.read_prompt(row) == row["prompt_ids"]
    one._text.alignment = aligned
    assert len(aligned.matched(160, 160).student) == 160
    through_text = _step(one)
    assert_close(through_text[0], direct[0], rtol=1e-5, atol=1e-7)
    assert_close(through_text[1], direct[1], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- what is rejected


def test_losses_of_one_vocabulary_name_the_recipes(models, tmp_path):
    with pytest.raises(
        ValueError, match=r"skew_kl compares .* take the recipe distill_uld or distill_gold \(loss_type uld, gold\)"
    ):
        trainer(tmp_path, models["student"], teacher_model_name_or_path=models["teacher"], loss_type="skew_kl")
    assert {f"distill_{name}" for name in COMPARISONS} <= parsing.recipes().keys()


def test_a_teacher_needs_a_tokenizer_that_can_be_read_as_bytes(models, tmp_path):
    alone = zoo.build("qwen3", vocab_size=400, hidden=16)
    with pytest.raises(ValueError, match="the loaded teacher has no tokenizer in its folder"):
        trainer(tmp_path, models["student"], teacher=alone, loss_type="uld")
    lowered = byte_level(400, _texts(), SPECIAL)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = _save(tmp_path / "lowered", lowered, "qwen3", 24, 1, 1)
    with pytest.raises(ValueError, match="changes text before it is split") as error:
        trainer(
            tmp_path,
            models["student"],
            teacher_model_name_or_path=folder,
            loss_type="gold",
            dataset=pairs(2),
        )
    assert "\n" not in str(error.value)


def test_texts_longer_than_the_teacher_reads_are_rejected(models, tmp_path):
    one = trainer(tmp_path, models["student"], teacher_model_name_or_path=models["short"], loss_type="gold")
    with pytest.raises(ValueError, match=r"of the teacher's tokens, and the teacher reads 40: lower max_length"):
        _step(one)


def test_images_are_rejected(models, tmp_path):
    rows = Dataset.from_list([{"images": [Image.new("RGB", (4, 4))], "prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="gold compares models by text alone: take another loss, such as jsd"):
        trainer(
            tmp_path, models["student"], teacher_model_name_or_path=models["teacher"], loss_type="gold", dataset=rows
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precompute_teacher": True},
            "precompute_teacher is set, but gold does not use it; it is an option of distillm2",
        ),
        ({"pairing": "text"}, "pairing is set, but gold does not use it; it is an option of uld"),
        ({"matched_weight": 0.5}, "matched_weight and unmatched_weight belong together"),
        ({"matched_weight": -0.5, "unmatched_weight": 1.0}, "matched_weight must be a finite number of at least 0"),
        ({"crossentropy_weight": -1.0}, "crossentropy_weight must be a finite number of at least 0, not -1.0"),
        ({"merge": "mean"}, "merge must be one of observed, bayesian, not 'mean'"),
        ({"loss_type": "uld", "pairing": "bytes"}, "pairing must be one of positions, text, not 'bytes'"),
        ({"loss_type": "uld", "merge": "bayesian"}, "tokens compared by position are not merged: set pairing to text"),
        ({"loss_type": "uld", "beta": 0.1}, "beta is set, but uld does not use it"),
        (
            {"loss_type": "jsd", "merge": "bayesian"},
            "merge is set, but jsd does not use it; it is an option of uld, gold",
        ),
        ({"loss_type": "uld", "on_policy": 0.5}, "the student's completions have no weight: set lmbda above 0"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, **{"loss_type": "gold"} | options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- the command

QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    problems = list(itertools.islice(worlds.problems(0, "train"), 16))
    rows = [{"prompt": p.question, "chosen": p.solution(), "rejected": p.solution(stop_after=1)} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _argv(recipe, file, models, out, *more):
    data = ["--model_name_or_path", "testbed:student", "--dataset_name", file, "--output_dir", out, "--conversations"]
    data += ["--teacher_model_name_or_path", models["teacher"], "--gradient_accumulation_steps", "1"]
    return [str(word) for word in (recipe, *data, *QUIET, *more)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "more"), [("distill_uld", []), ("distill_gold", ["--max_new_tokens", "8"])])
def test_the_commands_distil(recipe, more, file, models, tmp_path, capsys):
    options = [
        "--max_steps",
        "20",
        "--learning_rate",
        "0.002",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
    ]
    cli_align.run(_argv(recipe, file, models, tmp_path / "out", *options, "--lr_scheduler_type", "constant", *more))
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    lines = [line["loss/chosen"] for line in state["log_history"] if "loss/chosen" in line]
    assert sum(lines[-5:]) < sum(lines[:5])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2402.12030" in card
    assert "p_(i)" in card


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(file, models, tmp_path):
    options = [
        "--learning_rate",
        "0.003",
        "--save_strategy",
        "no",
        "--gradient_checkpointing",
        "false",
        "--max_steps",
        "2",
        "--on_policy",
        "0",
    ]
    cli_align.run(
        _argv(
            "distill_gold",
            file,
            models,
            tmp_path / "one",
            *options,
            "--max_new_tokens",
            "128",
            "--per_device_train_batch_size",
            "8",
        )
    )
    recipe = str(parsing.recipes()["distill_gold"])
    argv = _argv(
        recipe,
        file,
        models,
        tmp_path / "two",
        *options,
        "--max_new_tokens",
        "128",
        "--per_device_train_batch_size",
        "4",
    )
    run_ranks(lambda: align_run.run(argv, launched=True))
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert_close(second[name], weight, rtol=1e-3, atol=2e-5)
