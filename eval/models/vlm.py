"""`contralto-vlm`, a model of lm-eval that answers questions about images by contrast. See `contralto.eval.models.lm`.

Read from lm_eval 0.4.13: `HFMultimodalLM.tok_batch_multimodal_encode`, its image options, its placeholder `<image>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM
from lm_eval.models.utils import resize_image
from transformers import AutoProcessor

from contralto.common.hashing import pixels_digest
from contralto.common.texts import without_bos
from contralto.decoding.images import noised, ritual_transform
from contralto.decoding.pictures import open_image
from contralto.eval.models.decoder import seed_of
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.requests import EvalRequest

__all__ = ["ContraltoVLM"]

WRAPPERS = ("vision_start_token", "vision_end_token", "boi_token", "eoi_token", "start_image_token", "end_image_token")
"""Attributes of processors and tokenizers that name the tokens around an image."""


@register_model("contralto-vlm")
class ContraltoVLM(ContraltoLM, HFMultimodalLM):  # type: ignore[misc]
    """Image-text models in lm-eval, decoding and scoring by a contrastive method.

    It has all of `ContraltoLM`, and images: VCD's noise is added after the processor, RITUAL's transformation before it, M3ID
    reads the prompt without its image. Likelihoods of answers to images work too, which lm-eval's own model does not have.
    Requests without images are answered as by `contralto`. The arguments are those of `ContraltoLM`, and those of lm-eval's
    `hf-multimodal`: `max_images`, `image_max_side`, ...

    Raises:
        ValueError: See `ContraltoLM`; or the prompts of a task have other numbers of images than placeholders.
    """

    ignored: Mapping[str, str] = {
        name: "lm-eval's image-text models leave this to the processor of the model"
        for name in ("add_bos_token", "chat_template_args", "enable_thinking", "tokenizer", "use_fast_tokenizer")
    }
    mark = DEFAULT_IMAGE_PLACEHOLDER
    tokenizer_class = AutoProcessor

    def _encode(self, requests: Sequence[EvalRequest], room: int) -> Mapping[str, Any]:
        """Return the inputs of the model for a batch, its images included."""
        if not any(request.images for request in requests):
            return super()._encode(requests, room)
        images = [[self._resized(image) for image in request.images] for request in requests]
        inputs = self.tok_batch_multimodal_encode(
            [request.context for request in requests], images, left_truncate_len=None, truncation=self.truncation
        )
        length = inputs["input_ids"].shape[1]
        if length > room:
            raise ValueError(
                f"a prompt with its images has {length} tokens, and {room} fit: fewer examples, smaller "
                "images (image_max_side), or a larger max_length"
            )
        return dict(inputs)

    def tok_batch_multimodal_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Encode a batch as lm-eval does, without the second BOS that its processor adds to templates with one.

        Args:
            strings: The prompts.
            args: Passed on.
            kwargs: Passed on.
        """
        return super().tok_batch_multimodal_encode(
            [without_bos(text, self.tokenizer) for text in strings], *args, **kwargs
        )

    def _resized(self, image: Any) -> Any:
        return resize_image(open_image(image), self.image_width, self.image_height, self.image_max_side)

    def _view(self, view: str, requests: Sequence[EvalRequest], room: int) -> Mapping[str, Any]:
        """Return the inputs of another branch."""
        if view == "prompt":
            return super()._view(view, requests, room)
        if missing := next((request for request in requests if not request.images), None):
            raise ValueError(
                f"method={self.decoder.config.method!r} contrasts images, and a prompt has none: {missing.context[:60]!r}"
            )
        if view == "shown":
            return self._encode(requests, room)
        if view == "noised":
            step = self.decoder.config.parameters["noise_step"]
            inputs = dict(self._encode(requests, room))
            return noised(inputs, step=step, seed=self._noise_seeds(requests, inputs))
        change = self._transformed if view == "transformed" else self._without_images
        return self._encode([change(request) for request in requests], room)

    def _transformed(self, request: EvalRequest) -> EvalRequest:
        """Return a request with its images transformed as by RITUAL."""
        images = tuple(ritual_transform(image, seed=request.seed).image for image in request.images)
        return replace(request, images=images)

    def _without_images(self, request: EvalRequest) -> EvalRequest:
        """Return a request without images, placeholders, and the tokens around them."""
        context = request.context
        wrappers = [getattr(self.processor, name, None) or getattr(self.tokenizer, name, None) for name in WRAPPERS]
        for mark in (DEFAULT_IMAGE_PLACEHOLDER, self.image_token, *wrappers):
            context = context.replace(mark, "") if isinstance(mark, str) else context
        return replace(request, context=context, images=(), tokens=None)

    def _noise_seeds(self, requests: Sequence[EvalRequest], inputs: Mapping[str, Any]) -> list[int]:
        """Return a seed for every row of image features: per prompt, per image, or per tile, made of the request's seed."""
        name = "image_grid_thw" if "image_grid_thw" in inputs else "pixel_values"
        counts = [len(request.images) for request in requests]
        if len(inputs[name]) == len(requests):  # a row of images per prompt
            counts = [1] * len(requests)
        elif len(inputs[name]) != sum(counts):  # images cut into tiles, some into more than others
            counts = [len(self._encode([request], self.max_length)[name]) for request in requests]
        return [
            seed_of(request.seed, i) % 2**31
            for request, count in zip(requests, counts, strict=True)
            for i in range(count)
        ]

    def seed_of(self, context: Any, images: Sequence[Any], repeat: int) -> int:
        """Return the seed of a request, images by their pixels.

        Args:
            context: The prompt.
            images: Its images.
            repeat: The number of the repetition.
        """
        return super().seed_of(context, [pixels_digest(image) for image in images], repeat)

    def _pair(self, context: str, continuation: str, images: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        if not images:
            return super()._pair(context, continuation, images)
        second = self.tokenizer.encode(continuation, add_special_tokens=False)
        return self.tokenizer.encode(context, add_special_tokens=False), second  # of the first only the length counts
