"""Training on ranked candidates: BRIO and CoNT against whole forward passes, chunks, checkpoints, adapters, data."""

import itertools
import json
import math

import pytest
import torch
import zoo
from datasets import Dataset
from helpers.ranks import run_ranks
from oracles import ranking as reference
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from contralto import testbed
from contralto.align import BrioConfig, BrioTrainer, ContConfig, ContTrainer
from contralto.align.run import run as align_run
from contralto.align.trainers.cont import choose_samples
from contralto.align.trainers.own_candidates import ngram_overlap
from contralto.align.trainers.sequence_rows import Tokenise
from contralto.data_gen.candidate_rows import candidate_row, load_candidates
from contralto.decoding import SequenceProjection, SimilarityReranker
from contralto.decoding.executors.diverse import ENDED
from contralto.testbed import worlds

QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
SMALL = {"per_device_train_batch_size": 3, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
FEW = {"num_candidates": 3, "max_samples": 5, "max_completion_length": 24}


def rows(count=6, *, texts=False):
    """Problems with their solutions, and solutions that break off, each with the share of its steps as its score."""
    made = []
    for problem in itertools.islice(worlds.problems(0, "train"), count):
        answers = [problem.solution(stop_after=n) for n in range(len(problem.steps) + 1)]
        prompt = problem.question if texts else [{"role": "user", "content": problem.question}]
        scores = [float(n) for n in range(len(answers))]
        made.append({"prompt": prompt, "reference": problem.solution(), "candidates": answers, "scores": scores})
    return Dataset.from_list(made)


def brio(folder, data=None, model="testbed:amateur", adapter=None, **options):
    args = BrioConfig(str(folder), **QUIET | SMALL | options)
    return BrioTrainer(model, args=args, train_dataset=rows() if data is None else data, peft_config=adapter)


def cont(folder, data=None, model="testbed:amateur", adapter=None, **options):
    args = ContConfig(str(folder), **QUIET | SMALL | FEW | options)
    return ContTrainer(model, args=args, train_dataset=rows() if data is None else data, peft_config=adapter)


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)


def _batch(one, count=3):
    return [one.train_dataset[at] for at in range(count)]


def _logits(model, row, ids):
    """Return the logits of one answer's tokens by a plain forward pass, and hidden states of the prompt and of these places."""
    prompt = row["prompt_ids"]
    out = model(torch.tensor([prompt + ids]), output_hidden_states=True)
    states, at = out.hidden_states[-1][0], slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return out.logits[0, at], states[: len(prompt) - 1], states[at]


def _mean_nll(model, batch, smoothing):
    logits = torch.cat([_logits(model, row, row["reference_ids"])[0] for row in batch])
    targets = torch.tensor([token for row in batch for token in row["reference_ids"]])
    return cross_entropy(logits, targets, label_smoothing=smoothing)


# -------------------------------------------------------------------------------------------------------------------- BRIO


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_brio_equals_whole_forward_passes(tmp_path, smoothing):
    one = brio(tmp_path, label_smoothing=smoothing, length_alpha=0.6, margin=0.1, gamma=3.0, chunk_size=2)
    one.model.double().eval()
    batch = _batch(one)
    loss = one.compute_loss(one.model, batch)
    ranked = []
    for row in batch:
        scored = []
        for ids, quality in zip(row["candidate_ids"], row["scores"], strict=True):
            logps = [
                reference.log_softmax(z)[t] for z, t in zip(_logits(one.model, row, ids)[0].tolist(), ids, strict=True)
            ]
            scored.append((reference.likelihood(logps, 0.6), quality))
        ranked.append(scored)
    expected = _mean_nll(one.model, batch, smoothing).item() + 3.0 * reference.ranking(ranked, 0.1, 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert 0 <= one._figures["eval"]["accuracy"][0] <= 1


def _gradients(one, batch):
    one.model.zero_grad()
    one.compute_loss(one.model, batch).backward()
    return {name: weight.grad.clone() for name, weight in one.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_the_size_of_chunks_changes_no_gradient(tmp_path, family):
    """A chunk of all candidates keeps to one forward pass; chunks of one are computed anew one by one."""
    tokenizer = testbed.tokenizer()
    model = zoo.build(family, seed=1)
    model.resize_token_embeddings(len(tokenizer))
    data = rows(3, texts=True)
    found = []
    for size in (1, 64):
        args = BrioConfig(
            str(tmp_path), chunk_size=size, max_completion_length=20, max_prompt_length=100, **QUIET | SMALL
        )
        one = BrioTrainer(model.eval(), args=args, train_dataset=data, processing_class=tokenizer)
        found.append(_gradients(one, _batch(one)))
    assert found[0].keys() == found[1].keys()
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert max(float(each.abs().max()) for each in found[0].values()) > 0


@pytest.mark.slow
def test_brio_raises_the_accuracy_of_its_order(tmp_path):
    short_first = rows().map(lambda row: {"scores": [-score for score in row["scores"]]})
    one = brio(tmp_path, short_first, max_steps=15, learning_rate=3e-3, gamma=10.0, margin=0.1, length_alpha=1.0)
    one.train()
    logged = [line["accuracy"] for line in one.state.log_history if "accuracy" in line]
    assert logged[-1] > logged[0] + 0.3
    assert {"loss/nll", "loss/ranking", "loss"} <= one.state.log_history[0].keys()


def test_accumulated_batches_count_as_one(tmp_path):
    """Twice the same batch gives the gradient norm of one."""
    data = rows(2)
    both = [
        brio(
            tmp_path / str(n),
            Dataset.from_list([*data] * n),
            max_steps=1,
            gradient_accumulation_steps=n,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
        )
        for n in (1, 2)
    ]
    norms = []
    for one in both:
        one.train()
        norms.append(one.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_without_likelihood_no_reference_is_needed(tmp_path):
    one = brio(tmp_path, rows().remove_columns("reference"), likelihood=False)
    one.train()
    assert "loss/nll" not in one.state.log_history[0]


def test_candidates_are_written_once_and_scored(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "short_scorer.py").write_text(
        "def score(row, answers):\n    return [-len(a.split()) for a in answers]\n"
    )
    data = rows(4).remove_columns(["candidates", "scores"])
    own = {"num_candidates": 3, "scorer": "short_scorer:score", "max_completion_length": 16}
    one = brio(tmp_path / "out", data, **own)
    (path,) = (tmp_path / "out" / "candidates").glob("*.jsonl")
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["candidates"] for line in lines] == list(one.train_dataset["candidates"])
    assert all(len(set(line["candidates"])) == 3 for line in lines)
    assert lines[0]["scores"] == [-len(answer.split()) for answer in lines[0]["candidates"]]
    path.write_text("\n".join(text.splitlines()[:2]) + "\n" + text.splitlines()[2][:30])  # as after a kill
    again = brio(tmp_path / "out", data, **own)
    assert list(again.train_dataset["scores"]) == list(one.train_dataset["scores"])
    assert len(load_candidates(tmp_path / "out" / "candidates" / "0.jsonl")) == 4


# -------------------------------------------------------------------------------------------------------------------- CoNT


def test_cont_equals_whole_forward_passes(tmp_path, monkeypatch):
    one = cont(tmp_path, margin=0.05, chunk_size=2)
    one.model.double().eval()
    batch = _batch(one)
    made = one.make_batch(batch)
    monkeypatch.setattr(one, "make_batch", lambda _: made)
    loss = one.compute_loss(one.model, batch)
    projection = one.projection
    weights = projection.linear.weight.tolist(), projection.linear.bias.tolist()
    ranked = []
    for at, row in enumerate(batch):
        samples = [row["reference_ids"], *([t for t in ids if t != ENDED] for ids in made.task.candidates[at].tolist())]
        _, source, _ = _logits(one.model, row, row["reference_ids"])
        z = reference.represent(source.tolist(), *weights)
        scored = []
        for number, ids in enumerate(samples):
            if ids:
                own = reference.represent(_logits(one.model, row, ids)[2].tolist(), *weights)
                q = math.inf if number == 0 else reference.overlap(row["reference_ids"], ids, 2)
                scored.append((reference.cosine(z, own), q))
        ranked.append(scored)
    expected = _mean_nll(one.model, batch, 0.0).item() + reference.ranking(ranked, 0.05, 0.01)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_samples_of_cont_are_the_best_candidates_and_references_of_other_rows(tmp_path):
    one = cont(tmp_path, max_samples=20)
    batch = _batch(one)
    made = one.make_batch(batch)
    assert made.task.candidates.shape[:2] == (3, 3 + 2)
    others = [[t for t in ids if t != ENDED] for ids in made.task.candidates[0].tolist()]
    assert batch[1]["reference_ids"] in others
    assert batch[2]["reference_ids"] in others
    assert batch[0]["reference_ids"] not in others
    quality = made.quality[:, 1:]
    assert torch.equal(quality, quality.sort(-1, descending=True).values)
    assert torch.isinf(made.quality[:, 0]).all()


def test_a_candidate_that_is_the_reference_is_left_out():
    samples = torch.tensor([[[5, 6], [7, ENDED], [8, 9]], [[1, 2], [1, 2], [1, 2]]])
    references = torch.tensor([[8, 9], [1, 2]])
    quality = torch.tensor([[0.1, 0.5, 1.0], [1.0, 1.0, 1.0]])
    chosen, kept, mask = choose_samples(samples, quality, references, count=3)
    assert mask.tolist() == [[True, True, False], [False] * 3]
    assert chosen[0, :2].tolist() == [[7, ENDED], [5, 6]]
    assert (chosen[~mask] == ENDED).all()
    assert kept[0].tolist() == pytest.approx([0.5, 0.1, 0.0])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_overlap_of_ngrams_equals_the_reference(n):
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 5, 9):
        own, other = (torch.randint(0, 4, (size,), generator=generator).tolist() for size in (6, length))
        assert ngram_overlap(own, other, n=n) == pytest.approx(reference.overlap(own, other, n))


@pytest.mark.slow
def test_cont_learns_to_tell_its_candidates_apart_and_the_reranker_reads_it(tmp_path):
    one = cont(tmp_path / "out", max_steps=12, learning_rate=3e-3)
    one.train()
    logged = [line["accuracy"] for line in one.state.log_history if "accuracy" in line]
    assert sum(logged[-3:]) > sum(logged[:3])
    one.save_model()
    folder = tmp_path / "out"
    assert (folder / "cont_projection.safetensors").is_file()
    assert "2205.14690" in (folder / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loaded[1]["unexpected_keys"]
    tokenizer = testbed.tokenizer()
    prompt = tokenizer("Ben went out to the", return_tensors="pt")
    result = SimilarityReranker(loaded[0].eval(), folder)(prompt, num_beams=3, max_new_tokens=5)
    assert result.similarity.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_cont_trains_encoder_decoders(tmp_path, family):
    tokenizer = testbed.tokenizer()
    model = zoo.build(family, seed=1)
    model.resize_token_embeddings(len(tokenizer))
    args = ContConfig(str(tmp_path), **QUIET | SMALL | FEW | {"max_steps": 3})
    one = ContTrainer(model, args=args, train_dataset=rows(3, texts=True), processing_class=tokenizer)
    before = one.projection.linear.weight.detach().clone()
    one.train()
    assert all(math.isfinite(line["loss"]) for line in one.state.log_history if "loss" in line)
    assert (one.projection.linear.weight - before).abs().max() > 0


def test_a_scorer_ranks_samples(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "words_scorer.py").write_text(
        "def score(row, answers):\n    return [-len(a.split()) for a in answers]\n"
    )
    one = cont(tmp_path / "out", scorer="words_scorer:score")
    made = one.make_batch(_batch(one))
    tokenizer = testbed.tokenizer()
    words = [
        len(tokenizer.decode([t for t in ids if t >= 0], skip_special_tokens=True).split())
        for ids in made.task.candidates[0].tolist()
    ]
    assert made.quality[0, 1:].tolist() == [-float(n) for n in words]


# ---------------------------------------------------------------------------------------------------- what both have in common


@pytest.mark.slow
@pytest.mark.parametrize("make", [brio, cont])
def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path, make):
    same = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole, first = make(tmp_path / "whole", **same), make(tmp_path / "resumed", **same)
    whole.train()
    first.args.max_steps = 2
    first.train()
    second = make(tmp_path / "resumed", **same)
    second.train(resume_from_checkpoint=True)
    assert_close(dict(second.model.named_parameters()), dict(whole.model.named_parameters()), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [brio, cont])
def test_an_adapter_is_trained_alone(tmp_path, make):
    one = make(tmp_path, adapter=lora(), eval_strategy="no")
    trained = {name for name, weight in one.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "cont_projection" in name for name in trained)
    one.train()
    one.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["brio", "cont"])
def test_two_processes_equal_one(tmp_path, trainer, monkeypatch):
    """Rows of as many candidates weigh alike; CoNT has references of other rows of one process alone, so that it only runs."""
    monkeypatch.chdir(tmp_path)
    data = rows(40)
    data.select([at for at, row in enumerate(data) if len(row["candidates"]) == 3][:4]).to_json("rows.jsonl")
    argv = f"--trainer {trainer} --dataset_name rows.jsonl --model_name_or_path testbed:amateur --max_steps 2 --logging_steps 1"
    argv += " --use_cpu true --report_to none --learning_rate 1e-3 --save_strategy no --max_completion_length 24"
    argv += " --likelihood false --gamma 1 --margin 0.1" if trainer == "brio" else ""

    def run(size, folder):
        align_run([*argv.split(), "--per_device_train_batch_size", str(size), "--output_dir", folder], launched=True)

    run_ranks(lambda: run(2, "two"))
    run(4, "one")
    two, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one"))
    if trainer == "brio":
        assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(two[name], value) for name, value in testbed.load("amateur").state_dict().items())


def test_evaluation_logs_the_same_figures(tmp_path):
    args = ContConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, **QUIET | SMALL | FEW | {"max_steps": 1})
    one = ContTrainer("testbed:amateur", args=args, train_dataset=rows(), eval_dataset=rows(3))
    one.train()
    (found,) = [line for line in one.state.log_history if "eval_loss" in line]
    assert found["eval_loss"] == pytest.approx(found["eval_loss/nll"] + found["eval_loss/ranking"], rel=1e-5)


def test_answers_of_conversations_are_the_template_s():
    tokenizer = testbed.tokenizer()
    tokenise = Tokenise(tokenizer, is_encoder_decoder=False, max_prompt_length=None, max_completion_length=50)
    prompt = [{"role": "user", "content": "2 + 3"}]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "5."}], return_dict=True)[
        "input_ids"
    ]
    ids = tokenise.prompt(prompt).ids + tokenise.answer(prompt, "5.").ids
    assert ids == whole[: len(ids)]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenise.answer("2 + 3", " 5.").ids == [
        *tokenizer(" 5.", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_long_prompts_of_decoders_are_dropped_and_long_answers_cut(tmp_path, caplog):
    data = rows(4)
    lengths = sorted(len(each) for each in brio(tmp_path, data).train_dataset["prompt_ids"])
    one = brio(tmp_path, data, max_prompt_length=lengths[1], max_completion_length=5)
    assert len(one.train_dataset) == sum(length <= lengths[1] for length in lengths)
    assert max(len(ids) for row in one.train_dataset["candidate_ids"] for ids in row) == 5
    assert "prompts are dropped with their rows, beyond max_prompt_length" in caplog.text
    with pytest.raises(ValueError, match="train_dataset has no row left"):
        brio(tmp_path, data, max_prompt_length=2)


def test_sources_of_encoder_decoders_are_cut():
    tokenise = Tokenise(testbed.tokenizer(), is_encoder_decoder=True, max_prompt_length=4, max_completion_length=50)
    whole = testbed.tokenizer()("Tom has 3 pens. He loses 2.")["input_ids"]
    cut = tokenise.prompt("Tom has 3 pens. He loses 2.")
    assert cut.is_cut
    assert cut.ids == [*whole[:3], whole[-1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma must be at least 0, not -1.0"),
        ({"margin": -1.0}, "margin must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), not 1.0"),
        ({"max_candidates": 1}, "at least 2 candidates can be ranked"),
        ({"num_candidates": 4}, "give one of scorer and reward_model"),
        ({"scorer": "a:b"}, "give num_candidates too"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
        ({"max_prompt_length": 1}, "max_prompt_length must be at least 2, not 1"),
        ({"diversity_penalty": -1.0}, "diversity_penalty must be at least 0"),
    ],
)
def test_wrong_options_of_brio_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        BrioConfig("out", **QUIET | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 1}, "max_samples must be at least 2, not 1"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, not 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
        ({"scorer": "a:b", "reward_model": "c"}, "scorer and reward_model are both given"),
        ({"fsdp": "full_shard"}, "leave them out"),
    ],
)
def test_wrong_options_of_cont_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        ContConfig("out", **QUIET | options)


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (
            brio,
            lambda: rows().remove_columns("scores"),
            "train_dataset has no scores: a row needs prompt, candidates, scores, reference",
        ),
        (
            cont,
            lambda: rows().remove_columns("reference"),
            "train_dataset has no reference: a row needs prompt, reference",
        ),
        (brio, lambda: rows().map(lambda row: {"scores": [0.0] * len(row["scores"])}), "there is nothing to rank"),
        (brio, lambda: [{"prompt": "a"}], "train_dataset must be a datasets.Dataset, not a list"),
        (brio, lambda: Dataset.from_list([]), "train_dataset has no rows"),
    ],
)
def test_data_that_cannot_be_ranked_are_rejected(tmp_path, make, data, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "a row must be a JSON object, not a str"),
        ({"candidates": ["a", "b"], "scores": [0, 1]}, "column prompt: it is missing"),
        (
            {"prompt": "x", "candidates": ["a"], "scores": [0]},
            "column candidates: it must be a list of at least two answers",
        ),
        ({"prompt": "x", "candidates": ["a", ""], "scores": [0, 1]}, "column candidates: it is empty"),
        (
            {"prompt": "x", "candidates": ["a", "b"], "scores": [0, float("nan")]},
            "column scores: it must hold one finite number",
        ),
        ({"prompt": "x", "images": ["a"]}, "candidates are read without images"),
    ],
)
def test_wrong_rows_are_rejected(record, message):
    with pytest.raises(ValueError, match=message):
        candidate_row(record)


def test_rows_keep_the_columns_that_scorers_read():
    record = {"prompt": "x", "responses": ["a", "b"], "scores": [0, 1], "completion": "c", "rejected": "r", "answer": 7}
    row = candidate_row(record, conversations=True)
    assert row == {
        "prompt": [{"role": "user", "content": "x"}],
        "reference": "c",
        "candidates": ["a", "b"],
        "scores": [0.0, 1.0],
        "answer": 7,
    }


def test_projections_begin_alike(tmp_path):
    assert_close(cont(tmp_path).projection.state_dict(), cont(tmp_path).projection.state_dict())
    assert isinstance(cont(tmp_path).projection, SequenceProjection)
