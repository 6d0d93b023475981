"""`contralto-vlm`, a model of lm-eval that answers questions about images by contrast. See `contralto.eval.models.lm`.

Read from lm_eval 0.4.13: `HFMultimodalLM.tok_batch_multimodal_encode`, its image options, its placeholder `<image>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM
from lm_eval.models.utils import resize_image

from contralto.common.hashing import pixels_digest
from contralto.common.texts import without_bos
from contralto.decoding.images import noised, ritual_transform
from contralto.decoding.pictures import open_image
from contralto.eval.models.decoder import seed_of
from contralto.eval.models.lm import ContraltoLM, Job

__all__ = ["ContraltoVLM"]

WRAPPERS = ("vision_start_token", "vision_end_token", "boi_token", "eoi_token", "start_image_token", "end_image_token")
"""What processors call the tokens that stand around an image."""


@register_model("contralto-vlm")
class ContraltoVLM(ContraltoLM, HFMultimodalLM):  # type: ignore[misc]
    """Image-text models in lm-eval, decoding and scoring by a contrastive method.

    All of `ContraltoLM`, and images: VCD's noise comes after the processor, RITUAL's transformation before it, M3ID reads
    the prompt without its image. Likelihoods of answers to images work too, which lm-eval's own model has not. Requests
    without images are answered as by `contralto`.

    Args:
        pretrained, kwargs: as of `ContraltoLM`, and what lm-eval's `hf-multimodal` takes: `max_images`, `image_max_side`, ...

    Raises:
        ValueError: as of `ContraltoLM`; a task whose prompts have other numbers of images than placeholders.
    """

    ignored: Mapping[str, str] = {
        name: "lm-eval's image-text models leave this to the processor of the model"
        for name in ("add_bos_token", "chat_template_args", "enable_thinking", "tokenizer", "use_fast_tokenizer")
    }
    mark = DEFAULT_IMAGE_PLACEHOLDER

    def _encode(self, jobs: Sequence[Job], room: int) -> Mapping[str, Any]:
        """What a model reads of a batch, its images among it."""
        if not any(job.images for job in jobs):
            return super()._encode(jobs, room)
        images = [[self._sized(image) for image in job.images] for job in jobs]
        read = self.tok_batch_multimodal_encode(
            [job.context for job in jobs], images, left_truncate_len=None, truncation=self.truncation
        )
        if read["input_ids"].shape[1] > room:
            raise ValueError(
                f"a prompt with its images has {read['input_ids'].shape[1]} tokens, and {room} fit: fewer examples, smaller "
                "images (image_max_side), or a larger max_length"
            )
        return dict(read)

    def tok_batch_multimodal_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """lm-eval's, of prompts that begin once: its processor adds BOS to templates that hold one, too."""
        return super().tok_batch_multimodal_encode(
            [without_bos(text, self.tokenizer) for text in strings], *args, **kwargs
        )

    def _sized(self, image: Any) -> Any:
        return resize_image(open_image(image), self.image_width, self.image_height, self.image_max_side)

    def _see(self, view: str, jobs: Sequence[Job], room: int) -> Mapping[str, Any]:
        """The same batch as another branch sees it."""
        if view == "prompt":
            return super()._see(view, jobs, room)
        if missing := next((job for job in jobs if not job.images), None):
            raise ValueError(
                f"method={self._method!r} contrasts images, and a prompt has none: {missing.context[:60]!r}"
            )
        if view == "noised":
            step = self._decoder.method.parameters["noise_step"]
            inputs = dict(self._encode(jobs, room))
            return noised(inputs, step=step, seed=self._noise_seeds(jobs, inputs))
        if view == "transformed":
            others = [
                replace(job, images=tuple(ritual_transform(i, seed=job.seed).image for i in job.images)) for job in jobs
            ]
        else:
            others = [replace(job, context=self._without_image(job.context), images=(), tokens=None) for job in jobs]
        return self._encode(others, room)

    def _without_image(self, context: str) -> str:
        """A prompt with neither placeholders nor what stands around them."""
        around = [getattr(self.processor, name, None) or getattr(self.tokenizer, name, None) for name in WRAPPERS]
        for mark in (DEFAULT_IMAGE_PLACEHOLDER, self.image_token, *around):
            context = context.replace(mark, "") if isinstance(mark, str) else context
        return context

    def _noise_seeds(self, jobs: Sequence[Job], inputs: Mapping[str, Any]) -> list[int]:
        """A seed for every image or tile, of its request."""
        name = "image_grid_thw" if "image_grid_thw" in inputs else "pixel_values"
        counts = [len(job.images) for job in jobs]
        if len(inputs[name]) == len(jobs):  # a row of images per prompt
            counts = [1] * len(jobs)
        elif len(inputs[name]) != sum(counts):  # images cut into tiles, some into more than others
            counts = [len(self._encode([job], self.max_length)[name]) for job in jobs]
        return [seed_of(job.seed, i) % 2**31 for job, count in zip(jobs, counts, strict=True) for i in range(count)]

    def _seed(self, context: Any, images: Any, repeat: Any) -> int:
        return seed_of(self._decoder.seed, context, [pixels_digest(image) for image in images], repeat)

    def _pair(self, context: str, continuation: str, images: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        if not images:
            return super()._pair(context, continuation, images)
        said = self.tokenizer.encode(continuation, add_special_tokens=False)
        return self.tokenizer.encode(context, add_special_tokens=False), said  # the first for its length alone
