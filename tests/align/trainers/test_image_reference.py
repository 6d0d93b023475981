"""A precomputed reference of rows with images: the numbers of a live one, found again by texts and pixels."""

import pytest
import torch
from datasets import Dataset
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor

from contralto import testbed
from contralto.align.caches.image_reference import ImageReferenceCache, processor_digest
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.reference_pass import ReferencePass

pytestmark = RENAMED_OPTIONS


def _picture(number):
    return Image.new("RGB", (32, 32), (20 * number, 40, 90))


def _pairs(size):
    """Questions about pictures, each of another color."""
    pictures = [_picture(i) for i in range(size)]
    said = [("yes", "no") if i % 2 else ("no", "yes") for i in range(size)]
    sides = zip(("chosen", "rejected"), zip(*said, strict=True), strict=True)
    answers = {side: [[{"role": "assistant", "content": text}] for text in texts] for side, texts in sides}
    prompt = [{"role": "user", "content": "is there a cat?"}]
    return Dataset.from_list(
        [
            {"images": [picture], "prompt": prompt, "chosen": answers["chosen"][i], "rejected": answers["rejected"][i]}
            for i, picture in enumerate(pictures)
        ]
    )


def _trainer(folder, train, *, adapter, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"per_device_train_batch_size": 3, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    args = PreferenceConfig(str(folder), **quiet, **small, **options)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if adapter else None
    torch.manual_seed(0)
    path = str(testbed.path("vision-0"))
    return PreferenceTrainer(path, args=args, train_dataset=train, eval_dataset=_pairs(3), peft_config=lora)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_a_cached_reference_is_a_live_one(adapter, tmp_path, monkeypatch):
    """Two steps and an evaluation; a second run finds all blocks, a changed pixel is another row."""
    passes, computed = [], ReferencePass.__call__
    monkeypatch.setattr(ReferencePass, "__call__", lambda *args: passes.append(len(args[1])) or computed(*args))
    cached = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "kept")}
    runs = []
    for options in ({}, cached, cached):
        one = _trainer(tmp_path / str(len(runs)), _pairs(5), adapter=adapter, **options)
        one.train()
        runs.append([*one.state.log_history[:2], one.evaluate()])
        assert (one.ref_model is None) == (adapter or bool(options))
    assert passes == [3, 5]
    for kept in runs[1:]:
        for live, other in zip(runs[0], kept, strict=True):
            same = {name: number for name, number in live.items() if name.endswith(("loss", "margins", "grad_norm"))}
            assert len(same) > 1
            assert {name: other[name] for name in same} == pytest.approx(same, rel=1e-4, abs=1e-6)
    changed = _pairs(5).map(
        lambda row, i: row | {"images": [_picture(9)] if i == 4 else row["images"]}, with_indices=True
    )
    one = _trainer(tmp_path / "changed", changed, adapter=adapter, **cached)
    assert passes == [3, 5, 5]
    if not adapter:
        with pytest.raises(ValueError, match="the reference is gone"):
            one.evaluate(_pairs(2))


def test_rows_are_known_by_texts_and_pixels():
    cache = ImageReferenceCache("unused", "key", lambda rows: ([], []))
    first, second = _pairs(2)
    known = cache.block_hash([first])
    assert known == cache.block_hash([dict(first)])
    other_text = first | {"chosen": first["rejected"]}
    assert len({known, cache.block_hash([second]), cache.block_hash([other_text]), cache.block_hash([first] * 2)}) == 4
    with pytest.raises(ValueError, match="a row has a bytearray"):
        cache.block_hash([first | {"images": [bytearray(2)]}])


def test_another_image_size_or_template_is_another_processor():
    one, same, small, templated = (AutoProcessor.from_pretrained(testbed.path("vision-0")) for _ in range(4))
    same(text=["a cat", "a"], padding=True, truncation=True, max_length=1)  # which leaves traces in its tokenizer
    small.image_processor.size = {"height": 16, "width": 16}
    templated.chat_template = "{{ messages }}"
    digests = [processor_digest(each) for each in (one, same, small, templated)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
