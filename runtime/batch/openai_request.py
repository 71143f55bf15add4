"""Lines of an OpenAI batch file: {"custom_id", "method", "url", "body"}, the body as the endpoint would take it.

Source: OpenAI's Batch API and the create requests of chat completions and of completions (platform.openai.com/docs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig
from dovetail.runtime.sampling.controls import biases_from_json
from dovetail.runtime.text.chat_template import check_messages

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_KEYS = ("custom_id", "method", "url", "body")
_PROMPT_KEY = {CHAT: "messages", COMPLETION: "prompt"}
_VARIABLES = "chat_template_kwargs"
_IGNORED = frozenset({"model", "user", "metadata", "store"})
_CONTROL_OF = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "stop": "stop_strings",
    **{name: name for name in CONTROLS},
}
# What OpenAI's endpoints take and this one does not, unless it says what happens here anyway.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
_MOST_ALTERNATIVES = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a body asks for; `controls` are fields of `GenerationConfig`, `chat_template_kwargs` those of vLLM and
    llama-server."""

    is_chat: bool
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    controls: Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any]


def is_request(entry: Mapping[str, Any]) -> bool:
    """Whether the object of a line is meant as one."""
    return "body" in entry or "url" in entry


def read_request(entry: Mapping[str, Any], where: str) -> Request:
    """Raises `UserError` that calls the line `where` and names what is wrong in it."""
    for key in _KEYS:
        if key not in entry:
            raise UserError(f"{where}: expected the keys {', '.join(_KEYS)}, got none called {key}; add it")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{where}: expected the keys {', '.join(_KEYS)}, got {key!r:.60}; drop it")
    if not isinstance(entry["custom_id"], str):
        raise UserError(f"{where}: expected custom_id as text, got {shown(entry['custom_id'])}; correct it")
    if entry["method"] != "POST":
        raise UserError(f"{where}: expected the method POST, got {shown(entry['method'])}; correct it")
    url, body = entry["url"], entry["body"]
    if url not in (CHAT, COMPLETION):
        raise UserError(f"{where}: expected the url {CHAT} or {COMPLETION}, got {shown(url)}; take the line out")
    if not isinstance(body, dict):
        raise UserError(f"{where}: expected body as an object, got {shown(body)}; correct it")
    is_chat = url == CHAT
    key = _PROMPT_KEY[url]
    if key not in body:
        raise UserError(f"{where}: expected {key} in the body, got none; add it")
    prompt = messages(body[key], where) if is_chat else _prompt(body[key], where)
    variables = body.get(_VARIABLES) or {}
    if _VARIABLES in body and not (is_chat and isinstance(variables, dict)):
        _refuse(where, _VARIABLES, "an object, beside messages", body[_VARIABLES], "correct it")
    return Request(is_chat, prompt, _controls(body, url, where), variables)


def messages(value: Any, where: str) -> list[Mapping[str, Any]]:
    """The messages of a chat, contents of text parts joined to one text. Raises `UserError`."""
    try:
        check_messages(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return [
        {**message, "content": _content(message["content"], where)} if "content" in message else message
        for message in value
    ]


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise UserError(
                f"{where}: messages: expected a content of text or of text parts, got {shown(part)}; take it out"
            )
    return "".join(part["text"] for part in parts)


def _prompt(value: Any, where: str) -> str | list[int]:
    """Text or token ids; a list of one such prompt is that prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(token) is int for token in value)):
        return value
    raise UserError(f"{where}: prompt: expected one text or list of token ids, got {shown(value)}; give each a line")


def _controls(body: Mapping[str, Any], url: str, where: str) -> dict[str, Any]:
    """The controls that a body's fields stand for. A field that is null is not given."""
    controls: dict[str, Any] = {}
    source: dict[str, str] = {}
    for field, given in body.items():
        if field in _IGNORED or field in (_VARIABLES, _PROMPT_KEY[url]):
            continue
        if field in _NOTHING:
            if given is not None and given not in _NOTHING[field]:
                _refuse(where, field, "a field that is supported here", given, "drop it")
            continue
        if field == "top_logprobs" and url == CHAT:
            if given is not None and body.get("logprobs") is not True:
                _refuse(where, field, "it beside logprobs true", given, "add that")
            continue
        if field not in _CONTROL_OF:
            known = ", ".join(sorted({*_CONTROL_OF} - set(CONTROLS)))
            raise UserError(
                f"{where}: expected body fields out of {known} and the controls' own names, got {field!r:.60}; drop it"
            )
        name = _CONTROL_OF[field]
        value = _value(field, given, body, url, where)
        if value is None:
            continue
        if name in controls and controls[name] != value:
            raise UserError(f"{where}: expected {source[name]} or {field}, got both with other values; drop one")
        try:
            GenerationConfig().with_changes(**{name: value})
        except UserError as error:
            raise UserError(f"{where}: {str(error).replace(f'{name}:', f'{field}:', 1)}") from None
        controls[name], source[name] = value, field
    return controls


def _value(field: str, value: Any, body: Mapping[str, Any], url: str, where: str) -> Any:
    """The control's value; None where the field says nothing."""
    if field == "stop" and isinstance(value, str):
        return [value]
    if field == "logit_bias" and isinstance(value, dict):
        return biases_from_json(value)
    if field == "logprobs" and url == CHAT:
        if value is not None and type(value) is not bool:
            _refuse(where, field, "true or false", value, "correct it")
        if value is not True:
            return None
        top = body.get("top_logprobs")
        if top is not None and not (type(top) is int and 0 <= top <= _MOST_ALTERNATIVES):
            _refuse(where, "top_logprobs", f"an integer from 0 to {_MOST_ALTERNATIVES}", top, "correct it")
        return top or 0
    return value


def _refuse(where: str, field: str, expected: str, value: Any, remedy: str) -> NoReturn:
    raise UserError(f"{where}: {field}: expected {expected}, got {shown(value)}; {remedy}")
