"""Proves that the tokenizer written for OpenVINO GenAI, made without transformers, gives the same ids and texts as ours
for every kind of tokenizer.json that the runtime reads; and that a tokenizer which loses text, which can't be run, or
whose sibling for GenAI differs, ends the export with the text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino_genai
import pytest
from models import tokenizer_files
from real_models import smollm2_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dovetail.export.sources.gguf_file import read_gguf
from dovetail.export.tokenizers.checking import check_tokenizers
from dovetail.export.tokenizers.openvino_tokenizer import NAMES, write_openvino_tokenizer
from dovetail.runtime.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def metaspace(scheme: str) -> Callable[[], dict[str, Any]]:
    """As T5 and later Mistrals are built."""

    def make() -> dict[str, Any]:
        native = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        native.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        native.decoder = decoders.Sequence([*steps, *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])])
        special = ["<unk>", *tokenizer_files.SPECIALS, *tokenizer_files.BYTES]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        native.train_from_iterator(tokenizer_files.TEXTS, trainer)
        document = tokenizer_files.document_of(native)
        document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
        return document

    return make


def stripping() -> dict[str, Any]:
    """As Phi-3's control tokens: space around them is not read."""
    document = tokenizer_files.byte_level()
    document["added_tokens"][0]["lstrip"] = document["added_tokens"][1]["rstrip"] = True
    return document


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte level": tokenizer_files.byte_level,
    "control tokens that strip": stripping,
    "byte fallback": tokenizer_files.byte_fallback,
    "like Gemma's": tokenizer_files.gemma_like,
    "metaspace, always": metaspace("always"),
    "metaspace, first": metaspace("first"),
    "metaspace, never": metaspace("never"),
}


def write(document: dict[str, Any], folder: Path) -> str:
    text = json.dumps(document)
    write_openvino_tokenizer(text, SPECIAL, "{{ bos_token }}x", folder)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_both_tokenizers_are_the_same(kind: str, tmp_path: Path) -> None:
    text = write(KINDS[kind](), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{end}" for name in NAMES for end in ("xml", "bin")}
    check_tokenizers(text, tmp_path)


def test_genai_opens_a_real_models_tokenizer(tmp_path: Path) -> None:
    source = read_gguf(smollm2_gguf())
    template = source.chat_templates["default"]
    write_openvino_tokenizer(source.tokenizer, source.special_tokens, template, tmp_path)
    check_tokenizers(source.tokenizer, tmp_path)
    genai = openvino_genai.Tokenizer(tmp_path)
    ours = Tokenizer.from_str(source.tokenizer)
    text = genai.apply_chat_template([{"role": "user", "content": "Hello  you,\n\n1234!"}], add_generation_prompt=True)
    assert "<|im_start|>user" in text
    assert genai.encode(text).input_ids.data[0].tolist() == ours.encode(text).ids
    assert (genai.get_bos_token(), genai.get_eos_token()) == ("<|im_start|>", "<|im_end|>")


def test_the_conversion_needs_neither_transformers_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files.byte_level()))
    script = (
        "import sys; from pathlib import Path\n"
        "sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "from dovetail.export.tokenizers.openvino_tokenizer import write_openvino_tokenizer\n"
        "from dovetail.export.tokenizers.checking import check_tokenizers\n"
        "folder = Path(sys.argv[1]); text = (folder / 'tokenizer.json').read_text()\n"
        "write_openvino_tokenizer(text, {}, None, folder); check_tokenizers(text, folder)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def other_merges(document: dict[str, Any]) -> None:
    document["model"]["merges"] = document["model"]["merges"][:40]


def other_decoder(document: dict[str, Any]) -> None:
    document["added_tokens"] = [{**token, "special": False} for token in document["added_tokens"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_merges, "the tokenizer for OpenVINO GenAI to give the same ids, got"),
        (other_decoder, "the detokenizer for OpenVINO GenAI to give the same text, got"),
    ],
)
def test_a_difference_ends_the_export_with_the_text(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    """As when GenAI's tokenizer was made of another class than the file."""
    document = tokenizer_files.byte_level()
    text = json.dumps(document)
    change(document)
    write(document, tmp_path)
    with pytest.raises(UserError) as caught:
        check_tokenizers(text, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def sentence_decoder(document: dict[str, Any]) -> None:
    document["decoder"] = {"type": "Fuse"}


def mixed_decoder(document: dict[str, Any]) -> None:
    document["decoder"] = {"type": "Sequence", "decoders": [{"type": "Fuse"}, document["decoder"]]}


def wrong_id(document: dict[str, Any]) -> None:
    document["added_tokens"][-1]["id"] += 7


def unknown_part(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sentence_decoder, "expected a tokenizer that gives a text back, got"),
        (mixed_decoder, "tokenizer.json decoder: expected ByteLevel, Metaspace, or Replace"),
        (wrong_id, "expected the added token's id"),
        (unknown_part, "normalizer"),
    ],
)
def test_a_tokenizer_that_loses_text_or_cannot_be_run_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    document = tokenizer_files.byte_level()
    change(document)
    with pytest.raises(UserError) as caught:
        check_tokenizers(json.dumps(document), tmp_path)
    assert message in str(caught.value)
