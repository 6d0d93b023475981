"""Reused beginnings of prompts against plain forward passes of whole rows, in float64.

The breaks that these tests must notice are in tests/mutants/declared/branches.yaml.
"""

import pytest
import torch
import zoo
from zoo import vision

from contralto.decoding import (
    AdaptersOff,
    ClassifierFreeGuidanceLogitsProcessor,
    ContrastiveDecodingLogitsProcessor,
    EarlyExit,
)
from contralto.decoding.branches import CachedReader, prefixes, reused_prefixes
from contralto.decoding.branches.prompts import prepare_images
from contralto.decoding.executors.score import score

SHARED = 30
FULL = ["llama", "gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("opt", "gpt_neox", "granite"))]
OTHER = ["mistral", "gemma3", "mamba"]
"""Families with sliding windows or recurrent states."""
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def drawn(count, seed):
    return torch.randint(3, zoo.VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def beginning_alike(ends, shared=100):
    """Rows that begin with the same tokens, and end in different ones, so many each."""
    return [torch.cat([drawn(SHARED, shared), drawn(count, 7 * i + count)]) for i, count in enumerate(ends)]


def prepared(model, rows):
    inputs = zoo.pad(rows)
    return prepare_images(model, inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}, len(rows))


def read(model, rows, keep=1):
    """A reader after these rows, and their logits."""
    reader = CachedReader(model)
    return reader, reader.prefill(prepared(model, rows), keep=keep)


@torch.no_grad()
def plain(model, rows, count=1):
    """The logits of the last positions of each row, each row read alone and without a cache."""
    return torch.stack([model(input_ids=row[None], use_cache=False).logits[0, -count:] for row in rows])


@pytest.mark.parametrize("family", FULL)
def test_rows_that_begin_like_earlier_ones(family):
    """Batches of other sizes and lengths in turn, then what may follow a prefill: further tokens, other orders, shorter rows."""
    model = zoo.build(family, seed=1).double()
    with reused_prefixes() as caches:
        for ends in [(3, 9, 5), (2, 2), (8,), (1, 4, 12, 3)]:
            before, rows = caches.reused, beginning_alike(ends)
            reader, logits = read(model, rows, keep=2)
            torch.testing.assert_close(logits, plain(model, rows, 2), **CLOSE)
            assert caches.reused - before >= min(SHARED, SHARED + max(ends) - 2) * len(ends)
    more = torch.stack([drawn(3, i) for i in range(4)])
    rows = [torch.cat([row, new]) for row, new in zip(rows, more, strict=True)]
    torch.testing.assert_close(reader.read(more, new=3), plain(model, rows, 3), **CLOSE)
    order, last = torch.tensor([3, 0, 0, 2]), torch.stack([drawn(1, 90 + i) for i in range(4)])
    reader.reorder(order)
    assert reader.crop(reader.length - 2)
    rows = [torch.cat([rows[i][:-2], new]) for i, new in zip(order.tolist(), last, strict=True)]
    torch.testing.assert_close(reader.read(last), plain(model, rows), **CLOSE)


def test_the_first_batch_reads_its_own_beginning_once():
    model, rows = zoo.build("llama", seed=1).double(), beginning_alike((4, 4, 4))
    counted = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: counted.append(args[0].numel()))
    prefixes._VERDICTS[model] = True
    with reused_prefixes():
        torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
    assert counted[:2] == [SHARED, 3 * 4]


def test_rows_of_two_kinds_share_their_own_beginnings():
    model = zoo.build("llama", seed=1).double()
    with reused_prefixes() as caches:
        for turn in range(3):
            before = caches.reused
            rows = [*beginning_alike((5, 3 + turn)), *beginning_alike((2, 6), shared=200)]
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
            assert caches.reused - before >= 4 * SHARED


def test_a_short_row_may_lie_in_the_columns_of_a_beginning():
    """As a contrast prompt without the examples does beside prompts with them."""
    model = zoo.build("llama", seed=1).double()
    with reused_prefixes() as caches:
        for turn in range(2):
            rows = [*beginning_alike((6, 4 + turn)), drawn(5, turn)]
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
    assert caches.reused == 2 * 3 * SHARED


def test_another_kind_of_prompts_does_not_displace_the_first():
    model = zoo.build("llama", seed=1).double()
    with reused_prefixes() as caches:
        for shared in (100, 200, 100, 200):
            before, rows = caches.reused, beginning_alike((5,), shared)
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
        assert caches.reused - before == SHARED + 5 - 1
    with reused_prefixes(rows=1) as caches:
        for shared in (100, 200, 100, 200):
            read(model, beginning_alike((5,), shared))
        assert caches.reused == 0


def test_rows_without_a_common_beginning_and_short_ones_are_read_whole():
    model = zoo.build("llama", seed=1).double()
    with reused_prefixes() as caches:
        for rows in (
            zoo.prompts(3),
            zoo.prompts(3, seed=1),
            [row[: prefixes.LEAST - 1] for row in beginning_alike((1, 1))],
        ):
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
    assert (caches.reused, caches.tokens) == (0, 2 * 30 + 2 * (prefixes.LEAST - 1))


def test_the_number_of_remembered_rows_is_bounded():
    model = zoo.build("llama", seed=1)
    with reused_prefixes(rows=2) as caches:
        for shared in range(5):
            read(model, beginning_alike((3, 4), shared))
    (_, rows), *others = caches._rows.values()
    assert not others
    assert [keys.shape[:1] + keys.shape[2:3] for row in rows for keys, _ in row.states[:1]] == [(1, SHARED + 4)] * 2
    with pytest.raises(ValueError, match="rows must be at least 1, not 0"), reused_prefixes(rows=0):
        pass


@pytest.mark.parametrize("family", OTHER)
def test_models_whose_states_cannot_be_cut_read_whole_prompts(family):
    model, rows = zoo.build(family, seed=1), beginning_alike((4, 4))
    with reused_prefixes() as caches:
        for _ in range(2):
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), rtol=1e-4, atol=1e-4)
    assert caches.reused == 0


def test_prompts_with_images_are_read_whole():
    model, inputs = vision.build("llava"), vision.batch([case.original for case in vision.cases("llava", 2)])
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    with reused_prefixes() as caches:
        for _ in range(2):
            CachedReader(model).prefill(prepare_images(model, inputs["input_ids"], others, 2))
    assert (caches.reused, caches.tokens) == (0, 0)


def test_trained_weights_are_read_anew():
    model, rows = zoo.build("llama", seed=1).double(), beginning_alike((4,))
    with reused_prefixes() as caches, torch.no_grad():
        read(model, rows)
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
        assert caches.reused == 0
        read(model, rows)
        assert caches.reused == SHARED + 3


def test_adapters_and_layers_of_one_model_have_states_of_their_own():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(zoo.build("llama", seed=1), config).eval().double()
    for variant in (AdaptersOff(tuned), EarlyExit(tuned, layers=1)):
        found = {}
        for reuse in (False, True):
            context = reused_prefixes() if reuse else torch.no_grad()
            with context as caches:
                for ends in ((3, 4), (5, 2)):
                    rows, last = zoo.pad(beginning_alike(ends)), beginning_alike((2, 2), shared=300)
                    method = ContrastiveDecodingLogitsProcessor(variant, alpha=0, attention_mask=rows["attention_mask"])
                    continued = torch.stack(last)[:, -3:]
                    found.setdefault(reuse, []).append(score(method, tuned.get_base_model(), rows, continued).tokens)
            assert not reuse or caches.reused >= 4 * 2 * SHARED
        torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)


def test_a_model_that_looks_at_later_tokens_reads_whole_prompts():
    """A shift of all logits by the number of tokens that are read, which no cache can hold."""
    model, rows = zoo.build("llama", seed=1).double(), beginning_alike((4, 4))

    def shift(_module, _args, kwargs, outputs):
        outputs.logits += kwargs["input_ids"].shape[1]
        return outputs

    model.register_forward_hook(shift, with_kwargs=True)
    with reused_prefixes() as caches:
        for _ in range(2):
            torch.testing.assert_close(read(model, rows)[1], plain(model, rows), **CLOSE)
    assert caches.reused == 0


@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("method", ["amateur", "prompt"])
def test_methods_choose_the_same_tokens(method, executor):
    """Over two batches, with another model, and with contrast prompts that share a beginning of their own."""
    expert, amateur = zoo.build("llama", seed=1).double(), zoo.build("gpt2", hidden=16, seed=2).double()
    written = {}
    for reuse in (False, True):
        with reused_prefixes() if reuse else torch.no_grad() as caches:
            for ends in ((3, 6), (2, 5)):
                inputs = zoo.pad(beginning_alike(ends))
                if method == "amateur":
                    made = ContrastiveDecodingLogitsProcessor(amateur, attention_mask=inputs["attention_mask"])
                else:
                    contrast = zoo.pad(beginning_alike((1, 2), shared=200))
                    made = ClassifierFreeGuidanceLogitsProcessor(expert, contrast, guidance_scale=2)
                way = {"custom_generate": made.loop()} if executor == "loop" else {"logits_processor": [made]}
                tokens = expert.generate(**inputs, **way, max_new_tokens=6, do_sample=False)
                written.setdefault(reuse, []).append(tokens.tolist())
    assert written[True] == written[False]
    assert caches.reused > caches.tokens / 2


def test_the_same_tokens_at_other_positions_are_read_anew():
    """As by a caller who gives positions; rotary attention sees distances alone, learned positions do not."""
    model, rows = zoo.build("gpt2", seed=1).double(), beginning_alike((4,))
    prompts = prepared(model, rows)
    later = prompts._replace(kwargs={**prompts.kwargs, "position_ids": prompts.kwargs["position_ids"] + 5})
    expected = CachedReader(model).prefill(later)
    prefixes._VERDICTS[model] = True  # the comparison would notice too
    with reused_prefixes() as caches:
        CachedReader(model).prefill(prompts)
        torch.testing.assert_close(CachedReader(model).prefill(later), expected, **CLOSE)
        assert caches.reused == 0


def test_nothing_is_reused_outside_of_the_context():
    model, rows = zoo.build("llama", seed=1), beginning_alike((4,))
    with reused_prefixes() as caches:
        read(model, rows)
    read(model, rows)
    assert (caches.reused, caches.tokens, prefixes.PrefixCaches.current()) == (0, SHARED + 4, None)
