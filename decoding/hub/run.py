"""Run the method of a repository for `custom_generate` with the arguments that `generate()` hands to it."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from contralto.decoding.hub.repositories import HubRepository, check_name
from contralto.decoding.images import noised
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import DecodingConfig
from contralto.decoding.methods.build import generate_kwargs
from contralto.decoding.methods.variants import is_variant, make_variant

__all__ = ["decode"]

LOADING = ("revision", "token", "cache_dir", "force_download", "proxies", "local_files_only", "repo_type")
"""Arguments of `generate()` with which transformers loads a repository, and which it hands on to the function in it."""
UNUSED = ("assistant_model", "synced_gpus")
"""Arguments of `generate()` that transformers does not hand on to a decoding loop, so that they would be ignored."""
REPLACED = {"guidance_scale": (None, 1)}
"""Options of a generation configuration that a method of the same argument replaces, with their values for none."""


def decode(name: str, model: Any, options: Mapping[str, Any], **own: Any) -> Any:
    """Generate with the method of a repository.

    The method runs as a decoding loop, in which branches of the same model share one forward pass per token, and in beam search as a
    logits processor.

    Args:
        name: a name in `REPOSITORIES`.
        model: the model whose `generate()` was called.
        options: the other arguments of `generate()`: inputs, generation configuration, processors, streamer, ...
        own: the arguments of the repository, by name; None is their default.

    Returns:
        What `generate()` returns.

    Raises:
        ValueError: an unknown repository, an argument of the method that is missing or outside its range, and what the method does not
            support.
        TypeError: an argument of another type.
    """
    repository, options = check_name(name), {key: value for key, value in options.items() if key not in LOADING}
    _check(repository, model, options, own)
    streamer = options.pop("streamer", None)
    _add_stop_strings(options)
    inputs = _model_inputs(options)
    others = tuple(_other_model(key, own[key], model) for key in repository.declaration.models)
    config = DecodingConfig(
        method=repository.method,
        form=own.get("form"),
        parameters={a.parameter: own.get(a.name) for a in repository.arguments if a.parameter not in (None, "form")},
        models=dict(zip(repository.declaration.models, others, strict=True)),
        beams=_option("num_beams", model, options) or 1,
    )
    views = tuple(_view(view, inputs, own, config) for view in repository.declaration.views)
    batch = DecodingBatch(model, others, inputs, tuple(view for view in views if view is not None))
    return _generate(model, options, generate_kwargs(config, batch, streamer=streamer))


def _generate(model: Any, options: Mapping[str, Any], chosen: Mapping[str, Any]) -> Any:
    """Call the model's own `generate()`, not an attribute that transformers put in its place for a repository of the model."""
    if "logits_processor" in chosen:
        given = options.get("logits_processor") or []
        chosen = {**chosen, "logits_processor": LogitsProcessorList([*given, *chosen["logits_processor"]])}
    return type(model).generate(model, **{**options, **chosen})


def _check(repository: HubRepository, model: Any, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that are missing, or that nothing would read."""
    for argument in repository.inputs:
        if own.get(argument.name) is None and argument.description.endswith("Required."):
            raise ValueError(f"{repository.name} needs {argument.name}: pass {argument.description.split('.')[0]}")
    for name in UNUSED:
        if options.get(name):
            raise ValueError(f"{repository.name} does not use {name}: leave it out")
    for name, without in REPLACED.items():
        if any(a.name == name for a in repository.arguments) and _option(name, model, options) not in without:
            raise ValueError(
                f"{repository.name} reads {name} as an argument of generate(): remove it from the generation configuration"
            )


def _add_stop_strings(options: dict[str, Any]) -> None:
    """Replace `stop_strings` by a stopping criterion: transformers does not find the tokenizer if it is given a decoding loop."""
    if options.get("stop_strings") is not None and options.get("tokenizer") is not None:
        criterion = StopStringCriteria(options.pop("tokenizer"), options.pop("stop_strings"))
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), criterion])


def _option(name: str, model: Any, options: Mapping[str, Any]) -> Any:
    """Return an option of generation, as `generate()` finds it: an argument, of the given configuration, or of the model's."""
    given = options.get("generation_config")
    values = (options.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in values if value is not None), None)


def _model_inputs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of the model among the arguments of `generate()`."""
    others = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())}  # type: ignore[no-untyped-call]
    tensors = {key: value for key, value in options.items() if isinstance(value, Tensor) and key not in others}
    given = {} if options.get("inputs") is None else {"input_ids": options["inputs"]}
    inputs = {**given, **{key: value for key, value in tensors.items() if not key.startswith("decoder_")}}
    return {"attention_mask": None, **inputs}


def _other_model(name: str, other: Any, model: Any) -> Any:
    if is_variant(other):
        return make_variant(other, model)
    if isinstance(other, str):
        raise TypeError(f"{name} must be a model, not its name {other!r}: load it with from_pretrained")
    return other


def _view(view: str, inputs: Mapping[str, Any], own: Mapping[str, Any], config: DecodingConfig) -> Any:
    """Return the inputs of another branch of the model; None if they are optional and not given."""
    if view == "noised":
        given = {key: value for key, value in inputs.items() if value is not None}
        return noised(given, step=config.parameters["noise_step"], seed=own.get("seed"))
    if "contrast_inputs" in own:
        return own["contrast_inputs"]
    named = {"input_ids": own.get("negative_prompt_ids"), "attention_mask": own.get("negative_prompt_attention_mask")}
    return None if named["input_ids"] is None else {key: value for key, value in named.items() if value is not None}
