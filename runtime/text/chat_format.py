"""Messages to token ids: the artifact's chat templates, special tokens, and examples that prove it renders right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import CHAT_EXAMPLES, CHAT_TEMPLATE, TOOL_USE_TEMPLATE
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text.chat_template import ChatTemplate, Message, Rendering, Tools, check_messages
from dovetail.runtime.text.tokenizer import Tokenizer

_MAX_BYTES = 4 << 20
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: a template may trim the blank


class ChatFormat:
    """How this artifact's model reads a conversation."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, template: str | None = None) -> None:
        """`template` replaces the artifact's own. Raises `UserError` when there is neither."""
        if template is None and not artifact.has(CHAT_TEMPLATE):
            raise UserError(
                f"{artifact.path}: expected a model with a chat template, got one without; it continues text "
                "(dovetail generate), or pass a chat_template"
            )
        self._tokenizer = tokenizer
        self._examples = _read_examples(artifact)
        self._template = self._compiled(_read_text(artifact, CHAT_TEMPLATE) if template is None else template)
        self._tool_use = None
        if template is None and artifact.has(TOOL_USE_TEMPLATE):
            self._tool_use = self._compiled(_read_text(artifact, TOOL_USE_TEMPLATE))

    def _compiled(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, self._examples["special_tokens"], self._tokenizer.control_tokens)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the conversation, ready for the model to answer: those of transformers' `apply_chat_template`,
        but for control tokens in the values that are given, which stay text.

        If the last message is an assistant's with a text, the answer goes on with that. `variables` are what the
        template may name besides (`enable_thinking`, `documents`). Raises `UserError` for tools and variables that
        the template does not name, and for what it refuses.
        """
        check_messages(messages)
        template = self._template_for(tools)
        for name in ["tools"] * bool(tools) + list(variables or {}):
            if name not in template.source:
                raise UserError(f"expected what the chat template reads, got {name}, which it does not name; drop it")
        if _is_begun(messages[-1]):
            rendering = _continued(template, messages, tools, variables)
        else:
            rendering = template.rendering(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
            )
        return self._tokenizer.encode_owned(rendering.text, rendering.owners)

    def _template_for(self, tools: Tools | None) -> ChatTemplate:
        return self._tool_use if tools is not None and self._tool_use is not None else self._template

    def verify(self) -> int:
        """Render the examples that the export rendered; returns how many there are.

        Raises `ArtifactError` where a rendering differs.
        """
        for example in self._examples["examples"]:
            job = {name: example[name] for name in ("messages", "tools", "add_generation_prompt")}
            got = self._template_for(job["tools"]).render(job.pop("messages"), **job)
            if got != example["text"]:
                at = next((i for i, (a, b) in enumerate(zip(got, example["text"], strict=False)) if a != b), len(got))
                raise ArtifactError(
                    f"{CHAT_TEMPLATE}: expected {example['text'][at : at + 40]!r} at character {at} as the export "
                    f"rendered it, got {got[at : at + 40]!r}; export again, or report this template"
                )
        return len(self._examples["examples"])

    def close(self) -> None:
        """End the templates' workers."""
        self._template.close()
        if self._tool_use is not None:
            self._tool_use.close()


def _is_begun(message: Message) -> bool:
    """Whether this is the front of an answer, and not one that is whole because it calls tools."""
    content = message.get("content")
    return (
        message["role"] == "assistant"
        and isinstance(content, str)
        and bool(content.strip())
        and not (message.get("tool_calls"))
    )


def _continued(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any] | None
) -> Rendering:
    """The prompt up to the end of the last message, as by transformers' `continue_final_message`."""
    *before, last = messages
    tagged = [*before, {**last, "content": last["content"] + _TAG}]
    rendering = template.rendering(tagged, tools=tools, add_generation_prompt=False, variables=variables)
    at = rendering.text.rfind(_TAG.strip())
    if at < 0 or last["content"].strip() not in rendering.text:
        raise UserError(
            "messages: expected a chat template that shows the last message, an assistant's, to its end, got one that "
            "drops some of it; end with a user's message"
        )
    is_trimmed = not rendering.text.startswith(_TAG, at)
    return rendering.front(len(rendering.text[:at].rstrip()) if is_trimmed else at)


def _read_text(artifact: Artifact, name: str) -> str:
    try:
        return artifact.file(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{name}: expected UTF-8, got {error.reason}; export again") from None


def _read_examples(artifact: Artifact) -> dict[str, Any]:
    """`special_tokens` (name -> text) and `examples` (arguments and the text they rendered to)."""
    if not artifact.has(CHAT_EXAMPLES):
        return {"special_tokens": {}, "examples": []}
    document = strict_json.parse(artifact.file(CHAT_EXAMPLES).read_bytes(), CHAT_EXAMPLES, _MAX_BYTES)
    good = (
        isinstance(document, dict)
        and isinstance(document.get("special_tokens"), dict)
        and all(isinstance(text, str) for text in document["special_tokens"].values())
        and isinstance(document.get("examples"), list)
        and all(
            isinstance(example, dict)
            and set(example) == {"messages", "tools", "add_generation_prompt", "text"}
            and isinstance(example["text"], str)
            for example in document["examples"]
        )
    )
    if not good:
        raise ArtifactError(f"{CHAT_EXAMPLES}: expected special_tokens and examples, got another shape; export again")
    examples: dict[str, Any] = document
    return examples
