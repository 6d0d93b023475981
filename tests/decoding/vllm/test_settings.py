"""The parts of the vLLM back-end that need no vLLM: pairing of requests, sampling, resuming, flags and checks.

The tests with a real vLLM are in `with_vllm/`, which has an environment of its own.
"""

import json
import os
import re

import pytest
import torch

from contralto.cli import serve
from contralto.cli.serve import prepare
from contralto.decoding import SeededSampling, methods, rules
from contralto.decoding.vllm import settings
from contralto.decoding.vllm.adapters import adapters_of, lora_options
from contralto.decoding.vllm.engine import engine_options
from contralto.decoding.vllm.limits import ENVIRONMENT
from contralto.decoding.vllm.sampling import RequestSampling, Warp, draw, seeds_of
from contralto.decoding.vllm.session import BranchReply, PairProgress, RefusedError
from contralto.decoding.vllm.settings import Row, check_group

GOOD = {"contrast_id": "x", "contrast_branch": 0, "contrast_marker": 0, "contrast_method": "cad"}


def test_the_methods_are_those_of_everything_else():
    """Names, forms, formulas, parameters, defaults, number of branches: one table beside the other."""
    for name in settings.supported():
        method, forms = methods.METHODS[name], settings.forms_of(name)
        for form in forms:
            defaults = {each.name: each.default for each in method.forms[form].parameters.values()}
            assert settings.parameters_of(name, form) == defaults
            rule = Row.of({**GOOD, "contrast_method": name, "contrast_form": form or None}).rule
            assert len(rule.branches) == len(method.branches)
            logits = torch.randn(len(method.branches), 3, 11, generator=torch.Generator().manual_seed(1))
            own = method.forms[form].scores(logits, **defaults)
            assert torch.equal(rule(list(logits), torch.zeros(3)), own)
    left_out = {"critic", "none", "scd", "search", "dola", "sid", "avisc", "pai", "only"}
    assert set(methods.METHODS) - set(settings.supported()) == left_out


def test_m3id_counts_the_steps_of_each_text():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(2))
    rule = Row.of({**GOOD, "contrast_method": "m3id"}).rule
    together = rule(list(logits), torch.tensor([0, 5, 40]))
    for i, step in enumerate((0, 5, 40)):
        assert torch.equal(together[i : i + 1], rule([row[i : i + 1] for row in logits], torch.tensor([step])))
    assert not torch.equal(together[2], rule(list(logits), torch.zeros(3))[2])


def test_the_gate_is_that_of_transformers():
    """The main branch's log-probabilities where it is sure, but not for the first token; `contrast_start` counts too."""
    logits = torch.stack([torch.tensor([[2.0, 0.0, 0.0], [9.0, 0.0, 0.0]]), torch.randn(2, 3)])
    rule = Row.of({**GOOD, "contrast_gate": 0.9}).rule
    plain = Row.of(GOOD).rule
    assert (rule.gate, plain.gate) == (0.9, None)
    for steps in (torch.tensor([1, 5]), torch.tensor([0, 0]), torch.tensor([3, 0])):
        own = plain(list(logits), steps)
        assert torch.equal(rule(list(logits), steps), rules.gated(own, logits[0], gate=0.9, step=steps[:, None]))
    assert torch.equal(rule(list(logits), torch.tensor([1, 5]))[1], logits[0, 1].log_softmax(-1))


def test_every_row_draws_as_if_alone():
    """Different samplings, seeds and steps in one call are what SeededSampling gives for each."""
    samplings = [
        RequestSampling(),
        RequestSampling(temperature=0.7),
        RequestSampling(temperature=1.3, top_k=4),
        RequestSampling(temperature=1.0, top_k=9, top_p=0.7),
        RequestSampling(temperature=0.9, top_p=0.5, min_p=0.1),
        RequestSampling(temperature=2.0, min_p=0.3),
    ]
    scores = torch.randn(6, 23, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    scores[3, 5:9] = -torch.inf
    seeds, steps = [5, -1, 2**63, 7, 2**70, 9], [0, 3, 1, 8, 2, 5]
    found = draw(scores, Warp.of(samplings, "cpu"), seeds_of(seeds), torch.tensor(steps))
    assert torch.equal(found[0], scores[0])
    for i in range(1, 6):
        alone = SeededSampling([seeds[i]], **vars(samplings[i]))
        for length in range(4, 5 + steps[i]):
            expected = alone(torch.zeros(1, length, dtype=torch.long), scores[i : i + 1])
        assert torch.equal(found[i : i + 1], expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"contrast_id": True}, "contrast_id must be a string or a whole number, not True"),
        ({"contrast_id": None}, "needs contrast_id; it has contrast_branch, contrast_id"),
        ({"contrast_marker": -1}, "contrast_marker must be at least 0, not -1"),
        ({"contrast_start": -2}, "contrast_start must be at least 0, not -2"),
        ({"contrast_seed": "a"}, "contrast_seed must be a whole number, not 'a'"),
        ({"contrast_method": "proxy", "contrast_branch": 3}, r"must be 0, 1 or 2 \(base, expert, antiexpert\), not 3"),
        (
            {"contrast_method": "cd", "contrast_form": "x"},
            "contrast_form of cd must be obrien or li or released, not 'x'",
        ),
        ({"contrast_method": "ritual", "contrast_normalize": 2}, "contrast_normalize must be true or false, not 2"),
        ({"contrast_gate": 1.5}, r"contrast_method cad: gate must lie in \(0, 1\]"),
        ({"contrast_gate": "a"}, "contrast_gate must be a number, not 'a'"),
        ({"contrast_alpha": float("nan")}, "contrast_method cad: alpha must be"),
        ({"contrast_temperature": float("inf")}, "contrast_temperature must be a finite number of at least 0"),
        ({"contrast_temperature": 1.0, "contrast_min_p": 2.0}, r"contrast_min_p must lie in \[0, 1\]"),
        ({"contrast_temperature": 1.0, "contrast_top_k": -1}, "contrast_top_k must be at least 0"),
        ({"contrast_colour": 1}, "cad has no contrast_colour; its parameters are contrast_alpha; general"),
    ],
)
def test_wrong_values(changed, message):
    with pytest.raises(ValueError, match=message):
        Row.of({**GOOD, **changed})


def test_other_values_are_left_alone():
    assert Row.of(None) is Row.of({"kv_transfer_params": {}}) is None
    assert Row.of({**GOOD, "other": 1}).group == "x"
    assert Row.of({**GOOD, "contrast_method": "ritual", "contrast_normalize": 1}).rule.parameters[2] == (
        "normalize",
        True,
    )


def test_branches_must_fit():
    one, two = Row.of(GOOD), Row.of({**GOOD, "contrast_branch": 1})
    check_group([(one, {"max_tokens": 4}), (two, {"max_tokens": 4})])
    for other, options, message in (
        (one, {"max_tokens": 4}, "two requests have branch 0"),
        (two, {"max_tokens": 5}, r"differ in max_tokens \(4 and 5\)"),
        (Row.of({**GOOD, "contrast_branch": 1, "contrast_alpha": 2}), {}, r"differ in contrast_alpha \(0.5 and 2.0\)"),
        (Row.of({**GOOD, "contrast_branch": 1, "contrast_gate": 0.5}), {}, r"differ in contrast_gate \(None and 0.5\)"),
        (Row.of({**GOOD, "contrast_branch": 1, "contrast_start": 2}), {}, r"differ in contrast_start \(0 and 2\)"),
        (Row.of({**GOOD, "contrast_branch": 1, "contrast_method": "cfg"}), {}, r"contrast_method \('cad' and 'cfg'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_group([(one, {"max_tokens": 4}), (other, {"max_tokens": 4, **options})])


# ------------------------------------------------------------------------------------------------------------ resuming


def branch(tokens, reason="length", stop=None):
    return BranchReply(tokens, [-float(token) for token in tokens], reason, stop, text=str(tokens))


def test_a_text_in_one_round():
    progress = PairProgress(marker=0, max_tokens=3)
    assert progress.take([branch([5, 6, 7]), branch([5, 6, 7])])
    output = progress.output("t", [2, 1])
    assert output[:5] == ([5, 6, 7], "t", ([-5.0, -6.0, -7.0],) * 2, "length", None)
    assert output[5:] == ((2, 1), 1, 0)


def test_a_text_whose_branches_parted():
    """A marker, then other tokens than the partner's: what is common is kept, and the rest asked for again."""
    progress = PairProgress(marker=0, max_tokens=6)
    assert not progress.take([branch([5, 6, 0], "stop", 0), branch([5, 6, 7, 0], "stop", 0)])
    assert (progress.tokens, progress.remaining) == ([5, 6], 4)
    assert not progress.take([branch([7, 8, 3], "stop"), branch([7, 9, 3], "stop")])
    assert progress.take([branch([8, 3], "stop"), branch([8, 3], "stop")])
    output = progress.output("t", [1, 1])
    assert output.tokens == [5, 6, 7, 8, 3]
    assert output.logprobs == ([-5.0, -6.0, -7.0, -8.0, -3.0],) * 2
    assert (output.finish_reason, output.rounds, output.desyncs) == ("stop", 3, 2)


def test_an_end_that_only_one_branch_has_is_none():
    progress = PairProgress(marker=0, max_tokens=6)
    assert not progress.take([branch([3], "stop"), branch([0], "stop", 0)])
    assert progress.tokens == []


def test_markers_in_both_branches_are_no_text():
    progress = PairProgress(marker=0, max_tokens=6)
    assert not progress.take([branch([5, 0], "stop", 0), branch([5, 0], "stop", 0)])
    assert progress.tokens == [5]


def test_the_main_branch_ends_by_a_stop_text():
    """Its partner is left behind, and lost its partner: that is no desync."""
    progress = PairProgress(marker=0, max_tokens=6, whole=True)
    assert progress.take([branch([5, 6], "stop", "."), branch([5, 6, 0], "stop", 0)])
    assert progress.output("t", [1, 1]).stop_reason == "."


def test_what_must_be_whole_starts_afresh():
    progress = PairProgress(marker=0, max_tokens=6, whole=True)
    assert not progress.take([branch([5, 0], "stop", 0), branch([5, 6, 0], "stop", 0)])
    assert (progress.tokens, progress.logprobs, progress.remaining) == ([], [], 6)
    assert progress.take([branch([5, 3], "stop"), branch([5, 3], "stop")])
    assert progress.output("t", [1, 1]).rounds == 2


def test_giving_up():
    progress = PairProgress(marker=0, max_tokens=6, patience=2)
    apart = [branch([0], "stop", 0), branch([5, 0], "stop", 0)]
    assert not progress.take(apart)
    with pytest.raises(RuntimeError, match="out of step 2 times without progress"):
        progress.take(apart)
    with pytest.raises(RefusedError, match=r"^no room$"):
        PairProgress(marker=0, max_tokens=6).take([branch([], "abort", "contralto: no room"), branch([5])])
    with pytest.raises(RuntimeError, match="the engine aborted a completion"):
        PairProgress(marker=0, max_tokens=6).take([branch([], "abort"), branch([5])])


# ------------------------------------------------------------------------------------------------------------ starting


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"speculative_config": {"method": "ngram"}}, "cannot be combined with speculative decoding"),
        ({"spec_model": "x"}, "spec_model: the branches of a completion"),
        ({"data_parallel_size": 2}, "data_parallel_size must be 1, not 2"),
        ({"enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling separates"),
        ({"kv_transfer_config": {}, "scheduler_cls": "mine"}, "scheduler_cls must be 'contralto"),
        ({"scheduling_policy": "priority"}, "scheduling_policy must be 'fcfs'"),
        ({"max_num_batched_tokens": 1}, "max_num_batched_tokens must be at least 2"),
        ({"timeout": -1}, "timeout must be a number of seconds above 0, not -1"),
    ],
)
def test_engines_that_cannot_work(how, message):
    with pytest.raises(ValueError, match=message):
        engine_options(**how)


def test_the_servers_flags():
    argv = ["testbed:expert", "--max_num_seqs=8", "--tensor-parallel-size", "2", "--additional-config", '{"a": 1}']
    command, told = prepare([*argv, "--contrast-timeout", "3", "--marker", "7"])
    assert (told["marker"], told["timeout"]) == (7, 3.0)
    assert command[command.index("--max-num-seqs") + 1] == "8"
    assert command[command.index("--logits-processors") + 1] == "contralto.decoding.vllm:PairedContrast"
    assert command[command.index("--scheduler-cls") + 1] == "contralto.decoding.vllm.pair_scheduler"
    assert json.loads(command[command.index("--additional-config") + 1]) == {"a": 1, "contrast_timeout": 3.0}
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert prepare(["testbed:expert"])[1]["marker"] == 0
    for flags, message in (
        (["-dp", "2"], "data_parallel_size must be 1"),
        (["--speculative-config", "{}x"], "cannot be combined with speculative decoding"),
        (["--speculative_config.method", "ngram"], "leave their flags out"),
        (["--api-server-count", "2"], "api-server-count must be 1"),
        (["--scheduler-cls", "mine"], "scheduler_cls must be"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(["testbed:expert", *flags])


OPEN = (
    r"contralto serve: no API key is set, and \S.* is open to other machines, .*: set --api-key, or leave --host out\n"
)


@pytest.mark.parametrize(
    ("flags", "key", "is_open"),
    [
        ("--host 0.0.0.0", None, True),
        ("--host=::", None, True),
        ("--host 127.0.0.1 --host 192.168.1.5", None, True),
        ("--ho 0.0.0.0", None, True),
        ("--host=", None, True),
        ("--host 0.0.0.0 --api_key=", "sk-1", True),
        ("--config open.yaml", None, True),
        ("--host 0.0.0.0 --config key.yaml", None, False),
        ("--host 0.0.0.0 --api-key sk-1 sk-2 --port 8001", None, False),
        ("--host 0.0.0.0", "sk-1", False),
        ("--host ::1", None, False),
        ("--host 0.0.0.0 --uds /tmp/socket", None, False),
        ("--config open.yaml --host localhost", None, False),
        ("--port 8001", None, False),
    ],
)
def test_a_server_that_anyone_may_use_says_so(flags, key, is_open, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open.yaml").write_text("host: 0.0.0.0\nport: 8001\n")
    (tmp_path / "key.yaml").write_text("api_key: sk-1\n")
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    monkeypatch.setenv("VLLM_API_KEY", key) if key else monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv(ENVIRONMENT, "")  # so that the value that the command sets is undone
    started = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    serve.run(["testbed:expert", "--marker", "0", *flags.split()])
    assert bool(re.fullmatch(OPEN, capsys.readouterr().err)) == is_open
    assert ("127.0.0.1" in started[0]) == (
        flags
        in (
            "--port 8001",
            "--host 127.0.0.1 --host 192.168.1.5",
        )
    )


def test_adapters_of_branches(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12}')
    name = str(tmp_path)
    choose = methods.DecodingConfig.from_options
    assert adapters_of(choose(method="cad", contrast_prompt="x"), name) == [name, name]
    assert adapters_of(choose(method="cd", adapters_off=True), name) == [name, None]
    assert adapters_of(choose(method="cd", amateur=name), None) == [None, name]
    assert adapters_of(choose(method="proxy", expert=name, adapters_off=True), None) == [None, name, None]
    assert lora_options([name, None]) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    assert lora_options([None, None]) == {}
    for chosen, message in (
        (choose(method="vcd"), "method='vcd' is not supported with vLLM"),
        (choose(method="cd", adapters_off=True), "set adapter"),
        (choose(method="cd", amateur="testbed:amateur"), "testbed:amateur is not a folder with a LoRA adapter"),
        (choose(method="cd", amateur=name, vocabulary="aligned"), "vocabulary='aligned' is not supported with vLLM"),
        (choose(method="cd", amateur=name, amateur_window=1), "amateur_window is not supported with vLLM"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters_of(chosen, None)
