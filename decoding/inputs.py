"""Prompts, and the inputs of each branch of a method, shared by all commands and engines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from contralto.common.errors import during, require
from contralto.common.messages import Content, begins_answer, contrasted, fill, flattened, text_of, with_images
from contralto.common.options import Option, OptionError
from contralto.common.texts import without_bos
from contralto.decoding.methods import DecodingConfig

__all__ = [
    "DecodingBatch",
    "Prompt",
    "batch_of",
    "check_lengths",
    "check_prompts",
    "check_rendered",
    "encode",
    "open_images",
    "prompt_length",
    "render",
]


class Prompt(NamedTuple):
    """A prompt with the inputs of all branches."""

    content: Content
    images: tuple[Any, ...] = ()
    """Paths, bytes of image files, or Pillow images."""
    contrast: str | None = None
    """The contrast prompt; `{prompt}` in it is the text of the prompt."""
    fields: Mapping[str, Any] | None = None
    """Values of other names in braces of the contrast prompt; None: they are plain text."""
    template: Mapping[str, Any] = {}
    """Further arguments of the chat template."""
    row: Mapping[str, Any] = {}
    """Columns that the output repeats."""


class DecodingBatch(NamedTuple):
    """A batch of prompts with the inputs of all branches of a method."""

    model: Any
    """The model that generates."""
    branch_models: tuple[Any, ...]
    """The models of the other branches: models, or variants of the main model."""
    inputs: Mapping[str, Any]
    """Keyword arguments of `generate()`."""
    views: tuple[Mapping[str, Any], ...]
    """The inputs of the other branches of the same model."""
    aligned: Mapping[str, Any] = {}
    """Keyword arguments of the processor for an amateur whose vocabulary is mapped: tokenizers, and prompts of its own."""


def check_prompts(prompts: Sequence[Prompt], config: DecodingConfig) -> None:
    """Raise an error for prompts that lack inputs of the method, before anything is loaded.

    Args:
        prompts: of one run.
        config: the method.

    Raises:
        ValueError: an image or a contrast prompt is missing, or only some prompts have one.
        ModuleNotFoundError: there are images, and Pillow is not installed.
    """
    if prompts[0].images:
        require("PIL")
    for i, prompt in enumerate(prompts):
        _check_prompt(i, prompt, config)
        if bool(prompt.images) != bool(prompts[0].images):
            raise ValueError(
                f"prompt {(0 if prompt.images else i)} has no image and others have: decode them separately"
            )
        if (prompt.contrast is None) != (prompts[0].contrast is None):
            raise ValueError("some prompts have a contrast_prompt and others have none: decode them separately")


def _check_prompt(index: int, prompt: Prompt, config: DecodingConfig) -> None:
    from pathlib import Path

    method, named = config.declaration, Option("method", config.method)
    if method.reads_images and not prompt.images:
        raise OptionError(
            "{method} contrasts images, and prompt {index} has none: set {image} to a path, or add a column "
            "image to its row",
            method=named,
            index=index,
            image=Option("image"),
        )
    if "prompt" in method.views and not method.contrast_prompt_optional and prompt.contrast is None:
        raise OptionError(
            "{method} contrasts prompts, and prompt {index} has no contrast prompt: set {option}, or add a "
            "column contrast_prompt to its row",
            method=named,
            index=index,
            option=Option("contrast_prompt"),
        )
    if missing := [path for path in prompt.images if isinstance(path, str) and not Path(path).is_file()]:
        raise ValueError(f"prompt {index}: there is no image {missing[0]}")
    if prompt.contrast is not None:
        fill(prompt.contrast, "", prompt.fields)


# ------------------------------------------------------------------------------------------------------------ rendering


def render(prompt: Prompt, models: Any, *, raw: bool) -> str:
    """Return the text that the model reads: the conversation in the chat template, if there is one.

    Args:
        prompt: the prompt.
        models: a `loading.Models`; its tokenizer or processor has the template.
        raw: feed the prompt as it is, even if there is a chat template.

    Raises:
        ValueError: messages without a chat template.
    """
    reader, content = models.processor or models.tokenizer, prompt.content
    if raw or reader.chat_template is None:
        if not isinstance(content, str) or prompt.template:
            raise OptionError(
                "messages need a chat template, but this tokenizer has none, or {raw} disables it", raw=Option("raw")
            )
        marked = not prompt.images or reader.image_token in content
        return content if marked else reader.image_token * len(prompt.images) + content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    messages = with_images(messages, len(prompt.images))
    messages = flattened(messages) if models.processor is None else _in_parts(messages)
    goes_on = begins_answer(messages)
    options = {"tokenize": False, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    text: str = reader.apply_chat_template(messages, **prompt.template, **options)
    return text


def check_rendered(index: int, prompt: Prompt, models: Any, *, raw: bool) -> None:
    """Raise an error for a prompt that the chat template does not take, before any prompt is decoded.

    Args:
        index: the number of the prompt, for messages.
        prompt: the prompt.
        models: a `loading.Models`.
        raw: see `render`.

    Raises:
        ValueError: the template rejects the prompt, ignores its tools or documents, or the prompt has no tokens.
    """
    with during(f"prompt {index}, {text_of(prompt.content)[:60]!r}, does not fit the chat template"):
        text = render(prompt, models, raw=raw)
    for name in {"tools", "documents"} & set(prompt.template):
        if not _shows(name, prompt, text, models):
            raise ValueError(
                f"prompt {index}: the chat template of the model ignores the column {name}: drop the column"
            )
    if not prompt.images and not models.tokenizer(text)["input_ids"]:
        raise ValueError(f"prompt {index} is empty, and the tokenizer of the model adds no BOS token: pass a prompt")


def _shows(name: str, prompt: Prompt, text: str, models: Any) -> bool:
    """Return True if the rendered prompt differs from the one without an argument of the chat template."""
    rest = {key: value for key, value in prompt.template.items() if key != name}
    try:
        return render(prompt._replace(template=rest), models, raw=False) != text
    except jinja2.TemplateError:  # the template needs it
        return True


def _in_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose contents are lists of parts, as processors require."""
    contents = [
        m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"] or ""}]
        for m in messages
    ]
    return [{**message, "content": parts} for message, parts in zip(messages, contents, strict=True)]


def encode(prompts: Sequence[Prompt], models: Any, *, raw: bool) -> Any:
    """Return the inputs of the main model for a batch of prompts.

    Args:
        prompts: all with images, or all without.
        models: a `loading.Models`.
        raw: see `render`.

    Returns:
        Keyword arguments of `generate()`, padded, on the device of the model.
    """
    from contralto.common.placement import input_device

    texts = [render(prompt, models, raw=raw) for prompt in prompts]
    reader = models.processor or models.tokenizer
    is_bare = raw or reader.chat_template is None
    if is_bare:
        texts = [without_bos(text, models.tokenizer) for text in texts]
    options = {"return_tensors": "pt", "padding": True}
    if models.processor is None:
        options |= {"add_special_tokens": is_bare, "return_token_type_ids": False}
        return reader(texts, **options).to(input_device(models.main))
    # as in a processor's own apply_chat_template: not every template begins as a text should
    options["add_special_tokens"] = is_bare or not texts[0].startswith(models.tokenizer.bos_token or texts[0])
    images = [list(prompt.images) for prompt in prompts] if prompts[0].images else None
    return reader(text=texts, images=images, **options).to(input_device(models.main), dtype=models.main.dtype)


def open_images(prompt: Prompt) -> Prompt:
    """Return the prompt with opened RGB images in place of their paths.

    Args:
        prompt: the prompt.
    """
    from contralto.decoding.pictures import open_image

    return prompt._replace(images=tuple(map(open_image, prompt.images)))


# ------------------------------------------------------------------------------------------------------------- branches


def batch_of(
    prompts: Sequence[Prompt], models: Any, config: DecodingConfig, *, seeds: Sequence[int], raw: bool
) -> DecodingBatch:
    """Return a batch with the inputs of the method's branches.

    Args:
        prompts: all with images, or all without.
        models: a `loading.Models`.
        config: the method with its parameters.
        seeds: one per prompt, for noise and transformations.
        raw: see `render`.
    """
    prompts = [open_images(prompt) for prompt in prompts] if prompts[0].images else prompts
    inputs = encode(prompts, models, raw=raw)
    names = config.declaration.views
    if "prompt" in names and prompts[0].contrast is None:  # it is optional
        names = ()

    def view(name: str) -> Any:
        if name == "shown":
            return inputs
        if name == "noised":
            from contralto.decoding.images import noised

            return noised(inputs, step=config.parameters["noise_step"], seed=_noise_seeds(inputs, seeds))
        return encode(_VIEWED[name](prompts, seeds), models, raw=raw)

    aligned = {} if models.amateur_tokenizer is None else _aligned(prompts, models, raw=raw)
    return DecodingBatch(models.main, models.branch_models, inputs, tuple(map(view, names)), aligned)


def _aligned(prompts: Sequence[Prompt], models: Any, *, raw: bool) -> dict[str, Any]:
    """Return the tokenizers of a mapped amateur, and prompts in its own chat template if both models have one."""
    from contralto.decoding.vocabulary import differing_tokens

    own, other = models.tokenizer, models.amateur_tokenizer
    named = {"tokenizer": own, "amateur_tokenizer": other}
    is_bare = raw or own.chat_template is None or other.chat_template is None
    if is_bare or models.processor is not None or not (differing_tokens(own, other) or differing_tokens(other, own)):
        return named
    with during("the chat template of the amateur does not take a prompt"):
        reading = models._replace(main=models.branch_models[0], tokenizer=other)
        return named | {"amateur_inputs": dict(encode(prompts, reading, raw=False))}


def _transformed(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Prompt]:
    from contralto.decoding.images import ritual_transform

    pairs = zip(prompts, seeds, strict=True)
    return [p._replace(images=tuple(ritual_transform(i, seed=s).image for i in p.images)) for p, s in pairs]


def _blind(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Prompt]:
    return [prompt._replace(images=()) for prompt in prompts]


def _contrasted(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Prompt]:
    return [p._replace(content=contrasted(p.content, p.contrast, p.fields)) for p in prompts if p.contrast is not None]


_VIEWED: Mapping[str, Callable[[Sequence[Prompt], Sequence[int]], list[Prompt]]] = {
    "transformed": _transformed,
    "blind": _blind,
    "prompt": _contrasted,
}
"""The prompts of each view; the views `shown` and `noised` are made of the inputs, since the noise comes after the image processor."""


def _noise_seeds(inputs: Mapping[str, Any], seeds: Sequence[int]) -> list[int] | int:
    """Return a seed for every image or tile; the first prompt's alone if numbers of images differ."""
    count = len(inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["pixel_values"])
    per_prompt, rest = divmod(count, len(seeds))
    return seeds[0] if rest else [1000 * seed + i for seed in seeds for i in range(per_prompt)]


def prompt_length(batch: DecodingBatch) -> int:
    """Return the number of prompt tokens in the output of `generate()`.

    Args:
        batch: the batch that was decoded.
    """
    return 0 if batch.model.config.is_encoder_decoder else int(batch.inputs["input_ids"].shape[1])


def check_lengths(batch: DecodingBatch, config: DecodingConfig, max_new_tokens: int, *, first: int = 0) -> None:
    """Raise an error for prompts that leave too little context for the new tokens.

    Args:
        batch: the prompts.
        config: the method; its parameter `amateur_window` limits what the other models see.
        max_new_tokens: number of new tokens.
        first: the number of the first prompt, for messages.

    Raises:
        OptionError: a prompt is too long.
    """
    from contralto.decoding.branches.context import rooms

    for i, branches in enumerate(rooms(batch, window=config.parameters.get("amateur_window")), first):
        for room in branches:
            with during(f"prompt {i}"):
                room.check(max_new_tokens)
