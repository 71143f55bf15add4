"""One line of a batch's output: a finished line, or why it could not be done, as a JSON document."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import TYPE_CHECKING, Any

from dovetail.runtime.errors import ContextOverflowError, DrawError, UserError

if TYPE_CHECKING:
    from dovetail.runtime.batch.line import Line
    from dovetail.runtime.decoding.generation import Generation
    from dovetail.runtime.sampling.sampler import TokenLogprobs
    from dovetail.runtime.text.tokenizer import Tokenizer

Document = dict[str, Any]


class Results:
    """Makes the documents of one batch."""

    def __init__(self, model: str, tokenizer: Tokenizer, batch_id: str) -> None:
        """`model` is the artifact's name; `batch_id` the same whenever this batch goes on."""
        self._model, self._tokenizer, self._batch_id = model, tokenizer, batch_id

    def done(self, line: Line, answers: list[Generation]) -> Document:
        """The answers to one line; more than one where `num_return_sequences` asks for that."""
        if line.is_openai:
            request_id = self._request_id(line)
            body = self._chat(answers, request_id) if line.is_chat else self._completion(answers, request_id)
            response = {"status_code": 200, "request_id": request_id, "body": body}
            return {"id": f"batch_req_{request_id}", "custom_id": line.id, "response": response, "error": None}
        first = _plain(answers[0])
        if len(answers) > 1:
            first["sequences"] = [_plain(answer) for answer in answers]
        return {"id": line.id, **first}

    def failed(self, line: Line, error: UserError | DrawError) -> Document:
        """What stands in the place of an answer."""
        about = {"code": _code(error), "message": _located(line, error)}
        if line.is_openai:
            request_id = f"batch_req_{self._request_id(line)}"
            return {"id": request_id, "custom_id": line.id, "response": None, "error": about}
        return {"id": line.id, "error": about}

    def _request_id(self, line: Line) -> str:
        return hashlib.sha256(f"{self._batch_id}:{line.number}".encode()).hexdigest()[:24]

    def _chat(self, answers: list[Generation], request_id: str) -> Document:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = {"content": self._chat_logprobs(answer)} if answer.logprobs else None
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}
            )
        return self._body(f"chatcmpl-{request_id}", "chat.completion", choices, answers)

    def _completion(self, answers: list[Generation], request_id: str) -> Document:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = self._completion_logprobs(answer) if answer.logprobs else None
            choices.append(
                {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
            )
        return self._body(f"cmpl-{request_id}", "text_completion", choices, answers)

    def _body(self, body_id: str, kind: str, choices: list[Document], answers: list[Generation]) -> Document:
        made = sum(answer.completion_tokens for answer in answers)
        prompt = answers[0].prompt_tokens
        return {
            "id": body_id,
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
            "choices": choices,
            "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
            "seed": answers[0].seed,
        }

    def _chat_logprobs(self, answer: Generation) -> list[Document]:
        entries = []
        for token, about in zip(answer.token_ids, answer.logprobs, strict=True):
            top = [self._token(other, logprob) for other, logprob in about.top]
            entries.append({**self._token(token, about.logprob), "top_logprobs": top})
        return entries

    def _token(self, token: int, logprob: float) -> Document:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _completion_logprobs(self, answer: Generation) -> Document:
        texts = [self._text(token) for token in answer.token_ids]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [about.logprob for about in answer.logprobs],
            "top_logprobs": [self._alternatives(about) for about in answer.logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, about: TokenLogprobs) -> dict[str, float]:
        best: dict[str, float] = {}
        for token, logprob in about.top:
            best.setdefault(self._text(token), logprob)  # two halves of characters look the same
        return best

    def _text(self, token: int) -> str:
        return self._tokenizer.token_text(token)


def _plain(answer: Generation) -> Document:
    document: Document = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seed": answer.seed,
    }
    if answer.logprobs:
        document["token_ids"] = answer.token_ids
        document["logprobs"] = [dataclasses.asdict(entry) for entry in answer.logprobs]
    return document


def _located(line: Line, error: UserError | DrawError) -> str:
    where = f"line {line.number}: "
    return str(error) if str(error).startswith(where) else where + str(error)


def _code(error: UserError | DrawError) -> str:
    if isinstance(error, ContextOverflowError):
        return "context_length_exceeded"
    return "invalid_request" if isinstance(error, UserError) else "generation_failed"
