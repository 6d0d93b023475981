"""`DecodingConfig` and `SamplingConfig`: every range at its borders, every option in the sentence that rejects it."""

import dataclasses
import math

import pytest
import torch

from contralto.common.options import OptionError
from contralto.decoding.methods import METHODS, DecodingConfig, Form, Unsupported
from contralto.decoding.methods.base import MethodParameter
from contralto.decoding.methods.config import SamplingConfig, check_sampling

AMATEUR = {"amateur": "testbed:amateur"}
OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "greedy": "greedy decoding"}


# -------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_is_plain_by_default():
    assert SamplingConfig() == SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize(
    "values", [{"temperature": 1e-6}, {"temperature": 99.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
)
def test_values_at_the_borders_are_taken(values):
    (name,) = values
    assert getattr(SamplingConfig(**values), name) == values[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("top_p", value) for value in (0.0, -0.5, 1.5)),
        *(("min_p", value) for value in (-0.5, 1.5)),
        ("top_k", -1),
    ],
)
def test_values_outside_their_range_are_rejected(name, value):
    with pytest.raises(OptionError, match=rf"{name} must .*not {value}"):
        SamplingConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)])
def test_truncation_needs_a_temperature(name, value):
    with pytest.raises(
        ValueError, match=r"^top_k, top_p and min_p apply only to sampling: set temperature above 0 too$"
    ):
        check_sampling(**{**OFF, name: value})
    check_sampling(**{**OFF, name: value, "temperature": 0.5})


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_greedy_decoding_is_temperature_0_and_nothing_below(value):
    check_sampling(**OFF)
    with pytest.raises(
        ValueError, match=rf"^temperature must be .* at least 0 \(0 for greedy decoding\), not {value}$"
    ):
        check_sampling(**{**OFF, "temperature": value})


def test_a_prefix_names_the_parameters():
    wrong = {**OFF, "temperature": 1.0, "top_p": 2.0}
    with pytest.raises(OptionError, match=r"^top_p must lie in \(0, 1\], not 2.0$"):
        check_sampling(**wrong)
    with pytest.raises(ValueError, match=r"^draft_top_p must lie in \(0, 1\], not 2.0$") as found:
        check_sampling(**wrong, prefix="draft_")
    assert not isinstance(found.value, OptionError)


# ---------------------------------------------------------------------------------------------------------------- options


def test_the_method_follows_from_the_models():
    assert DecodingConfig().method == "none"
    assert DecodingConfig(models=AMATEUR).method == "cd"
    assert DecodingConfig(models={"expert": "a", "antiexpert": "b"}).method == "proxy"
    with pytest.raises(OptionError, match=r"^method='proxy' needs other models: set antiexpert, or adapters_off for"):
        DecodingConfig(models={"expert": "a"})
    assert DecodingConfig(adapters_off=True).method == "cd"
    with pytest.raises(OptionError, match=r"^method='cd' form='obrien' has no antiexpert; its own are amateur, "):
        DecodingConfig(models={"amateur": "a", "antiexpert": "b"})


def test_an_unknown_option_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"^there is no option 'amatuer' \(did you mean 'amateur'\?\); a method's"):
        DecodingConfig.from_options(amatuer="a", kapa=1)


def test_adapters_off_may_be_left_out_but_is_a_truth_value():
    assert DecodingConfig.from_options(method="none") == DecodingConfig()
    with pytest.raises(TypeError, match=r"^adapters_off must be true or false, not 'no'$"):
        DecodingConfig.from_options(adapters_off="no")


def test_a_form_is_one_of_the_method():
    assert DecodingConfig(method="cd", models=AMATEUR, form="li").form == "li"
    with pytest.raises(OptionError, match=r"^method='cd' has no form='ly': it has obrien and li and released$"):
        DecodingConfig(method="cd", models=AMATEUR, form="ly")
    with pytest.raises(OptionError, match=r"^method='cad' has no form='li': leave form out$"):
        DecodingConfig(method="cad", form="li", contrast_prompt="")


def test_foreign_options_are_named():
    with pytest.raises(OptionError, match=r"^method='none' has no adapters_off; it decodes without contrast$"):
        DecodingConfig(method="none", adapters_off=True)
    with pytest.raises(OptionError, match=r"^method='none' has no contrast_prompt; it decodes without contrast$"):
        DecodingConfig(method="none", contrast_prompt="{prompt}")
    with pytest.raises(
        OptionError, match=r"^method='vcd' has no noise \(did you mean noise_step\?\); its own are alpha,"
    ):
        DecodingConfig(method="vcd", parameters={"noise": 1})
    with pytest.raises(
        OptionError, match=r"^method='cd' form='li' has no beta; its own are amateur, adapters_off, alpha"
    ):
        DecodingConfig(method="cd", form="li", models=AMATEUR, parameters={"beta": 1.0})


def test_the_last_model_may_be_another_one_without_adapters():
    assert DecodingConfig(method="proxy", models={"expert": "a"}, adapters_off=True).adapters_off is True
    with pytest.raises(OptionError, match=r"^set either antiexpert or adapters_off, not both$"):
        DecodingConfig(method="proxy", models={"expert": "a", "antiexpert": "b"}, adapters_off=True)
    with pytest.raises(OptionError, match=r"set amateur, or adapters_off for model without its adapters$"):
        DecodingConfig(method="cd")
    with pytest.raises(OptionError, match=r"set antiexpert, or adapters_off for expert without its adapters$"):
        DecodingConfig(method="proxy", models={"expert": "a"})
    with pytest.raises(OptionError, match=r"^method='proxy' needs other models: set expert$"):
        DecodingConfig(method="proxy", models={"antiexpert": "a"})
    with pytest.raises(OptionError, match=r"^method='proxy' needs other models: set expert$"):
        DecodingConfig(method="proxy", adapters_off=True)


def test_the_model_itself_as_amateur_is_checked():
    assert DecodingConfig(models={"amateur": "self:layers=8"}).models == {"amateur": "self:layers=8"}
    with pytest.raises(OptionError, match=r"^amateur: .*layer"):
        DecodingConfig(models={"amateur": "self:layerz=8"})
    with pytest.raises(OptionError, match=r"^amateur='self:layers=8' and adapters_off are both given"):
        DecodingConfig(models={"amateur": "self:layers=8"}, adapters_off=True)


def test_parameters_keep_their_types():
    typed = DecodingConfig(method="cd", models=AMATEUR, parameters={"beta": 1, "amateur_window": 3}).parameters
    assert (typed["beta"], type(typed["beta"]), typed["amateur_window"]) == (1.0, float, 3)
    for name, value, kind in [("beta", "1", "a number"), ("beta", True, "a number"), ("amateur_window", 1.5, "")]:
        with pytest.raises((TypeError, ValueError), match=rf"{name}.* must be {kind}"):
            DecodingConfig(method="cd", models=AMATEUR, parameters={name: value})
    assert DecodingConfig(method="ritual", parameters={"normalize": True}).parameters["normalize"] is True
    with pytest.raises(TypeError, match=r"^normalize must be true or false, not 1$"):
        DecodingConfig(method="ritual", parameters={"normalize": 1})


def test_ranges_are_checked_at_once():
    assert DecodingConfig(method="search", parameters={"k": 1}).parameters["k"] == 1
    for wrong in ({"k": 0}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must "):
            DecodingConfig(method="search", parameters=wrong)
    with pytest.raises(OptionError, match=r"^noise_step must lie in 0..999 .*, not -1$"):
        DecodingConfig(method="vcd", parameters={"noise_step": -1})
    with pytest.raises(OptionError, match=r"^amateur_window must be at least 1, not 0$"):
        DecodingConfig(models=AMATEUR, parameters={"amateur_window": 0})
    assert DecodingConfig(models=AMATEUR, parameters={"amateur_window": 1}).parameters["amateur_window"] == 1


# ------------------------------------------------------------------------------------------------------------ what follows


def test_a_method_without_contrast_has_no_formula():
    plain = DecodingConfig()
    assert (plain.rule_parameters, plain.mask, plain.weight, plain.contrasts) == ({}, None, 1.0, False)
    cd = DecodingConfig(models=AMATEUR, parameters={"beta": 0.5, "alpha": 0.2})
    assert (cd.mask, cd.contrasts) == (0.2, True)
    assert cd.rule_parameters.keys() == {"beta", "alpha"}
    li = DecodingConfig(models=AMATEUR, form="li", parameters={"alpha": 0.3})
    assert (li.mask, li.rule_parameters.keys()) == (0.3, {"alpha", "amateur_temperature"})
    cfg = DecodingConfig(method="cfg", parameters={"guidance_scale": 3.0})
    assert (cfg.mask, cfg.weight) == (None, 3.0)


def test_a_contrast_prompt_is_needed_where_it_is_read():
    DecodingConfig().check_contrast_prompt(always=True)
    DecodingConfig(method="cfg").check_contrast_prompt()
    DecodingConfig(method="cad", contrast_prompt="").check_contrast_prompt(always=True)
    for config, always in ((DecodingConfig(method="cfg"), True), (DecodingConfig(method="cad"), False)):
        with pytest.raises(OptionError, match=r"contrasts prompts: set contrast_prompt"):
            config.check_contrast_prompt(always=always)


def test_descriptions_have_what_determines_a_text():
    """A parameter that is new and left out does not change the key of answers that were kept before it existed."""
    cd = DecodingConfig(models=AMATEUR)
    described = cd.describe()
    new = {name for name, each in cd.declaration.parameters("obrien").items() if each.is_new}
    assert new
    assert described == {
        "method": "cd",
        "amateur": "testbed:amateur",
        "form": "obrien",
        **{name: value for name, value in cd.parameters.items() if name not in new},
    }
    assert {"amateur_window"} <= described.keys()
    assert described["amateur_window"] is None
    aligned = DecodingConfig(models=AMATEUR, parameters={"vocabulary": "aligned"}).describe()
    assert aligned["vocabulary"] == "aligned"
    assert DecodingConfig(adapters_off=True).describe()["adapters_off"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "^beams must be at least 1, not 0$"),
        ({"beams": 2, "method": "search"}, "^method='search' .*: leave beams out$"),
        ({"sampling": SamplingConfig(), "method": "search"}, "^method='search' .*: leave sampling out$"),
        ({"executor": "processor", "method": "scd", "models": AMATEUR}, "^method='scd' "),
        ({"executor": "loop", "beams": 2}, "^executor='loop' does not support beam search: use executor='processor'$"),
        ({"executor": "lop"}, "^executor must be loop or processor, not lop$"),
    ],
)
def test_executors_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        DecodingConfig(**options)


def test_the_executor_is_the_faster_one():
    found = [
        DecodingConfig(models=AMATEUR, beams=1),
        DecodingConfig(models=AMATEUR, beams=2),
        DecodingConfig(),
        DecodingConfig(models=AMATEUR, executor="processor"),
        DecodingConfig(executor="processor"),
        DecodingConfig(method="scd", models=AMATEUR),
    ]
    assert [each.executor for each in found] == ["loop", "processor", "processor", "processor", "processor", "loop"]


# -------------------------------------------------------------------------------------------------------- the declaration


def test_the_last_branch_of_a_stacked_form_is_several_distributions():
    def keep(main, layers, *, step=9, gain=1.0):
        return (tuple(main.shape), tuple(layers.shape), step, gain)

    parts = {"rule": keep, "internal": ("step",), "mask": None, "weight": lambda gain: gain, "off": None}
    logits = [torch.zeros(2, 3, 7), torch.ones(2, 3, 7)]
    assert Form(**parts, stacked=True).scores(logits, step=4, gain=2.0) == ((2, 3, 7), (2, 3, 1, 7), 4, 2.0)
    assert Form(**parts, stacked=False).scores(logits) == ((2, 3, 7), (2, 3, 7), 0, 1.0)
    assert Form(**{**parts, "internal": ()}, stacked=False).scores(logits, step=4)[2] == 9
    assert Form(**parts, stacked=True).scores([each[0] for each in logits])[:2] == ((3, 7), (3, 1, 7))


def test_only_the_last_of_three_branches_is_stacked():
    def keep(main, other, layers):
        return main.shape, other.shape, layers.shape

    form = Form(rule=keep, internal=(), stacked=True, mask=None, weight=lambda: 1.0, off=None)
    assert form.scores([torch.zeros(2, 7), torch.zeros(2, 7), torch.zeros(2, 7)]) == ((2, 7), (2, 7), (2, 1, 7))


class _Open:
    """A processor that takes parameters that it does not name."""

    def __init__(self, model, amateur, *, alpha=0.1, **others):
        pass


def test_a_processor_may_take_parameters_that_it_does_not_name():
    assert dataclasses.replace(METHODS["cd"], processor=_Open).processor is _Open


def test_branches_are_named_by_words():
    def two(main_model, other_model, *, beta: float = 1.0):
        return main_model - beta * other_model

    form = Form(rule=two, internal=(), stacked=False, mask=None, weight=lambda beta: 1 + beta, off=None)
    assert form.branch_names == ("main model", "other model")
    assert METHODS["ritual-vcd"].is_seeded
    assert METHODS["vcd"].is_seeded
    assert not METHODS["m3id"].is_seeded
    assert not METHODS["cd"].is_seeded


def test_reasons_are_false_and_parameters_plain_by_default():
    assert not Unsupported("has none")
    assert MethodParameter("k", 1, int, "a number") == ("k", 1, int, "a number", None, None, False)
    window = METHODS["cd"].parameters("obrien")["amateur_window"]
    assert (window.least, window.is_new) == (1, False)
    assert METHODS["cd"].parameters("obrien")["vocabulary"].is_new
    assert not METHODS["cd"].parameters("obrien")["beta"].is_new
    assert "_parameters" not in repr(METHODS["cd"])
