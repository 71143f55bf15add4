"""Proves: a manifest survives writing and reading; what is not exactly one is refused, quickly and in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.artifact import manifest
from dovetail.runtime.errors import ArtifactError

ENTRY = {"bytes": 10, "sha256": "0" * 64}
DOCUMENT: dict[str, Any] = {
    "format_version": manifest.FORMAT_VERSION,
    "name": "tiny",
    "target": {
        "architecture": "llama",
        "hidden_size": 64,
        "num_layers": 2,
        "vocab_size": 300,
        "context_length": 2048,
        "parameters": 100_000,
        "weight_format": "int8",
        "sliding_window": 4096,
    },
    "draft": {
        "kind": "dgf",
        "hidden_size": 64,
        "vocab_size": 300,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "top_k": 10,
        "parameters": 30_000,
        "precision": "float16",
    },
    "default_tree": {"nodes": 12, "depth": 6, "width": 4},
    "checks": {
        "tokens": 100,
        "target_kl_mean": 1e-3,
        "target_argmax_agreement": 0.99,
        "draft_argmax_agreement": 0.97,
        "target_perplexity": 7.5,
        "source_perplexity": 7.4,
        "fast_kl_mean": 2e-3,
        "fast_argmax_agreement": 0.98,
    },
    "tool_versions": {"openvino": "2026.4.1"},
    "files": dict.fromkeys(
        (manifest.TARGET_MODEL, manifest.TARGET_WEIGHTS, manifest.DRAFT_MODEL, manifest.TOKENIZER), ENTRY
    ),
}


def paths(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    return [at, *(path for key, item in inner for path in paths(item, (*at, key)))]


FIELDS = [path for path in paths(DOCUMENT) if path]
YOUNGER = {("target", "sliding_window"), ("checks", "target_perplexity"), ("checks", "source_perplexity")}
YOUNGER |= {("checks", "fast_kl_mean"), ("checks", "fast_argmax_agreement")}
"""Fields that the first artifacts of this format do not have."""
NULLABLE = YOUNGER | {("draft",)} | {("checks", f"{name}_agreement") for name in ("target_argmax", "draft_argmax")}
NULLABLE |= {("checks", "target_kl_mean")}


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def refusal(data: str | bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        manifest.loads(data)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 500, message
    return message


def test_round_trip() -> None:
    first = manifest.loads(json.dumps(DOCUMENT))
    assert manifest.loads(manifest.dumps(first)) == first
    assert manifest.loads(json.dumps(changed(("draft",), None))).draft is None


@pytest.mark.parametrize("path", FIELDS, ids="/".join)
def test_every_field_refuses_other_types(path: tuple[str, ...]) -> None:
    for wrong in ([], {"a": 1}, True, "\0", "a\nb", "\ud800", 10**18, -5, 1.5, [[[[1]]]], {"a": {"b": {}}}, "9" * 5000):
        if path[-1] in ("target_kl_mean", "fast_kl_mean", "target_perplexity", "source_perplexity") and wrong == 1.5:
            continue
        refusal(json.dumps(changed(path, wrong)))
    if path not in NULLABLE:
        refusal(json.dumps(changed(path, None)))
    text = json.dumps(changed(path, "HERE"))
    for raw in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "9" * 5000,
        "-" + "9" * 30,
        "1" * 30 + ".5e-400x",
        "01",
        "'x'",
    ):
        refusal(text.replace('"HERE"', raw, 1))


@pytest.mark.parametrize("path", FIELDS, ids="/".join)
def test_every_field_is_needed_under_its_name_and_once(path: tuple[str, ...]) -> None:
    if path[0] == "tool_versions" and len(path) == 2:
        return  # any tool may be missing or renamed
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    value = inner.pop(path[-1])
    if path in YOUNGER:
        assert manifest.loads(json.dumps(document))
    else:
        refusal(json.dumps(document))
    inner[path[-1].upper()] = value
    refusal(json.dumps(document))
    text = json.dumps(DOCUMENT)
    key = json.dumps(path[-1]) + ": "
    assert "twice" in refusal(text.replace(key, f"{key}0, {key}", 1))


def test_newer_format_is_named_before_anything_else() -> None:
    newer = manifest.FORMAT_VERSION + 1
    message = refusal(json.dumps({"format_version": newer, "something": "new"}))
    assert "upgrade dovetail" in message
    assert str(newer) in message
    assert "upgrade" not in refusal(json.dumps(changed(("format_version",), 0)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b"\xff",
        json.dumps(DOCUMENT).encode("utf-16"),
        b'{"a": "\x01"}',
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b" " * (manifest.MAX_MANIFEST_BYTES + 1),
        "é" * (manifest.MAX_MANIFEST_BYTES - 100),
        "\ud800",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_not_a_document(data: str | bytes) -> None:
    refusal(data)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../x",
        "a/./x",
        "a//x",
        "a/",
        "~/x",
        "C:x",
        "a\\x",
        "a b",
        "é",
        ".x",
        "-x",
        "x.",
        "a/nul",
        "con.txt",
        "a\x00",
        "a\n",
        "a/b/c/d/e",
        "x" * 101,
        "/" * 100000,
        "dovetail.json",
        "DOVETAIL.JSON",
        "TOKENIZER/x",
        "Target/openvino_model.bin",
        "target",
        "target/openvino_model.xml/x",
        "tokenizer/tokenizer.JSON",
    ],
    ids=lambda name: repr(name[:30]),
)
def test_file_names(name: str) -> None:
    refusal(json.dumps(changed(("files", name), ENTRY)))


@pytest.mark.parametrize("name", ["README.md", "draft/model.onnx.data", "a/b/c/d", "console.txt", "x"])
def test_good_file_names(name: str) -> None:
    assert name in manifest.loads(json.dumps(changed(("files", name), ENTRY))).files


def test_a_manifest_full_of_keys_is_refused_at_once() -> None:
    started = time.monotonic()
    keys = ", ".join(f'"{i}": 1' for i in range(60_000))
    refusal('{"files": {' + keys + ', "59999": 2}}')
    refusal("{" + keys + "}")
    names = {f"{i}/" + "a/" * 200: ENTRY for i in range(900)}
    refusal(json.dumps(changed(("files",), names)))
    assert time.monotonic() - started < 2


def test_draft_of_another_target() -> None:
    assert "draft vocab_size 299 != target vocab_size 300" in refusal(json.dumps(changed(("draft", "vocab_size"), 299)))
    assert "draft hidden_size 32 != target" in refusal(json.dumps(changed(("draft", "hidden_size"), 32)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(path=st.sampled_from(FIELDS), value=JSON)
def test_any_value_anywhere_is_read_or_refused(path: tuple[str, ...], value: Any) -> None:
    text = json.dumps(changed(path, value))
    try:
        read = manifest.loads(text)
    except ArtifactError:
        refusal(text)
    else:
        assert manifest.loads(manifest.dumps(read)) == read


def test_a_poor_target_is_said() -> None:
    """By either figure: as it computes in float32, and as it is run."""
    good = manifest.ExportChecks(
        tokens=512, target_kl_mean=0.004, target_argmax_agreement=0.96, draft_argmax_agreement=None
    )
    assert good.warning() is None
    assert dataclasses.replace(good, target_kl_mean=None).warning() is None
    for field in ("target_kl_mean", "fast_kl_mean"):
        warning = dataclasses.replace(good, **{field: 0.21}).warning()
        assert warning is not None
        assert "0.21 nats a token" in warning
