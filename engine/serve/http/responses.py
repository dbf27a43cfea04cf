"""OpenAI's forms of what a replica wrote. An event is {"index", "text", "reason", "logprobs", "tokens"}."""

from __future__ import annotations

from typing import Any, Protocol

Choice = dict[str, Any]


class Form(Protocol):
    """The form of one path's answers."""

    prefix: str  # of an answer's id
    whole: str  # names the object
    part: str  # names the object of a stream

    def choice(self, event: dict[str, Any], prompt: str) -> Choice:
        """Return a whole choice; `prompt` is what is echoed."""

    def delta(self, event: dict[str, Any], prompt: str, first: bool) -> Choice:
        """Return a part of a choice; `prompt` is empty but in its first."""


class CompletionForm:
    """/v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, event: dict[str, Any], prompt: str) -> Choice:
        """Return a whole choice."""
        text = prompt + event["text"]
        return {"index": event["index"], "text": text, "logprobs": event["logprobs"], "finish_reason": event["reason"]}

    def delta(self, event: dict[str, Any], prompt: str, first: bool) -> Choice:
        """Return a part of a choice, which looks like the whole."""
        return self.choice(event, prompt)


class ChatForm:
    """/v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, event: dict[str, Any], prompt: str) -> Choice:
        """Return a whole choice."""
        message = {"role": "assistant", "content": event["text"], "refusal": None}
        return self._around(event) | {"message": message}

    def delta(self, event: dict[str, Any], prompt: str, first: bool) -> Choice:
        """Return a part of a choice; the first names the role."""
        role = {"role": "assistant"} if first else {}
        return self._around(event) | {"delta": role | ({"content": event["text"]} if event["text"] or first else {})}

    def _around(self, event: dict[str, Any]) -> Choice:
        return {"index": event["index"], "logprobs": event["logprobs"], "finish_reason": event["reason"]}


def usage(head: dict[str, Any], written: int) -> dict[str, Any]:
    """Return OpenAI's usage: tokens read (of these, found in the cache) and written."""
    read = head["prompt_tokens"]
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": head["cached_tokens"]},
    }  # fmt: skip
