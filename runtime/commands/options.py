"""The flags that `generate` and `chat` share, and how a pipeline is opened from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.terminal.console import hashing_bar, notice, waiting
from dovetail.runtime.trees.shape import MAX_TREE_NODES

if TYPE_CHECKING:
    from dovetail.runtime.artifact.opening import Artifact
    from dovetail.runtime.pipeline import Pipeline

F = TypeVar("F", bound=Callable[..., Any] | click.Command)
_MAX_CONFIG_BYTES = 1 << 20
_OWN = "[default: the artifact's]"


class LogitBias(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """TOKEN=VALUE."""

    name = "token=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"expected TOKEN_ID=NUMBER, got {value!r}; for example 42=-5", param, ctx)


class TokenList(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """ID,ID,..."""

    name = "id,id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected token ids with commas between them, got {value!r}; for example 42,7", param, ctx)


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """A number of bytes, with a unit or without."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"expected a size such as 2GB or 500MB, got {value!r}", param, ctx)
        return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


_CONTROLS = [
    click.option("-n", "--max-new-tokens", type=int, help="Tokens to generate.  [default: 256, or what is left]"),
    click.option("--min-new-tokens", type=int, help="No end-of-sequence token before these.  [default: 0]"),
    click.option("--temperature", type=float, help=f"0 decodes greedily.  {_OWN}"),
    click.option("--top-k", type=int, help=f"Keep the K most likely tokens; 0 keeps all.  {_OWN}"),
    click.option("--top-p", type=float, help=f"Keep the smallest set of tokens of this probability.  {_OWN}"),
    click.option("--min-p", type=float, help=f"Drop tokens below this share of the best one's probability.  {_OWN}"),
    click.option("--typical-p", type=float, help=f"Keep the typical tokens of this probability.  {_OWN}"),
    click.option("--repetition-penalty", type=float, help=f"Above 1: tokens of the text become less likely.  {_OWN}"),
    click.option("--presence-penalty", type=float, help="Subtracted from logits of generated tokens.  [default: 0]"),
    click.option("--frequency-penalty", type=float, help="The same, times their count.  [default: 0]"),
    click.option("--no-repeat-ngram-size", type=int, help=f"No N tokens in a row occur twice; 0 is off.  {_OWN}"),
    click.option("--logit-bias", type=LogitBias(), multiple=True, help="Add to a token's logit; repeatable."),
    click.option("--bad-words-ids", type=TokenList(), multiple=True, help="Never these tokens in a row; repeatable."),
    click.option("--eos-token-id", type=int, multiple=True, help=f"Token that ends the answer; repeatable.  {_OWN}"),
    click.option("--stop-strings", "--stop", multiple=True, help="End the answer at this text; repeatable."),
    click.option("--include-stop-str-in-output", is_flag=True, default=None, help="Show the stop text too."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on behind the end-of-sequence token."),
    click.option("--num-return-sequences", type=int, help="How many answers.  [default: 1]"),
    click.option("--logprobs", type=int, help="Report log-probabilities: each token's and the N best."),
    click.option("--seed", type=int, help="Same seed, same text.  [default: random, and reported]"),
    click.option("--config", "config_file", type=click.Path(), help="JSON file of controls by these names; flags win."),
]
_ENGINE = [
    click.option(
        "--draft",
        type=click.Choice(["auto", "artifact", "lookup", "none"]),
        default="auto",
        show_default=True,
        help="Who guesses: the artifact's model, matches in the text, or each where it is better.",
    ),
    click.option("--no-draft", is_flag=True, help="Plain decoding; the same as --draft none."),
    click.option(
        "--draft-device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda, cuda:INDEX, openvino:CPU or openvino:GPU.",
    ),
    click.option("--draft-memory-limit", type=Bytes(), help="Most memory on the draft's device, such as 2GB or 500MB."),
    click.option("--exact", is_flag=True, help="Token-identical to decoding one token at a time; slower."),
    click.option(
        "--tree-nodes",
        type=click.IntRange(1, MAX_TREE_NODES),
        help=f"Nodes of a pass, the root counted.  {_OWN}",
    ),
    click.option("--tree-depth", type=click.IntRange(0, 64), help=f"Levels that are drafted.  {_OWN}"),
    click.option("--tree-width", type=click.IntRange(1, 64), help=f"Children tried per node and level.  {_OWN}"),
    click.option("--profile", type=click.Path(), help="A file of dovetail calibrate.  [default: the cache folder's]"),
    click.option(
        "-t", "--threads", type=int, help="CPU threads.  [default: least of cores, affinity, container quota]"
    ),
    click.option("-c", "--ctx-size", type=int, help="Room for prompt and answer, in tokens.  [default: the model's]"),
    click.option("--chat-template", type=click.Path(), help="A jinja2 file in place of the artifact's own."),
    click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files."),
]
_ENGINE_NAMES = {"draft", "no_draft", "draft_device", "draft_memory_limit", "exact", "threads", "ctx_size", "trust"}
_ENGINE_NAMES |= {"profile", "tree_nodes", "tree_depth", "tree_width", "chat_template"}


def controls(command: F) -> F:
    """Every control of a generation, named as in transformers with dashes."""
    return _decorated(command, _CONTROLS)


def engine(command: F) -> F:
    """How the models are run."""
    return _decorated(command, _ENGINE)


def _decorated(command: F, decorators: Sequence[Callable[[F], F]]) -> F:
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(controls, engine) out of a command's flags; the controls of `--config` stand behind those given as flags."""
    engine = {name: value for name, value in given.items() if name in _ENGINE_NAMES}
    flags = {name: value for name, value in given.items() if name not in _ENGINE_NAMES}
    controls = _read_config(flags.pop("config_file"))
    flags["logit_bias"] = dict(flags["logit_bias"])
    for name in ("stop_strings", "logit_bias", "bad_words_ids", "eos_token_id"):
        flags[name] = flags[name] or None  # not given
    controls.update((name, value) for name, value in flags.items() if value is not None)
    return controls, engine


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from dovetail.runtime.artifact import strict_json

    try:
        document = strict_json.parse(Path(path).read_bytes(), path, _MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"--config {path}: expected a readable file, got {error.strerror}; check the path") from None
    except ArtifactError as error:  # the strict reader takes every file for an artifact's
        raise UserError(f"--config {str(error).removesuffix('; export the artifact again')}; correct it") from None
    if not isinstance(document, dict):
        raise UserError(f"--config {path}: expected a JSON object of controls, got {strict_json.shown(document)}")
    if isinstance(document.get("logit_bias"), dict):  # JSON has no integer keys
        bias = document["logit_bias"]
        document["logit_bias"] = {int(token) if token.isdecimal() else token: value for token, value in bias.items()}
    return document


def open_verified(path: str, trust: bool) -> Artifact:
    """Open the artifact, hashes checked, with a bar where that takes a while; nothing native is imported before."""
    from dovetail.runtime.artifact.opening import open_artifact

    if trust:
        notice("the artifact's hashes are not checked (--trust)")
    with hashing_bar() as progress:
        return open_artifact(path, trust=trust, progress=progress)


def replay_chat_examples(artifact: Artifact) -> int:
    """Render what transformers rendered at export; the number of examples. Raises `ArtifactError` where one differs."""
    from dovetail.runtime.artifact.manifest import CHAT_TEMPLATE
    from dovetail.runtime.text.chat_format import ChatFormat
    from dovetail.runtime.text.tokenizer import load_tokenizer

    if not artifact.has(CHAT_TEMPLATE):
        return 0
    chat = ChatFormat(artifact, load_tokenizer(artifact))
    try:
        return chat.verify()
    finally:
        chat.close()


def open_pipeline(path: str, controls: dict[str, Any], engine: dict[str, Any]) -> Pipeline:
    """Open the artifact and load its models, after every flag was checked."""
    from dovetail.runtime.sampling.config import GenerationConfig

    GenerationConfig().with_changes(**controls)
    opened = open_verified(path, engine["trust"])

    # From here on the artifact is what its manifest says; only now are numpy and the engines imported.
    from dovetail.runtime.pipeline import DraftChoice, Pipeline
    from dovetail.runtime.policies.base import LOOKUP_TREE
    from dovetail.runtime.text.chat_format import read_template

    draft: DraftChoice = "none" if engine["no_draft"] else engine["draft"]
    default = LOOKUP_TREE if draft == "lookup" else opened.manifest.default_tree
    shape = {"nodes": engine["tree_nodes"], "depth": engine["tree_depth"], "width": engine["tree_width"]}
    shape = {name: value for name, value in shape.items() if value is not None}
    with waiting("loading the models"):
        return Pipeline(
            opened,
            draft=draft,
            draft_device=engine["draft_device"],
            draft_memory_limit=engine["draft_memory_limit"],
            numerics="exact" if engine["exact"] else "fast",
            threads=engine["threads"],
            ctx_size=engine["ctx_size"],
            tree=dataclasses.replace(default, **shape) if shape else None,
            profile=engine["profile"] or "auto",
            chat_template=None if engine["chat_template"] is None else read_template(engine["chat_template"]),
            notice=notice,
        )
