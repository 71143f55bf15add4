"""Messages to token ids: the artifact's chat template, its special tokens, and examples that prove it renders right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import CHAT_EXAMPLES, CHAT_TEMPLATE
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text.chat_template import ChatTemplate, Message
from dovetail.runtime.text.tokenizer import Tokenizer

_MAX_BYTES = 4 << 20


class ChatFormat:
    """How this artifact's model reads a conversation."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, template: str | None = None) -> None:
        """`template` replaces the artifact's own. Raises `UserError` when there is neither."""
        if template is None:
            if not artifact.has(CHAT_TEMPLATE):
                raise UserError(
                    f"{artifact.path}: expected a model with a chat template, got one without; it continues text "
                    "(dovetail generate), or pass a chat_template"
                )
            try:
                template = artifact.file(CHAT_TEMPLATE).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ArtifactError(f"{CHAT_TEMPLATE}: expected UTF-8, got {error.reason}; export again") from None
        self._tokenizer = tokenizer
        self._examples = _read_examples(artifact)
        self._template = ChatTemplate(template, self._examples["special_tokens"])

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the conversation, ready for the model to answer. Control tokens inside a message stay text."""
        rendered = self._template.render(
            self._tokenizer.guarded(messages), tools=tools, add_generation_prompt=add_generation_prompt
        )
        return self._tokenizer.encode_chat(rendered)

    def verify(self) -> int:
        """Render the examples that transformers rendered at export; returns how many there are.

        Raises `ArtifactError` where a rendering differs.
        """
        for example in self._examples["examples"]:
            job = {name: example[name] for name in ("messages", "tools", "add_generation_prompt")}
            got = self._template.render(job.pop("messages"), **job)
            if got != example["text"]:
                at = next((i for i, (a, b) in enumerate(zip(got, example["text"], strict=False)) if a != b), len(got))
                raise ArtifactError(
                    f"{CHAT_TEMPLATE}: expected {example['text'][at : at + 40]!r} at character {at} as transformers "
                    f"rendered it, got {got[at : at + 40]!r}; export again, or report this template"
                )
        return len(self._examples["examples"])

    def close(self) -> None:
        """End the template's worker."""
        self._template.close()


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
