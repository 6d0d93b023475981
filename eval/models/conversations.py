"""Contrast prompts of lm-eval's requests inside the chat template.

lm-eval renders a conversation, with system message, examples and the beginning of an answer, to one string before it makes requests.
The conversations are remembered here, and a contrast prompt is rendered from the same conversation with another text in its last
turn.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from contralto.common.messages import begins_answer, contrasted, fill
from contralto.eval.models.requests import EvalRequest

__all__ = ["Conversations"]


class Conversations:
    """A mixin that remembers rendered conversations; models call `remember` in `apply_chat_template`."""

    chat_applied = False
    """True if the task's prompts are in the chat template."""
    mark = ""
    """The placeholder of an image in a message."""

    def remember(self, conversation: Sequence[Mapping[str, Any]], rendered: str) -> None:
        """Keep the conversation of a prompt.

        Args:
            conversation: Its messages, as lm-eval made them.
            rendered: The prompt.
        """
        self.chat_applied = True
        known: dict[str, Any] = self.__dict__.setdefault("_conversations", {})
        known[rendered] = copy.deepcopy(list(conversation))

    def with_contrast_prompt(self, request: EvalRequest, template: str) -> EvalRequest:
        """Return a request whose context is the contrast prompt.

        Args:
            request: The request.
            template: `{prompt}` is the text of its last turn, without chat template the whole prompt; `{name}` is a field of the
                document.

        Raises:
            ValueError: A field is unknown, or the conversation of a rendered prompt is not known.
        """
        if self.chat_applied and request.context:
            conversation = self.__dict__.get("_conversations", {}).get(request.context)
            if conversation is None:
                raise ValueError(
                    "contrast_prompt belongs inside the last turn, and these prompts were rendered elsewhere: leave "
                    "cache_requests out"
                )
            messages: Any = contrasted([self._with_parts(message) for message in conversation], template, request.doc)
            messages = [self._with_marks(message) for message in messages]
            text = self.apply_chat_template(messages, not begins_answer(messages))  # type: ignore[attr-defined]
        else:
            text = fill(template, request.context, request.doc)
            if self.chat_applied:
                text = self.apply_chat_template([{"role": "user", "content": text}])  # type: ignore[attr-defined]
        text = text.rstrip() if request.tokens else text
        return replace(request, context=text, arguments=(), gen_kwargs={}, continuation="", tokens=None)

    def _with_parts(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with its image placeholders as content parts."""
        count = message["content"].count(self.mark) if self.mark else 0
        if not count:
            return dict(message)
        text = message["content"].replace(self.mark, "")
        return {**message, "content": [{"type": "image"}] * count + [{"type": "text", "text": text}]}

    def _with_marks(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with its image parts as placeholders before its text."""
        if isinstance(message["content"], str):
            return dict(message)
        *images, text_part = message["content"]
        return {**message, "content": self.mark * len(images) + text_part["text"]}
