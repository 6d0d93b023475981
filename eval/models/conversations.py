"""Contrast prompts of lm-eval's requests, inside the turn: the conversations behind rendered prompts are remembered.

lm-eval renders a conversation, of system message, examples and an answer that has been begun, into one text before it makes requests.
What another branch reads is rendered anew from the same conversation with another text in its last turn.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from contralto.common.messages import begins_answer, contrasted, fill

__all__ = ["Conversations"]


class Conversations:
    """What models of lm-eval know of the chat template; they call `remember` in their `apply_chat_template`."""

    chat_applied = False
    """Whether the task's prompts are in the chat template."""
    mark = ""
    """What stands for an image in a message."""

    def remember(self, conversation: Sequence[Mapping[str, Any]], rendered: str) -> None:
        """Keep the conversation of a prompt.

        Args:
            conversation: its messages, as lm-eval made them.
            rendered: the prompt.
        """
        self.chat_applied = True
        known: dict[str, Any] = self.__dict__.setdefault("_conversations", {})
        known[rendered] = copy.deepcopy(list(conversation))

    def contrast(self, job: Any, template: str) -> Any:
        """Return the job as another branch reads it.

        Args:
            job: a `Job`.
            template: `{prompt}` is the text of its last turn, without chat template the whole prompt; `{name}` is a field of the
                document.

        Raises:
            ValueError: an unknown field; a prompt in the chat template whose conversation is not known.
        """
        if self.chat_applied and job.context:
            conversation = self.__dict__.get("_conversations", {}).get(job.context)
            if conversation is None:
                raise ValueError(
                    "contrast_prompt belongs inside the last turn, and these prompts were rendered elsewhere: leave "
                    "cache_requests out"
                )
            messages: Any = contrasted([self._parted(message) for message in conversation], template, job.doc)
            messages = [self._joined(message) for message in messages]
            text = self.apply_chat_template(messages, not begins_answer(messages))  # type: ignore[attr-defined]
        else:
            text = fill(template, job.context, job.doc)
            if self.chat_applied:
                text = self.apply_chat_template([{"role": "user", "content": text}])  # type: ignore[attr-defined]
        text = text.rstrip() if job.tokens else text
        return replace(job, context=text, arguments=(), gen_kwargs={}, continuation="", tokens=None)

    def _parted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with its images as parts."""
        count = message["content"].count(self.mark) if self.mark else 0
        if not count:
            return dict(message)
        text = message["content"].replace(self.mark, "")
        return {**message, "content": [{"type": "image"}] * count + [{"type": "text", "text": text}]}

    def _joined(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with its images as marks before its text."""
        if isinstance(message["content"], str):
            return dict(message)
        *images, said = message["content"]
        return {**message, "content": self.mark * len(images) + said["text"]}
