"""`dovetail chat`: a conversation in the terminal, the cache of earlier turns reused."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.commands import options
from dovetail.runtime.commands.answers import Printer, report
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import in_flags, notice

if TYPE_CHECKING:
    from dovetail.runtime.decoding.generation import Generation

HELP = (
    "/reset forgets all, /stats tells what the last answer cost, /exit or Ctrl-D leaves, Ctrl-C stops an answer; "
    "anything else is said, /reset too with a blank before it"
)


@click.command()
@click.argument("artifact", type=click.Path())
@click.option("--system", help="A system message before the conversation.")
@options.chat_template_kwargs
@options.controls
@options.engine
@click.option("--show-draft", is_flag=True, help="Colour the tokens that the draft had guessed.")
def chat(
    artifact: str, system: str | None, chat_template_kwargs: dict[str, Any] | None, show_draft: bool, **settings: Any
) -> None:
    """Talk with the model in ARTIFACT, whose chat template frames the messages.

    A line is a message, but for the commands /help, /reset, /stats and /exit. One that is to be said has a blank before
    it.
    """
    controls, engine = options.split(settings)
    controls.setdefault("seed", secrets.randbits(32))
    pipe = options.open_pipeline(artifact, controls, engine)
    config = pipe.config(**controls)
    if config.num_return_sequences > 1 or config.logprobs is not None:
        raise UserError("expected one answer a turn, got --num-return-sequences or --logprobs; use dovetail generate")
    opening = [] if system is None else [{"role": "system", "content": system}]
    hello = {"role": "user", "content": "hello"}
    pipe.encode([*opening, hello], None, chat_template_kwargs)  # what can't be is refused before the first word
    notice(HELP)
    messages, last = list(opening), None
    with pipe.conversation() as conversation:
        while (line := _read()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
                conversation.reset()
                notice("the conversation is forgotten")
            elif line == "/stats":
                _stats(last)
            elif line == "/help":
                notice(HELP)
            elif line.strip():
                asked = [*messages, {"role": "user", "content": line}]
                try:
                    stream = pipe.stream(
                        asked,
                        config,
                        chat_template_kwargs=chat_template_kwargs,
                        conversation=conversation,
                        sequence=len(asked),
                    )
                except UserError as error:
                    notice(f"error: {in_flags(str(error), click.get_current_context().command)}")
                    continue
                last = Printer(show_draft).show(stream)
                messages = [*asked, {"role": "assistant", "content": last.text}]


def _read() -> str | None:
    """The next line of the user's; None at the end. On a terminal with a prompt, and Ctrl-C only drops the line."""
    try:
        return input("> " if sys.stdin.isatty() else "").rstrip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        notice("")
        return ""


def _stats(last: Generation | None) -> None:
    if last is None:
        notice("no answer yet")
    else:
        report(last, stats=True)
        notice(f"{last.reused_tokens} of {last.prompt_tokens} prompt tokens were in the cache")
