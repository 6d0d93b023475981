"""The command line, in process, on the embedded models: output, files, errors.

Every method's texts are compared with those of its logits processor, made by hand for each prompt alone.
"""

import json
from functools import cache

import pytest
import zoo
from PIL import Image
from zoo import llava as zoo_llava

from contralto import cli, decoding, testbed
from contralto.cli import generate
from contralto.common import files
from contralto.decoding import ContrastiveSearchLogitsProcessor, methods
from contralto.decoding.images import noised, ritual_transform

QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"
PLAIN = ["--model", "testbed:expert"]
CONTRAST = [*PLAIN, "--amateur", "testbed:amateur"]


@pytest.fixture
def run(capsys):
    """Run a command; give its status, its standard output and its standard error."""

    def call(*argv):
        status = cli.main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return call


def _rows(path):
    return [row for _, row in files.read_json_lines(path)]


def test_one_prompt_streams_and_compares(run):
    status, out, _ = run("generate", *CONTRAST, "--compare", "greedy", QUESTION)
    assert status == 0
    contrastive, greedy = out.split("--- greedy\n")
    assert contrastive.startswith("--- cd\n")
    assert contrastive.endswith("sells 3: 16 - 3 = 13. #### 13\n")
    assert greedy.endswith("loses 2: 13 - 2 = 11. #### 11\n")


def test_several_prompts_are_shown_one_after_another(run):
    other = "Tom has 12 pens. He buys 8. How many pens does Tom have?"
    _, out, _ = run("generate", *CONTRAST, QUESTION, other)
    assert out.startswith(f"=== 0: {QUESTION}\n")
    assert out.endswith(f"=== 1: {other}\nbuys 8: 12 + 8 = 20. #### 20\n")


@pytest.mark.slow
def test_several_prompts_stream_the_texts_that_are_written_to_files(run, tmp_path):
    """Batches of two, whose rows end at different steps; sampled from the likeliest 3 tokens and to the end of the text."""
    prompts = [QUESTION, "Tom has 12 pens. He buys 8. How many pens does Tom have?", QUESTION.replace("Mia", "Ada")]
    how = [*CONTRAST, "--batch-size", 2, "--sample", "--temperature", 2, "--top-k", 3, *prompts]
    target = tmp_path / "out.jsonl"
    assert run("generate", *how, "--output", target)[0] == 0
    rows = _rows(target)
    assert rows[0]["settings"]["top_k"] == 3
    status, out, _ = run("generate", *how)
    assert (status, out) == (
        0,
        "".join(f"=== {i}: {p}\n{row['text']}\n" for i, (p, row) in enumerate(zip(prompts, rows, strict=True))),
    )


def test_the_likeliest_token_alone_is_the_greedy_one(run):
    sampled = ["--sample", "--temperature", 5, "--top-k", 1]
    assert run("generate", *CONTRAST, *sampled, QUESTION)[1] == run("generate", *CONTRAST, QUESTION)[1]
    assert (
        run("generate", *CONTRAST, "--method", "scd", *sampled, QUESTION)[1] == run("generate", *CONTRAST, QUESTION)[1]
    )


def test_without_an_amateur_it_is_plain(run):
    _, out, _ = run("generate", "--model", "testbed:expert", QUESTION)
    assert out.endswith("#### 11\n")


def test_raw_text_and_li_form_with_beams(run):
    how = ["--raw", "--form", "li", "--amateur-window", 1, "--beams", 3, "--max-new-tokens", 9]
    status, out, err = run("generate", *CONTRAST, *how, "Ben went out to the barn door.")
    assert status == 0
    assert err == "cd: 2 models per token; amateur 0.02M parameters, 11% of the expert's\n"
    expert, tokenizer = testbed.load("expert"), testbed.tokenizer()
    contrast = decoding.ContrastiveDecodingLogitsProcessor(
        testbed.load("amateur"), form="li", amateur_window=1, min_tokens_to_keep=2
    )
    inputs = tokenizer("Ben went out to the barn door.", return_tensors="pt")
    output = expert.generate(**inputs, logits_processor=[contrast], num_beams=3, do_sample=False, max_new_tokens=9)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert out == f"=== 0: Ben went out to the barn door.\n{text}\n"


@pytest.mark.slow
def test_jsonl_from_a_file_with_comparison_and_resume(run, tmp_path, monkeypatch):
    problems = [f"Tom has {n} pens. He buys 3, sells 2. How many pens does Tom have?" for n in range(4, 9)]
    rows = [{"messages": [{"role": "user", "content": problems[0]}]}, *({"prompt": p} for p in problems[1:])]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = [*CONTRAST, "--file", source, "--batch-size", 2, "--sample", "--seed", 3, "--compare", "plain"]
    assert run("generate", *how, "--output", target)[0] == 0
    whole = _rows(target)
    assert [row["index"] for row in whole] == list(range(5))
    assert [row["prompt"] for row in whole] == [rows[0]["messages"], *problems[1:]]
    assert all({"text", "plain"} <= set(row) for row in whole)
    assert whole[0]["settings"]["seed"] == 3
    assert whole[0]["settings"]["beta"] == 0.5  # the default is said, too

    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][:40])  # killed in the middle of a row
    decoded = []
    decode = generate._decode
    monkeypatch.setattr(
        generate, "_decode", lambda batch, *a, **k: decoded.append(len(batch)) or decode(batch, *a, **k)
    )
    assert run("generate", *how, "--output", target, "--resume")[0] == 0
    assert decoded == [2, 1]
    assert _rows(target) == whole

    status, _, err = run("generate", *how, "--output", target)
    assert (status, err) == (
        2,
        f"contralto generate: {target} exists: add --resume to go on with it, or name another file\n",
    )
    status, _, err = run("generate", *how, "--beta", 1, "--output", target, "--resume")
    assert status == 2
    assert "made with another beta: use the same, or name another file" in err


def test_prompts_from_standard_input(run, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTION}\n\n".encode())))
    _, out, _ = run("generate", *CONTRAST)
    assert out.endswith("#### 13\n")


def test_adapters_off(run, tmp_path):
    """A folder with adapters whose effect is the amateur's habit turned off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=None)
    model = testbed.load("expert")
    model.config._name_or_path = str(testbed.path("expert"))
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    testbed.tokenizer().save_pretrained(tmp_path)
    status, out, _ = run("generate", "--model", tmp_path, "--adapters-off", QUESTION)
    assert status == 0
    assert out.endswith("#### 11\n")  # fresh adapters change nothing, so the branches are equal
    how = ["--model", "testbed:student", "--method", "proxy", "--expert", tmp_path, "--adapters-off"]
    status, out, err = run("generate", *how, QUESTION)
    assert status == 0
    assert err.startswith(
        "proxy: 3 models per token; expert 0.17M parameters, 252% of the base's; anti-expert is the same"
    )
    assert out == run("generate", "--model", "testbed:student", QUESTION)[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*PLAIN, "--method", "cd", "x"], "set --amateur, or --adapters-off for --model without its adapters"),
        ([*CONTRAST, "--method", "none", "x"], "--method none has no --amateur; it decodes without contrast"),
        ([*CONTRAST, "--adapters-off", "x"], "set either --amateur or --adapters-off, not both"),
        ([*PLAIN, "--method", "proxy", "--antiexpert", "y", "x"], "set --expert"),
        ([*PLAIN, "--method", "proxy", "--expert", "y", "x"], "or --adapters-off for --expert without its adapters"),
        (
            [*PLAIN, "--method", "vcd", "--kappa", "1", "x"],
            "--method vcd has no --kappa; its own are --alpha, --beta, --noise-step, --gate",
        ),
        ([*PLAIN, "--kappa", "1", "x"], "--method none has no --kappa; it decodes without contrast"),
        ([*PLAIN, "--no-final-norm", "x"], "--method none has no --final-norm; it decodes without contrast"),
        (
            [*PLAIN, "--method", "dola", "--contrast-prompt", "y", "x"],
            "--method dola --form kl has no --contrast-prompt",
        ),
        ([*PLAIN, "--method", "cad", "--form", "li", "x"], "--method cad has no --form li: leave --form out"),
        ([*CONTRAST, "--form", "log_ratio", "x"], "--method cd has no --form log_ratio: it has obrien and li"),
        (
            [*PLAIN, "--method", "cid", "--alpha", "1", "--contrast-prompt", "y", "x"],
            "--method cid --form probability has no --alpha; its own are --contrast-prompt, --lam",
        ),
        (
            [*PLAIN, "--method", "cid", "x"],
            "prompt 0 has no contrast prompt: set --contrast-prompt, or add a column contrast_prompt",
        ),
        (
            [*PLAIN, "--method", "vcd", "x"],
            "prompt 0 has none: set --image to a path, or add a column image to its row",
        ),
        ([*PLAIN, "--image", "no.png", "x"], "prompt 0: there is no image no.png"),
        ([*PLAIN, "--method", "vcd", "--noise-step", "1000", "x"], "step must lie in 0..999"),
        ([*PLAIN, "--method", "ritual", "--kappa", "-1", "x"], "kappa must be a finite number of at least 0"),
        ([*PLAIN, "--method", "m3id", "--beta", "2", "x"], "beta must lie in [0, 1]"),
        ([*PLAIN, "--method", "dola", "--relative-top", "2", "x"], "relative_top must lie in [0, 1]"),
        ([*PLAIN, "--method", "search", "--alpha", "2", "x"], "alpha must lie in [0, 1]"),
        ([*PLAIN, "--method", "search", "--k", "0", "x"], "--k must be at least 1, not 0"),
        ([*PLAIN, "--method", "search", "--sample", "x"], "--method search is deterministic: leave --sample out"),
        ([*CONTRAST, "--method", "scd", "--beams", "2", "x"], "--method scd has no beams"),
        ([*CONTRAST, "--method", "scd", "--draft-length", "0", "x"], "--draft-length must be at least 1, not 0"),
        ([*CONTRAST, "--method", "scd", "--executor", "processor", "x"], "--method scd has only a loop"),
        ([*CONTRAST, "--executor", "loop", "--beams", "2", "x"], "--executor loop does not support beam search"),
        ([*PLAIN, "--executor", "loop", "x"], "--method none has none: leave it out"),
        ([*PLAIN, "--compare", "greedy", "x"], "--method none has no contrast"),
        (["--model", "testbed:novice", "x"], "the testbed has no model 'novice'; it has expert,"),
        ([*CONTRAST, "--alpha", "2", "x"], "alpha must lie in [0, 1]"),
        (
            [*CONTRAST, "--form", "li", "--beta", "1", "x"],
            "--method cd --form li has no --beta; its own are --amateur, --adapters-off, --alpha, --amateur-temperature",
        ),
        ([*CONTRAST, "--sample", "--temperature", "0", "x"], "--temperature must be a finite number above 0, not 0.0"),
        (
            [*CONTRAST, "--sample", "--temperature", "inf", "x"],
            "--temperature must be a finite number above 0, not inf",
        ),
        (
            [*CONTRAST, "--sample", "--temperature", "nan", "x"],
            "--temperature must be a finite number above 0, not nan",
        ),
        ([*CONTRAST, "--sample", "--top-p", "0", "x"], "--top-p must lie in (0, 1], not 0.0"),
        ([*CONTRAST, "--sample", "--top-p", "nan", "x"], "--top-p must lie in (0, 1], not nan"),
        ([*CONTRAST, "--temperature", ".5", "x"], "--temperature is of sampling: add --sample, or leave it out"),
        ([*CONTRAST, "--sample", "--top-k", "-1", "x"], "--top-k must be at least 0, not -1"),
        ([*CONTRAST, "--top-k", "3", "x"], "--top-k is of sampling: add --sample, or leave it out"),
        ([*CONTRAST, "--top-p", "1", "x"], "--top-p is of sampling: add --sample, or leave it out"),
        ([*CONTRAST, "--sample", "--beams", "2", "x"], "--sample draws one text per prompt, and --beams searches"),
        ([*CONTRAST, "--max-new-tokens", "0", "x"], "--max-new-tokens must be at least 1, not 0"),
        ([*CONTRAST, "--device", "cuda:99", "x"], "device 'cuda:99' does not exist on this machine, which has"),
        ([*CONTRAST, "--device", "toaster", "x"], "device 'toaster' does not exist on this machine, which has"),
        ([*CONTRAST, "--batch-size", "0", "x"], "--batch-size must be at least 1, not 0"),
        (
            [*CONTRAST, "--dtype", "float99", "x"],
            "--dtype must be auto or a torch dtype such as bfloat16, not 'float99'",
        ),
        ([*CONTRAST, "--resume", "x"], "--resume goes on with an --output file: name it"),
        ([*CONTRAST, "--file", "nowhere.txt"], "nowhere.txt"),
        ([*CONTRAST, "--file", "nowhere.txt", "x"], "either as arguments or with --file, not both"),
        ([*CONTRAST[:2], "--amateur", "no/such-model-here", "x"], "no/such-model-here"),
    ],
)
def test_mistakes_end_in_one_sentence(run, argv, message):
    status, out, err = run("generate", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("contralto generate: ")
    assert message in err
    assert "Traceback" not in err


def test_other_tokenizers_are_refused(run, tmp_path):
    tokenizer = testbed.tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    testbed.load("amateur").save_pretrained(tmp_path)
    _, _, err = run("generate", "--model", "testbed:expert", "--amateur", tmp_path, "x")
    assert "have different tokenizers (1 tokens differ, such as 'another')" in err


def test_an_amateur_that_does_not_fit_is_refused(run, monkeypatch):
    free = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    _, _, err = run("generate", *CONTRAST, "--device", "cpu", "x")
    assert "testbed:expert has 0.0 GiB of weights, and only 0.0 GiB of memory are free" in err


def test_rows_without_a_prompt_are_named(run, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    _, _, err = run("generate", *CONTRAST, "--file", source)
    assert f"{source}:2: a row needs a prompt or messages, and has only question" in err


def test_images_and_contrast_prompts_come_for_all_or_none(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = tmp_path / "prompts.jsonl"
    for extra, message in (
        ({"image": "a.png"}, "prompt 0 has no image and others have: decode them separately"),
        ({"contrast_prompt": "z"}, "some prompts have a contrast_prompt and others have none: decode them separately"),
    ):
        source.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "y", **extra}) + "\n")
        _, _, err = run("generate", *PLAIN, "--method", "cfg", "--file", source)
        assert message in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="alpha"):
        cli.main(["generate", "--debug", *CONTRAST, "--alpha", "2", "x"])


def test_help_and_version(capsys):
    for argv, expected in (
        (["--help"], "generate"),
        (["generate", "--help"], "--alpha 1.0 --beta 0.1 --noise-step 500"),
        (["explain", "--help"], "--form li --amateur --adapters-off --alpha 0.1 --amateur-temperature 1.0"),
        (["--version"], "0."),
    ):
        with pytest.raises(SystemExit, match="0"):
            cli.main(argv)
        assert expected in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- every method

OTHERS = ["Mia saw the red fox. She", "Ben ran. He went down to the river bank. He", "Zoe"]
OPENINGS = ["Ben went out to the barn door. He", "Mia was happy. It was quiet there. She", "Tom saw the odd"]

TEXT = {
    "cd": ("--amateur testbed:amateur --beta 2 --alpha 0.01", lambda s: s.cd(beta=2, alpha=0.01)),
    "cd li": (
        "--amateur testbed:amateur --form li --alpha 0.2 --amateur-temperature 0.5 --amateur-window 3",
        lambda s: s.cd(form="li", alpha=0.2, amateur_temperature=0.5, amateur_window=3),
    ),
    "cd gate": (
        "--amateur testbed:amateur --beta 2 --alpha 0.01 --gate 0.6",
        lambda s: decoding.GatedLogitsProcessor(s.cd(beta=2, alpha=0.01), gate=0.6),
    ),
    "scd": ("--amateur testbed:amateur --beta 2 --alpha 0.01 --draft-length 3", lambda s: s.cd(beta=2, alpha=0.01)),
    "search": ("--alpha 0.7 --k 6", lambda s: ContrastiveSearchLogitsProcessor(s.model, alpha=0.7, k=6)),
    "icd": (
        "--alpha 2 --beta 0.01",
        lambda s: decoding.InstructionContrastiveDecodingLogitsProcessor(s.model, s.other, alpha=2, beta=0.01),
    ),
    "cid": ("--lam 9", lambda s: decoding.ContrastiveInputDecodingLogitsProcessor(s.model, s.other, lam=9)),
    "cid log_ratio": (
        "--form log_ratio --lam 3 --alpha 0.01",
        lambda s: decoding.ContrastiveInputDecodingLogitsProcessor(
            s.model, s.other, lam=3, alpha=0.01, form="log_ratio"
        ),
    ),
    "cad": ("--alpha 1.5", lambda s: decoding.ContextAwareDecodingLogitsProcessor(s.model, s.other, alpha=1.5)),
    "cfg": (
        "--guidance-scale 3",
        lambda s: decoding.ClassifierFreeGuidanceLogitsProcessor(s.model, s.other, guidance_scale=3),
    ),
    "dola": (
        "--layers 1,2 --relative-top 0.01 --form jsd --no-final-norm",
        lambda s: decoding.DoLaLogitsProcessor(s.model, layers=[1, 2], relative_top=0.01, form="jsd", final_norm=False),
    ),
    "proxy": (
        "--expert testbed:student --antiexpert testbed:amateur --alpha 0.5",
        lambda s: decoding.ProxyTuningLogitsProcessor(_embedded("student"), _embedded("amateur"), alpha=0.5),
    ),
}
VISION = {
    "vcd": (
        "--alpha 2 --beta 0.01 --noise-step 900",
        lambda s: decoding.VisualContrastiveDecodingLogitsProcessor(s.model, s.noised, alpha=2, beta=0.01),
    ),
    "ritual": (
        "--kappa 2 --beta 0.01 --normalize",
        lambda s: decoding.RitualLogitsProcessor(s.model, s.turned, kappa=2, beta=0.01, normalize=True),
    ),
    "ritual-vcd": (
        "--kappa 2 --alpha 0.5 --noise-step 900",
        lambda s: decoding.RitualVCDLogitsProcessor(s.model, s.turned, s.noised, kappa=2, alpha=0.5),
    ),
    "m3id": ("--lam 0.5 --beta 0.01", lambda s: decoding.M3IDLogitsProcessor(s.model, s.blind, lam=0.5, beta=0.01)),
    "vdd": (
        "--alpha 2 --beta 0.01",
        lambda s: decoding.VisualContrastiveDecodingLogitsProcessor(s.model, s.blind, alpha=2, beta=0.01),
    ),
    "sid": (
        "--start-layer 1 --keep 3 --alpha 2",
        lambda s: decoding.SIDLogitsProcessor(s.model, s.inputs, start_layer=1, keep=3, alpha=2),
    ),
    "avisc": (
        "--layer-gamma 0.6 --lam 0.5 --alpha 2.5",
        lambda s: decoding.AVISCLogitsProcessor(s.model, s.inputs, layer_gamma=0.6, lam=0.5, alpha=2.5),
    ),
    "pai": (
        "--start-layer 1 --alpha 0.5 --gamma 1.5",
        lambda s: decoding.PAILogitsProcessor(s.model, s.inputs, s.blind, start_layer=1, alpha=0.5, gamma=1.5),
    ),
    "only": (
        "--layer 1 --alpha-pos 2 --alpha-neg 2 --gamma 0.5",
        lambda s: decoding.ONLYLogitsProcessor(s.model, s.inputs, layer=1, alpha_pos=2, alpha_neg=2, gamma=0.5),
    ),
    "icd": ("--alpha 2", lambda s: decoding.InstructionContrastiveDecodingLogitsProcessor(s.model, s.other, alpha=2)),
    "dola": (
        "--layers 1 --relative-top 0.01",
        lambda s: decoding.DoLaLogitsProcessor(s.model, layers=[1], relative_top=0.01, vision_inputs=s.vision),
    ),
    "cd": (
        "--amateur testbed:amateur",
        lambda s: decoding.ContrastiveDecodingLogitsProcessor(s.model, beta=0.5, vision_inputs=s.vision),
    ),
}


_embedded = cache(testbed.load)
_llava = cache(zoo_llava.build)


class Text:
    """One opening of a story, what its other branches read, and the models, as a user would put them together."""

    def __init__(self, i):
        self.model, self.tokenizer = _embedded("expert"), testbed.tokenizer()
        self.inputs, self.other = (self.tokenizer(texts[i], return_tensors="pt") for texts in (OPENINGS, OTHERS))

    def cd(self, **how):
        return decoding.ContrastiveDecodingLogitsProcessor(_embedded("amateur"), **how)


class Scene:
    """One question about a picture, and what its other branches read."""

    def __init__(self, i, folder, seed):
        self.model, self.processor = _llava()
        self.tokenizer = self.processor.tokenizer
        image = Image.open(folder / f"{i}.png").convert("RGB")
        self.inputs = self._read(ASKED[i], image)
        self.turned = self._read(ASKED[i], ritual_transform(image, seed=seed + i).image)
        self.noised = noised(self.inputs, step=900, seed=[1000 * (seed + i)])
        self.other, self.blind = self._read("Is there no image?", image), self._read(ASKED[i], None)
        self.vision = {"pixel_values": self.inputs["pixel_values"]}

    def _read(self, text, image):
        parts = [{"type": "image", "image": image}] if image else []
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )


ASKED = ["Is there a cup in the image?", "What is in the image?", "a kitchen with a cup, a pot?"]
LENGTH = 9


def _by_hand(user, processor):
    output = user.model.generate(**user.inputs, logits_processor=[processor], max_new_tokens=LENGTH, do_sample=False)
    return user.tokenizer.decode(output[0, user.inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@cache
def _plain():
    return [_by_hand(user, lambda ids, scores: scores) for user in map(Text, range(3))]


FAST = ("cd", "cad", "vcd", "m3id")
"""Methods whose command is run in every test run, not only in the slow ones."""


def _texts(run, rows, tmp_path, *argv):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--dtype", "float32", "--file", source, "--batch-size", 2, "--max-new-tokens", LENGTH, "--output", target]
    status, _, err = run("generate", *how, *argv)
    assert status == 0, err
    found = _rows(target)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    return [row["text"] for row in found]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TEXT])
def test_every_method_of_texts(run, tmp_path, name):
    flags, by_hand = TEXT[name]
    users = [Text(i) for i in range(3)]
    rows = [{"prompt": q, "contrast_prompt": o} for q, o in zip(OPENINGS, OTHERS, strict=True)]
    found = _texts(run, rows, tmp_path, *PLAIN, "--raw", "--method", name.split()[0], *flags.split())
    assert found == [_by_hand(user, by_hand(user)) for user in users]
    assert found != _plain()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    zoo_llava.save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VISION])
def test_every_method_of_images(run, tmp_path, llava, name):
    flags, by_hand = VISION[name]
    flags = flags.replace("testbed:amateur", str(llava))
    users = [Scene(i, llava, seed=5) for i in range(3)]
    rows = [{"prompt": asked, "image": str(llava / f"{i}.png")} for i, asked in enumerate(ASKED)]
    rows = [{**row, "contrast_prompt": "Is there no image?"} for row in rows]
    found = _texts(run, rows, tmp_path, "--model", llava, "--seed", 5, "--method", name, *flags.split())
    assert found == [_by_hand(user, by_hand(user)) for user in users]


def test_a_folder_of_images_beams_and_a_contrast_prompt_around_the_prompt(run, llava):
    """Paths from the file's folder; the processor where there are beams; messages in parts; {prompt}."""
    parts = [{"type": "text", "text": ASKED[0]}, {"type": "image"}]
    file = llava / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}], "image": ["0.png"]}) + "\n")
    how = ["--method", "icd", "--contrast-prompt", "no {prompt}", "--beams", 2, "--max-new-tokens", LENGTH]
    status, out, err = run("generate", "--model", llava, "--file", file, *how)
    assert status == 0
    assert err.endswith("icd: 2 forward passes per token (instruction, disturbed instruction)\n")
    user = Scene(0, llava, seed=0)
    image = Image.open(llava / "0.png")
    how = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}
    mine, other = (
        user.processor.apply_chat_template([{"role": "user", "content": said}], **how)
        for said in (
            [parts[0], {"type": "image", "image": image}],
            [{"type": "image", "image": image}, {"type": "text", "text": f"no {ASKED[0]}"}],
        )
    )
    contrast = decoding.InstructionContrastiveDecodingLogitsProcessor(user.model, other)
    output = user.model.generate(**mine, logits_processor=[contrast], num_beams=2, max_new_tokens=LENGTH)
    text = user.tokenizer.decode(output[0, mine["input_ids"].shape[1] :], skip_special_tokens=True)
    assert out == f"=== 0: {ASKED[0]}\n{text}\n"


def test_adapters_off_with_images(run, tmp_path, llava):
    peft = pytest.importorskip("peft")
    user = Scene(0, llava, seed=0)
    user.model = zoo_llava.build()[0]
    user.model.name_or_path = str(llava)  # what the adapters' configuration names as their base
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(user.model, config)
    tuned.save_pretrained(tmp_path)
    user.processor.save_pretrained(tmp_path)
    how = ["--adapters-off", "--image", llava / "0.png", "--max-new-tokens", LENGTH, "--dtype", "float32", ASKED[0]]
    status, out, err = run("generate", "--model", tmp_path, *how)
    assert (status, err.splitlines()[-1]) == (
        0,
        "cd: 2 models per token; amateur is the same model without its adapters",
    )
    branch = decoding.AdaptersOff(tuned)
    user.model = tuned
    assert out == f"{_by_hand(user, decoding.ContrastiveDecodingLogitsProcessor(branch, vision_inputs=user.vision))}\n"


def test_encoder_decoders(run, tmp_path):
    tokenizer = testbed.tokenizer()
    for name, seed in (("one", 1), ("two", 2)):
        zoo.build("t5", seed=seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    one, two = (zoo.build("t5", seed=seed, vocab_size=len(tokenizer)) for seed in (1, 2))
    texts, others = ["Mia was happy. She went out.", "Mia went to the barn door."], ["Tom.", "Sue saw the old fox."]
    rows = [{"prompt": text, "contrast_prompt": other} for text, other in zip(texts, others, strict=True)]
    by_name = {
        "cd": lambda s, o: decoding.ContrastiveDecodingLogitsProcessor(two, beta=3, alpha=1e-4, encoder_inputs=s),
        "cad": lambda s, o: decoding.ContextAwareDecodingLogitsProcessor(one, o, alpha=2),
    }
    flags_of = {"cd": ["--amateur", tmp_path / "two", "--beta", 3, "--alpha", 1e-4], "cad": ["--alpha", 2]}
    for name, by_hand in by_name.items():
        flags = flags_of[name]
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        found = _texts(run, rows, tmp_path, "--model", tmp_path / "one", "--raw", "--method", name, *flags)
        for row, said in zip(rows, found, strict=True):
            source, other = (tokenizer(row[key], return_tensors="pt") for key in ("prompt", "contrast_prompt"))
            how = {"logits_processor": [by_hand(source, other)], "max_new_tokens": LENGTH, "do_sample": False}
            output = one.generate(**source, **how)
            assert tokenizer.decode(output[0], skip_special_tokens=True) == said


def test_every_method_is_in_the_matrix():
    """A method without a reference for `generate` is not tested."""
    contrastive = {method.name for method in methods.METHODS.values() if method.contrasts}
    elsewhere = {"critic"}  # its model classifies tokens: tests/decoding/methods/test_critic_method.py
    assert {name.split()[0] for name in (*TEXT, *VISION)} == contrastive - elsewhere
    assert {name for name in contrastive if methods.METHODS[name].reads_images} <= set(VISION)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (PLAIN, "none: 1 forward pass per token"),
        ([*PLAIN, "--method", "cfg"], "cfg: 2 rows per prompt in one forward pass (prompt, negative prompt)"),
        (
            [*PLAIN, "--method", "cfg", "--executor", "processor"],
            "cfg: 2 forward passes per token (prompt, negative prompt)",
        ),
        ([*PLAIN, "--method", "search"], "search: 1 forward pass per token for all 4 candidates"),
        ([*PLAIN, "--method", "dola"], "dola: 1 forward pass per token; its head runs again for every earlier layer"),
        (
            [*CONTRAST, "--method", "scd"],
            "scd: 2 models; the expert verifies several draft tokens per forward pass; amateur 0.02M parameters, 11% of the expert's",
        ),
        (
            [*PLAIN, "--method", "proxy", "--expert", "testbed:student", "--antiexpert", "testbed:amateur"],
            "proxy: 3 models per token; expert 0.07M parameters, 40% of the base's; anti-expert 0.02M parameters, 11%",
        ),
    ],
)
def test_it_says_what_runs_and_what_that_costs(run, argv, line):
    said = run("generate", *argv, "--max-new-tokens", 1, "x")[2]
    assert said.startswith(line)
    assert said.count("\n") == 1
