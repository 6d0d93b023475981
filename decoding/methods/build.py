"""Make the logits processor or the loop of a method for a batch, and the arguments of `generate()`."""

from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from contralto.decoding.methods.base import GATE, Unsupported
from contralto.decoding.methods.config import DecodingConfig
from contralto.decoding.methods.reference import Reference, load, signature_of

if TYPE_CHECKING:
    from contralto.decoding.inputs import DecodingBatch

__all__ = ["cost", "generate_kwargs", "likelihood_processor", "logits_processor", "plain_scores"]


def plain_scores(model: Any) -> Any:
    """Return a processor without branches, whose scores are those of the model.

    Args:
        model: the model that generates.
    """
    from contralto.decoding.processors import ContrastiveLogitsProcessor

    return ContrastiveLogitsProcessor(lambda main: main, [])


def logits_processor(config: DecodingConfig, batch: "DecodingBatch", **kwargs: Any) -> Any:
    """Return the logits processor of a method, for one batch.

    Args:
        config: the method with its parameters.
        batch: what its branches read.
        kwargs: further keyword arguments of the processor.

    Raises:
        ValueError: the method has no processor, or does not support the model.
    """
    return _construct(config.declaration.processor, config, batch, **kwargs)


def likelihood_processor(config: DecodingConfig, batch: "DecodingBatch") -> Any:
    """Return the logits processor whose scores are the log-probabilities of a method, for one batch.

    Args:
        config: the method with its parameters.
        batch: what its branches read.

    Raises:
        ValueError: the method has no likelihoods, or does not support the model.
    """
    return _construct(config.declaration.likelihoods, config, batch)


def generate_kwargs(config: DecodingConfig, batch: "DecodingBatch", *, streamer: Any = None) -> dict[str, Any]:
    """Return the keyword arguments with which `generate()` decodes by a method.

    Args:
        config: the method with its parameters, its executor and the number of beams.
        batch: what its branches read.
        streamer: receives the tokens as they are chosen.

    Raises:
        ValueError: the method does not support the model.
    """
    method = config.declaration
    if not method.contrasts:
        return {"streamer": streamer}
    if config.executor == "loop" and method.loop is not None:
        return {"custom_generate": _construct(method.loop, config, batch, streamer=streamer)}
    keep = {}
    if config.beams > 1 and "min_tokens_to_keep" in _accepted(method.processor):
        keep["min_tokens_to_keep"] = (
            2  # with one plausible token, beams that are sure of it have nothing to branch into
        )
    if "beams" in _accepted(method.processor):
        keep["beams"] = config.beams
    processor = _construct(method.processor, config, batch, **keep)
    if config.executor == "loop":
        return {"custom_generate": processor.loop(streamer=streamer)}
    return {"logits_processor": [processor], "streamer": streamer}


def _construct(target: Reference | Unsupported, config: DecodingConfig, batch: "DecodingBatch", **kwargs: Any) -> Any:
    method = config.declaration
    if isinstance(target, Unsupported):
        raise ValueError(f"method={config.method!r} {target.reason}")  # noqa: TRY004 (the method, not a type)
    if batch.model.config.is_encoder_decoder and not method.encoder_decoder:
        raise ValueError(f"method={config.method!r} {method.encoder_decoder.reason}")
    accepted = _accepted(target)
    own = {"form": config.form, **config.parameters} if config.form else dict(config.parameters)
    if not batch.views:  # else they hold masks of their own
        own |= _shared_inputs(batch) | dict(batch.aligned)
    own = {name: value for name, value in own.items() if name in accepted}
    models = batch.branch_models if method.models else (batch.model, *batch.views)
    positional = [p for p in accepted.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    made = load(target)(*models[: len(positional)], **own, **kwargs)
    if (gate := config.parameters.get(GATE)) is not None and GATE not in accepted:
        from contralto.decoding.processors import GatedLogitsProcessor

        made = GatedLogitsProcessor(made, gate=gate)
    if hasattr(made, "check_model"):
        made.check_model(batch.model)
    return made


def _accepted(target: Reference | Unsupported) -> Mapping[str, Parameter]:
    return {} if isinstance(target, Unsupported) else signature_of(target).parameters


def _shared_inputs(batch: "DecodingBatch") -> dict[str, Any]:
    """Return the inputs of other models besides the tokens."""
    if batch.model.config.is_encoder_decoder:
        return {"encoder_inputs": batch.inputs}
    vision = {name: value for name, value in batch.inputs.items() if name not in ("input_ids", "attention_mask")}
    return {"attention_mask": batch.inputs["attention_mask"], "vision_inputs": vision or None}


def cost(config: DecodingConfig, model: Any, branch_models: Sequence[Any]) -> str:
    """Return one line about the forward passes of a method.

    Args:
        config: the method with its executor.
        model: the model that generates.
        branch_models: the models of the other branches.
    """
    method, gate = config.declaration, config.parameters.get(GATE)
    line = method.cost[str(config.executor)] if method.contrasts else "1 forward pass per token"
    names = ", ".join(method.branches)
    line = line.format(
        branches=names, rows=len(method.branches), models=_models(config, branch_models), **config.parameters
    )
    sizes = []
    if method.models:
        named = zip(method.other_names, branch_models, strict=True)
        main_name = method.branches[0] if method.branches else "model"
        sizes = [_size(name, other, main_name, model) for name, other in named]
    gated = [] if gate is None else [f"no contrast where the largest probability is at least {gate:g}"]
    return f"{config.method}: {'; '.join([line, *gated, *sizes])}"


def _models(config: DecodingConfig, branch_models: Sequence[Any]) -> str:
    """Return how many models run for a token, where the first layers of a model count as a part of one."""
    from contralto.decoding.branches import ModelVariant

    count = 1.0  # the main model
    for other in branch_models:
        variant = other if isinstance(other, ModelVariant) else None
        joint = variant is not None and variant.joint and config.executor == "loop"
        if not joint or config.parameters.get("amateur_window"):
            count += variant.share if variant else 1
    return f"{count:.3g} model{'' if count == 1 else 's'}"


def _size(name: str, model: Any, main_name: str, main: Any) -> str:
    """Describe the size of another model relative to the main model."""
    from contralto.decoding.branches import ModelVariant

    if isinstance(model, ModelVariant):
        return f"{name} is {model.description}"
    count = model.num_parameters()
    return f"{name} {count / 1e6:,.2f}M parameters, {count / main.num_parameters():.0%} of the {main_name}'s"
