"""The flags that `generate` and `chat` share, and how a pipeline is opened from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.commands.flags import F, given_settings, options
from dovetail.runtime.decoding.engine_config import EngineConfig, Shape
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig
from dovetail.runtime.sampling.controls import biases_from_json
from dovetail.runtime.settings import settings_of, unknown_name
from dovetail.runtime.terminal.console import hashing_bar, notice, waiting

if TYPE_CHECKING:
    from dovetail.runtime.artifact.opening import Artifact
    from dovetail.runtime.pipeline import Pipeline

_MAX_CONFIG_BYTES = 1 << 20


_ENGINE = settings_of(EngineConfig)
_CONFIG = click.option(
    "--config", "config_file", type=click.Path(), help="JSON file of controls and of what load takes; flags win."
)
_TRUST = click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")


def controls(command: F) -> F:
    """Every control of a generation, named as in transformers with dashes."""
    return _decorated(command, [*options(CONTROLS.values()), _CONFIG])


def engine(command: F) -> F:
    """How the models are run."""
    return _decorated(command, [*options(_ENGINE.values()), _TRUST])


def chat_template_kwargs(command: F) -> F:
    """What a chat template may name besides messages."""
    words = "--chat-template-kwargs", "chat_template_kwargs"
    text = "JSON object of what the chat template may name besides: '{\"enable_thinking\": false}'."
    return click.option(*words, callback=_read_object, metavar="JSON", help=text)(command)


def _read_object(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, Any] | None:
    from dovetail.runtime.artifact import strict_json

    if text is None:
        return None
    remedy = "quote it for the shell"
    try:
        document = strict_json.parse(
            text.encode("utf-8", "surrogateescape"), parameter.opts[0], _MAX_CONFIG_BYTES, remedy
        )
    except ArtifactError as error:  # the strict reader takes every text for an artifact's
        raise UserError(str(error)) from None
    if not isinstance(document, dict):
        raise UserError(f"{parameter.opts[0]}: expected a JSON object, got {strict_json.shown(document)}; {remedy}")
    return document


def part_of_engine(**help_texts: str) -> Callable[[F], F]:
    """The flags of some engine settings, with this command's own help and defaults."""
    chosen = []
    for name, text in help_texts.items():
        one = _ENGINE[name]
        shortcuts = {flag: (value, text) for flag, (value, _) in one.shortcuts.items()}
        chosen.append(dataclasses.replace(one, help=text, shown_default="", shortcuts=shortcuts))
    return lambda command: _decorated(command, options(chosen))


def engine_config(given: dict[str, Any]) -> EngineConfig:
    """What the flags of `part_of_engine` say."""
    return EngineConfig(**given_settings(_ENGINE.values(), given))


def _decorated(command: F, decorators: Sequence[Callable[[F], F]]) -> F:
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(controls, engine settings and `trust`) out of a command's flags; what `--config` says stands behind them."""
    document = _read_config(given["config_file"])
    controls = {name: document[name] for name in CONTROLS if name in document}
    engine = {name: document[name] for name in _ENGINE if name in document}
    flags = given_settings(_ENGINE.values(), given)
    if "tree" in flags:
        flags["tree"] = {**(engine.get("tree") or {}), **flags["tree"]}
    controls |= given_settings(CONTROLS.values(), given)
    return controls, {**engine, **flags, "trust": given["trust"]}


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
        raise UserError(
            f"--config {path}: expected a JSON object of settings, got {strict_json.shown(document)}; correct it"
        )
    known = {**CONTROLS, **_ENGINE}
    for name in document:
        if name not in known:
            raise UserError(f"--config {path}: {unknown_name(name, known, 'names of controls and engine settings')}")
    tree, parts = document.get("tree"), {part for part, *_ in Shape.parts}
    if tree is not None and not (isinstance(tree, dict) and set(tree) <= parts):
        raise UserError(
            f"--config {path}: expected tree as an object of nodes, depth and width, got {strict_json.shown(tree)}; "
            "correct it"
        )
    if isinstance(document.get("logit_bias"), dict):
        document["logit_bias"] = biases_from_json(document["logit_bias"])
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
    settings = dict(engine)
    trust, shape = settings.pop("trust"), settings.pop("tree", None)
    config = EngineConfig(**settings)
    opened = open_verified(path, trust)

    # From here on the artifact is what its manifest says; only now are numpy and the engines imported.
    from dovetail.runtime.pipeline import Pipeline
    from dovetail.runtime.policies.base import LOOKUP_TREE

    if shape:
        default = LOOKUP_TREE if config.draft == "lookup" else opened.manifest.default_tree
        config = config.with_changes(tree=dataclasses.replace(default, **shape))
    with waiting("loading the models"):
        return Pipeline(opened, config)
