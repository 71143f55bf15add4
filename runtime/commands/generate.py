"""The command `dovetail generate`."""

from __future__ import annotations

import secrets
import sys
from typing import Any

import click

from dovetail.runtime.commands import options
from dovetail.runtime.commands.answers import Printer, report
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import print_json

MAX_PROMPT_FILE_BYTES = 16 << 20


@click.command()
@click.argument("artifact", type=click.Path())
@click.argument("prompt", required=False)
@click.option("-f", "--file", "file", type=click.Path(), help="Read the prompt from a file; - is stdin.")
@click.option("--special", "parse_special", is_flag=True, help="Control tokens in the prompt are meant as such.")
@options.controls
@options.engine
@click.option("--stats", is_flag=True, help="Print a table of what the rounds did.")
@click.option("--show-draft", is_flag=True, help="On a terminal, colour the tokens that the draft had guessed.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def generate(
    artifact: str,
    prompt: str | None,
    file: str | None,
    parse_special: bool,
    stats: bool,
    show_draft: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue PROMPT (or a file, or stdin) with the model in ARTIFACT.

    Of a file and of stdin the last line end is not part of the prompt. Control tokens in a prompt are plain text,
    unless --special says that they are meant, as in a prompt that a chat template has made.
    """
    text = _prompt(prompt, file)
    controls, engine = options.split(settings)
    controls.setdefault("seed", secrets.randbits(32))
    pipe = options.open_pipeline(artifact, controls, engine)
    config = pipe.config(**controls)
    ids = pipe.encode(text, parse_special=parse_special)
    streams = [pipe.stream(ids, config, sequence=number) for number in range(config.num_return_sequences)]
    streams[0].share_prompt(streams[1:])  # they are made together; what the later ones say waits for its turn
    results = []
    for number, stream in enumerate(streams):
        if number and not as_json:
            click.echo("---")
        results.append(Printer(show_draft).show(stream, quiet=as_json))
        report(results[-1], stats)
        if results[-1].finish_reason == "cancelled":
            break
    if as_json:
        first = results[0].as_dict()
        print_json(first if len(results) == 1 else {**first, "sequences": [result.as_dict() for result in results]})
    if results[-1].finish_reason == "cancelled":
        sys.exit(130)


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise UserError("expected one prompt, got both an argument and --file; drop one")
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("expected a prompt, got none; pass it as an argument, with --file, or on stdin")
    if prompt is None or (prompt == "-" and file is None):
        try:
            if file in (None, "-"):
                data = sys.stdin.buffer.read(MAX_PROMPT_FILE_BYTES + 1)
            else:
                assert file is not None
                with open(file, "rb") as handle:
                    data = handle.read(MAX_PROMPT_FILE_BYTES + 1)
            prompt = data.decode()
            prompt = prompt.removesuffix("\r\n" if prompt.endswith("\r\n") else "\n")  # editors and echo end files so
        except OSError as error:
            raise UserError(f"--file {file}: expected a readable file, got {error.strerror}; check the path") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"expected a prompt in UTF-8, got {error.reason} at byte {error.start}; convert it"
            ) from None
        if len(data) > MAX_PROMPT_FILE_BYTES:
            raise UserError(f"expected a prompt of at most {MAX_PROMPT_FILE_BYTES} bytes, got more; shorten it")
    if not prompt:
        raise UserError("expected a prompt, got an empty one; give some text")
    return prompt
