"""POPE's measures and parsers, against a slow count and against the codebases' rules on single answers."""

import random

import pytest

from contralto.eval.metrics import pope


def _slow(pairs):
    """The measures from the four cells of the confusion table, an unparsed answer in neither column."""
    cells = {"TP": 0, "FP": 0, "TN": 0, "FN": 0, "unparsed yes": 0, "unparsed no": 0}
    for label, said in pairs:
        if said is None:
            cells["unparsed yes" if label else "unparsed no"] += 1
        elif said:
            cells["TP" if label else "FP"] += 1
        else:
            cells["FN" if label else "TN"] += 1
    tp, fp = cells["TP"], cells["FP"]
    precision = tp / (tp + fp) if tp + fp else 0
    missed = cells["FN"] + cells["unparsed yes"]
    recall = tp / (tp + missed) if tp + missed else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    unparsed = cells["unparsed yes"] + cells["unparsed no"]
    return ((tp + cells["TN"]) / len(pairs), precision, recall, f1, (tp + fp) / len(pairs), unparsed / len(pairs))


@pytest.mark.parametrize("seed", range(20))
def test_rates_equal_the_confusion_table(seed):
    rng = random.Random(seed)
    answers = [[True], [False], [None], [True, False], [True, False, None]][seed % 5]
    labels = [[True, False], [True], [False]][seed % 3]
    pairs = [(rng.choice(labels), rng.choice(answers)) for _ in range(rng.randint(1, 60))]
    assert tuple(pope.rates(pairs)) == pytest.approx(_slow(pairs), abs=1e-12)


def test_what_lm_eval_aggregates_are_the_rates():
    rng = random.Random(1)
    pairs = [(rng.random() < 0.5, rng.choice([True, False, None])) for _ in range(200)]
    kept = [pope.document_metrics(*pair) for pair in pairs]
    rates = pope.rates(pairs)
    for name, mean in (("acc", rates.accuracy), ("yes_ratio", rates.yes_ratio), ("unparsed", rates.unparsed)):
        assert sum(each[name] for each in kept) / len(kept) == mean
    for name, made in (("precision", pope.precision), ("recall", pope.recall), ("f1", pope.f1)):
        assert made([each[name] for each in kept]) == getattr(rates, name)


YES, NO, NEITHER = True, False, None
SAID = {
    # text: words, official, ritual, VCD if yes is right, VCD if no is right
    "Yes": (YES, YES, YES, YES, YES),
    "yes.": (YES, YES, YES, YES, YES),
    "No": (NO, NO, NO, NO, NO),
    "NO": (NO, YES, NO, NO, NO),
    "no, there is none": (NO, NO, NO, NO, NO),
    "No.": (NO, NO, NO, NO, NO),
    "I am not sure.": (NEITHER, NO, NO, NO, NO),
    "I know": (NEITHER, YES, YES, NO, NO),
    "There isn't one": (NEITHER, YES, NO, NO, YES),
    "There is. No doubt": (NO, YES, NO, NO, NO),
    "Yes or no?": (NEITHER, YES, YES, YES, NO),
    "A snowboard": (NEITHER, YES, YES, NO, NO),
    "A cat": (NEITHER, YES, YES, NO, YES),
    "": (NEITHER, YES, YES, NO, YES),
}


@pytest.mark.parametrize("text", SAID)
def test_parsers(text):
    words, official, ritual, vcd_yes, vcd_no = SAID[text]
    for label in (True, False):
        said = {name: pope.parse_answer(text, label, parser=name) for name in pope.PARSERS}
        assert said == {
            "words": words,
            "official": official,
            "llava": official,
            "ritual": ritual,
            "vcd": vcd_yes if label else vcd_no,
        }


def test_refusals():
    with pytest.raises(ValueError, match="no POPE parser 'vicuna'; there are words, official"):
        pope.parse_answer("Yes", True, parser="vicuna")
    with pytest.raises(ValueError, match="at least one question"):
        pope.rates([])
