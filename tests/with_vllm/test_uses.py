"""`contralto eval --backend vllm` and data_gen's vLLM engine agree with their transformers counterparts."""

import json

import pytest
from engines import SMALL

pytestmark = pytest.mark.runner("v1")
pytest.importorskip("lm_eval")
QUESTIONS = [
    "Mia has 9 coins. She finds 4. How many coins?",
    "Ben has 3 coins. He loses 2, wins 5. How many coins?",
    "Hi",
]


@pytest.fixture(scope="module")
def alone(engines):
    """These tests start engines of their own."""
    engines.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_data_by_contrast(alone, expert, temperature):
    from contralto.data_gen.engines import TransformersEngine
    from contralto.data_gen.engines.vllm import VLLMEngine
    from contralto.data_gen.types import Ask, Sampling, make_request

    how = {"method": "cad", "contrast_prompt": "How many coins? {prompt}", "alpha": 1.0}
    sampling = Sampling(max_new_tokens=20, temperature=temperature, top_k=20, logprobs=True, stop=("####",))
    asks = [Ask(role="r", messages=[{"role": "user", "content": text}]) for text in QUESTIONS]
    asks += [Ask(role="r", prompt="Ben went to the")]
    requests = [make_request(ask, engine={}, sampling=sampling, seed=3, row=str(i)) for i, ask in enumerate(asks)]
    answers = []
    for engine in (
        TransformersEngine(model=expert, dtype="float32", **how),
        VLLMEngine(model=expert, options=SMALL, **how),
    ):
        found = {request.key: answer for some in engine.answer(requests) for request, answer in some}
        answers.append([found[request.key] for request in requests])
    for one, two in zip(*answers, strict=True):
        assert one.text.split("####")[0].strip() == two.text.split("####")[0].strip()
        assert two.finish_reason in ("stop", "length")
        kept = min(len(one.logprobs), len(two.logprobs))
        assert one.logprobs[:kept] == pytest.approx(two.logprobs[:kept], abs=2e-4)
    assert engine.identity["decoding"] == {"method": "cad", "contrast_prompt": how["contrast_prompt"], "alpha": 1.0}
    assert engine.identity != VLLMEngine(model=expert, options=SMALL).identity
    _close(engine._llm)


def _close(llm):
    llm.llm_engine.engine_core.shutdown()


def test_methods_that_vllm_cannot_run():
    from contralto.data_gen.engines.vllm import VLLMEngine

    for how, message in (
        ({"method": "dola"}, "method='dola' is not supported with vLLM"),
        ({"method": "cad"}, "method='cad' contrasts prompts: set contrast_prompt"),
        ({"method": "cd", "amateur": "testbed:amateur"}, "testbed:amateur is not a folder with a LoRA adapter"),
        ({"method": "cad", "lam": 1.0}, "has no lam"),
    ):
        with pytest.raises(ValueError, match=message):
            VLLMEngine(model="m", **how)


PROBLEMS = [
    {
        "question": f"Mia has {i} coins. She finds 4, loses 2. How many coins does Mia have?",
        "answer": f"{i + 2}. #### {i + 2}",
    }
    for i in range(3, 9)
]


@pytest.mark.parametrize(("task", "temperature"), [("testbed_arithmetic", 0.0), ("gsm8k", 1.0)])
def test_evaluation(alone, expert, tmp_path, capfd, task, temperature):
    """The command line, both backends, the same answers; and a cache of answers that is the decoder's own."""
    from contralto.cli import eval as evaluate

    args = {"pretrained": expert, "dtype": "float32", "method": "cad", "alpha": 1.0, "temperature": temperature}
    args["contrast_prompt"] = "How many? {prompt}"
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    data = ["--data_dir", str(tmp_path), "--num_fewshot", "0"] if task == "gsm8k" else []
    found = {}
    for backend, extra in (("transformers", {}), ("vllm", SMALL)):
        out = tmp_path / backend
        argv = ["--backend", backend, "--model_args", json.dumps({**args, **extra})]
        argv += ["--tasks", task, "--limit", "4", "--gen_kwargs", "max_gen_toks=32", *data]
        argv += ["--output_path", str(out), "--log_samples", "--device", "cpu", "--apply_chat_template"]
        argv += ["--use_cache", str(tmp_path / f"cache-{backend}")]
        evaluate.run(argv)
        samples = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
        found[backend] = [json.loads(line)["resps"] for line in samples]
        results = json.loads(next(out.rglob("results_*.json")).read_text())
        assert results["config"]["model"] == {"transformers": "contralto", "vllm": "contralto-vllm"}[backend]
    assert found["vllm"] == found["transformers"]
    assert len(set(map(str, found["vllm"]))) > 2
    assert list(tmp_path.glob("cache-vllm*"))


def test_wrong_evaluations(alone):
    from contralto.cli import eval as evaluate
    from contralto.eval.models.vllm import ContraltoVLLM

    with pytest.raises(ValueError, match="--backend must be transformers or vllm, not 'x'"):
        evaluate.run(["--backend", "x"])
    with pytest.raises(ValueError, match="--backend vllm sets --model itself: leave --model hf out"):
        evaluate.run(["--backend", "vllm", "--model", "hf", "--tasks", "testbed_arithmetic"])
    with pytest.raises(
        ValueError,
        match=r"method='dola' is not supported with vLLM, because it needs .*: use cad, cd, cfg, cid, icd, proxy or no method",
    ):
        ContraltoVLLM("m", method="dola")
    with pytest.raises(ValueError, match="adapters_off contrasts an adapter with the model without it: set adapter"):
        ContraltoVLLM("m", method="cd", adapters_off=True)
    asked = ContraltoVLLM.__new__(ContraltoVLLM)
    for ask in (lambda: asked.loglikelihood_rolling([]), lambda: asked._loglikelihood_tokens([])):
        with pytest.raises(ValueError, match="this task asks for likelihoods"):
            ask()
