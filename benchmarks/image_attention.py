"""Measure ICD, SID, AVISC, PAI, ONLY and VDD on the testbed's adversarial questions about drawn scenes, with three models and the control.

    python benchmarks/image_attention.py                 print the table as Markdown
    python benchmarks/image_attention.py --pictures 20

Settings are the papers', but for what a model of 2 layers and 16 image tokens does not have: SID hides from layer 1 on and keeps 4 tokens, PAI
amplifies from layer 1 on. ICD's disturbed instruction begins with the prefix of its paper, whose words the models hardly know, or with
a question of their own world. Nothing was tuned. An answer is one token. Greedy decoding under the mask is greedy decoding. *Matched* is greedy
decoding with its threshold moved until it says yes as often as the method; tests are McNemar's, exact.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from vision_card import BATCH, CONTROL, PLAIN, SEEDS, Reader, truth

from contralto import decoding, testbed
from contralto.eval.stats import bias_matched, mcnemar_exact, proportion
from contralto.testbed import scenes
from contralto.testbed.scenes import Question

PREFIXES = {
    "ICD": "You are a confused objects detector to provide a fuzzy overview or impression of the image.",
    "ICD, no image": "Is there no image?",
}
"""What disturbs an instruction: the first is the paper's."""
METHODS: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "VDD": lambda model, seen, blind: decoding.VisualContrastiveDecodingLogitsProcessor(model, blind),
    "SID": lambda model, seen, blind: decoding.SIDLogitsProcessor(model, seen, start_layer=1, keep=4),
    "AVISC": lambda model, seen, blind: decoding.AVISCLogitsProcessor(model, seen),
    "PAI": lambda model, seen, blind: decoding.PAILogitsProcessor(model, seen, blind, start_layer=1),
    "ONLY": lambda model, seen, blind: decoding.ONLYLogitsProcessor(model, seen),
}


@torch.no_grad()
def scores(reader: Reader, asked: Sequence[Question]) -> dict[str, Tensor]:
    """Return the scores `(n, V)` after each question, of the model and of each method."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("greedy", *METHODS, *PREFIXES)}
    tokenizer = reader.processor.tokenizer
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        seen = dict(reader.inputs([q.scene for q in batch], [q.text for q in batch], PLAIN))
        chats = [[{"role": "user", "content": [{"type": "text", "text": q.text}]}] for q in batch]
        prompts = [reader.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        blind = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        blind = {name: blind[name] for name in ("input_ids", "attention_mask")}
        logits = reader.model(**seen, logits_to_keep=1).logits[:, -1]
        found["greedy"].append(logits)
        for name, make in METHODS.items():
            found[name].append(make(reader.model, seen, blind)(seen["input_ids"], logits))
        for name, prefix in PREFIXES.items():
            other = dict(reader.inputs([q.scene for q in batch], [f"{prefix} {q.text}" for q in batch], PLAIN))
            disturbed = decoding.InstructionContrastiveDecodingLogitsProcessor(reader.model, other)
            found[name].append(disturbed(seen["input_ids"], logits))
    return {name: torch.cat(parts) for name, parts in found.items()}


def lines(name: str, reader: Reader, asked: Sequence[Question]) -> list[str]:
    """Return the rows of the table for one model."""
    labels, all_scores = truth(asked), scores(reader, asked)
    margins = reader.lean(all_scores["greedy"])
    baseline = reader.decide(all_scores["greedy"]).hits(labels)
    found = [_row(name, "greedy", baseline, float(reader.decide(all_scores["greedy"]).yes.mean()), labels, None)]
    for method in (*METHODS, *PREFIXES):
        answers = reader.decide(all_scores[method])
        matched = torch.from_numpy(bias_matched(margins.numpy(), int(answers.yes.sum())))
        controls = [baseline, (matched == labels).tolist()]
        found.append(_row(name, method, answers.hits(labels), float(answers.yes.mean()), labels, controls))
    return found


def _row(
    model: str, name: str, hits: Sequence[bool], yes: float, labels: Tensor, controls: Sequence[Sequence[bool]] | None
) -> str:
    right = torch.tensor(hits)
    precision = float((right & labels).sum()) / max(1.0, yes * len(labels))
    recall = float((right & labels).sum() / labels.sum())
    f1 = 2 * precision * recall / (precision + recall)
    tests = ["", ""]
    if controls is not None:
        results = [mcnemar_exact(control, hits) for control in controls]
        tests = [f"+{test.won} / -{test.lost}, p {test.p:.2g}" for test in results]
    return f"| {model} | {name} | {proportion(hits)} | {f1:.3f} | {yes:.3f} | {' | '.join(tests)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--models", nargs="+", default=[*SEEDS, CONTROL])
    args = parser.parse_args()
    asked = scenes.questions(list(islice(scenes.scenes(2027, "test"), args.pictures)), "adversarial")
    print(f"{len(asked)} adversarial questions per model\n")
    print("| model | | accuracy | F1 | yes-ratio | over greedy | over matched |\n|---|---|---|---|---|---|---|")
    for name in args.models:
        for line in lines(name, Reader(testbed.path(name)), asked):
            print(line, flush=True)


if __name__ == "__main__":
    main()
