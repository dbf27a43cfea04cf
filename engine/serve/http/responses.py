"""OpenAI's response bodies for what a replica has generated."""

from __future__ import annotations

from typing import Any, Protocol

from engine.serve.jobs import Choice, PromptInfo


class ResponseFormatter(Protocol):
    """The response bodies of one path."""

    id_prefix: str  # of the response's id
    object_type: str  # `object` of a whole response
    chunk_object_type: str  # `object` of a stream's events

    def choice(self, choice: Choice, prompt: str) -> dict[str, Any]:
        """Return a whole choice; `prompt` is the echoed one, or empty."""

    def delta(self, choice: Choice, prompt: str, is_first: bool) -> dict[str, Any]:
        """Return what is new of a choice; `prompt` is the echoed one in its first message, else empty."""


class CompletionFormatter:
    """/v1/completions."""

    id_prefix, object_type, chunk_object_type = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice, prompt: str) -> dict[str, Any]:
        """Return a whole choice."""
        return {
            "index": choice.index, "text": prompt + choice.text, "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }  # fmt: skip

    def delta(self, choice: Choice, prompt: str, is_first: bool) -> dict[str, Any]:
        """Return what is new of a choice, in the form of a whole one."""
        return self.choice(choice, prompt)


class ChatFormatter:
    """/v1/chat/completions."""

    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice, prompt: str) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._common_fields(choice) | {"message": message}

    def delta(self, choice: Choice, prompt: str, is_first: bool) -> dict[str, Any]:
        """Return what is new of a choice; its first message names the role."""
        role = {"role": "assistant"} if is_first else {}
        content = {"content": choice.text} if choice.text or is_first else {}
        return self._common_fields(choice) | {"delta": role | content}

    def _common_fields(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}


def usage(prompt: PromptInfo, completion_tokens: int) -> dict[str, Any]:
    """Return OpenAI's usage of a generation: the prompts' tokens (of these, those found in the cache), and the generated ones."""
    return {
        "prompt_tokens": prompt.prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens},
    }  # fmt: skip


def input_usage(prompt_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage of a task that generates no tokens."""
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
