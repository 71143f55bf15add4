"""The flags that `generate` and `chat` share, and how a pipeline is opened from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.commands.flags import Bytes, F, given_settings, options
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig
from dovetail.runtime.terminal.console import hashing_bar, notice, waiting
from dovetail.runtime.trees.shape import MAX_TREE_NODES

if TYPE_CHECKING:
    from dovetail.runtime.artifact.opening import Artifact
    from dovetail.runtime.pipeline import Pipeline

_MAX_CONFIG_BYTES = 1 << 20
_OWN = "[default: the artifact's]"


_CONTROLS = [
    *options(CONTROLS.values()),
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
    controls = _read_config(given["config_file"])
    controls |= given_settings(CONTROLS.values(), given)
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
