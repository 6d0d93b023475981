"""Requests in the form of the OpenAI protocol, and estimates of their size."""

import base64
import io
import math
from os import PathLike
from pathlib import Path
from typing import Any

from contralto.common.messages import with_images
from contralto.data_gen.image_files import check_image
from contralto.data_gen.types import Request

__all__ = ["CHARACTERS_PER_TOKEN", "chat_messages", "most_bytes", "prompt_token_guess", "raw_prompt", "token_guess"]

CHARACTERS_PER_TOKEN = 3.5
"""Of English text. Only the limiter and estimates of costs use it."""


def most_bytes(request: Request) -> int:
    """Return the largest size of a reply in bytes: 1 MiB, and 1 KiB for each new token, with its log-probability.

    Args:
        request: the request.
    """
    return 2**20 + 2**10 * request.sampling.max_new_tokens


def chat_messages(request: Request) -> list[dict[str, Any]]:
    """Return the messages of a request in the form of the OpenAI protocol, each image in its place as a `data:` address.

    Args:
        request: a conversation.

    Raises:
        ValueError: the messages have places for images, but not as many as the request has images.
    """
    shown = iter(request.images)
    messages = with_images(request.messages or (), len(request.images), own=True)
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [
                _image_part(next(shown)) if part.get("type") == "image" else part for part in message["content"]
            ]
    return messages


def raw_prompt(request: Request) -> str:
    """Return the text that a request continues without a chat template.

    Args:
        request: a raw prompt.

    Raises:
        ValueError: it comes with images, for which a text has no place.
    """
    if request.images:
        raise ValueError("a prompt without chat template cannot be sent with images: use messages")
    return request.prompt or ""


def _image_part(image: Any) -> dict[str, Any]:
    """Return a part with an image: a file as it is, a Pillow image in RGB as local models read it."""
    if isinstance(image, str | PathLike):
        kind, data = check_image(Path(image)), Path(image).read_bytes()
    else:
        from contralto.decoding.pictures import open_image  # which loads torch

        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def token_guess(request: Request) -> int:
    """Estimate the tokens of a request and its answer: characters by 3.5, and the largest number of new tokens.

    Args:
        request: the request.
    """
    return prompt_token_guess(request) + request.sampling.max_new_tokens


def prompt_token_guess(request: Request) -> int:
    """Estimate the tokens of a prompt: characters by 3.5.

    Args:
        request: the request.
    """
    texts = [request.prompt or "", *(str(message["content"]) for message in request.messages or ())]
    return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)
