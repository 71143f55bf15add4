"""A tokenizer.json -> the two graphs that OpenVINO GenAI tokenizes with, without transformers.

`openvino_tokenizers` converts objects of transformers; its steps can be put together from the file alone, which also
avoids what its converter changes: it joins several ways to split a text into one pattern, and takes literal texts for
patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dovetail.runtime.errors import UserError

NAMES = ("openvino_tokenizer", "openvino_detokenizer")
_NO_LIMIT = (1 << 31) - 1  # of tokens: a text is never cut
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_DEFAULTS = {
    "unk_token": None,
    "fuse_unk": False,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
}


def write_openvino_tokenizer(
    tokenizer: str, special_tokens: Mapping[str, str], chat_template: str | None, folder: Path
) -> None:
    """Write `openvino_tokenizer` and `openvino_detokenizer` (.xml and .bin) for the text of a tokenizer.json.

    `special_tokens`: texts by names such as `bos_token`. Raises `UserError` for a part that the conversion lacks.
    """
    import openvino as ov

    for name, model in zip(NAMES, convert(json.loads(tokenizer), special_tokens, chat_template), strict=True):
        ov.save_model(model, folder / f"{name}.xml")


def convert(
    document: Mapping[str, Any], special_tokens: Mapping[str, str], chat_template: str | None
) -> tuple[Any, Any]:
    """The tokenizer's and the detokenizer's `openvino.Model` for a parsed tokenizer.json."""
    from openvino import Model, Type
    from openvino_tokenizers import utils
    from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep, TokenizerPipeline

    model = _DEFAULTS | document["model"]
    document = dict(document) | {"model": model}
    ids = _ids(document)
    named = {name: ids[text] for name, text in special_tokens.items() if text in ids}
    pipeline = TokenizerPipeline()
    try:
        _add_special_tokens(pipeline, document)
        for part in _sequence(document["normalizer"], "normalizers"):
            pipeline.add_steps(_normalizer(part))
        for part in _sequence(document["pre_tokenizer"], "pretokenizers"):
            pipeline.add_steps(_pre_tokenizer(part))
            if part["type"] == "Metaspace" and _prepends(part) == "first":  # before control tokens are cut out
                step = RegexNormalizationStep.prepend_with_check_regex(part.get("replacement") or part["str_rep"], " ")
                step.set_pipeline(pipeline)
                pipeline.steps.insert(0, step)
        _add_model(pipeline, document)
        _add_post_processor(pipeline, document, named.get("pad_token", named.get("eos_token")))
        _add_decoder(pipeline, document)
        encoder, decoder = pipeline.get_tokenizer_ov_subgraph(), pipeline.get_detokenizer_ov_subgraph()
    except (KeyError, NotImplementedError) as error:
        raise UserError(
            f"expected a tokenizer.json whose parts OpenVINO has, got: {str(error)[:120]}; GenAI could not open the "
            f"target"
        ) from None
    outputs = [port for port in encoder.outputs if "token_type_ids" not in port.get_names()]
    sinks = encoder.get_sinks()
    encoder = Model(outputs, encoder.get_parameters(), "tokenizer")
    encoder.add_sinks(sinks)
    settings = SimpleNamespace(
        bos_token_id=named.get("bos_token"),
        eos_token_id=named.get("eos_token"),
        pad_token_id=named.get("pad_token"),
        chat_template=chat_template,
        get_vocab=lambda: ids,
    )
    parameters = utils.TokenzierConversionParams(with_detokenizer=True)
    processor = document["post_processor"]
    for graph in (encoder, decoder):  # what GenAI reads of it
        utils.update_rt_info_with_params(graph, settings, parameters)
        utils.update_rt_info_with_environment(graph)
        plain = {"single": {"ids": [-1], "type_ids": [0]}, "pair": {"ids": [-1, -2], "type_ids": [0, 0]}}
        processed = utils.parse_processor_template(processor, settings) if processor else None
        graph.set_rt_info(json.dumps(processor), "original_post_processor_template")
        graph.set_rt_info(json.dumps(processed or plain), "processed_post_processor_template")
    return utils.change_outputs_type(encoder, Type.i64), utils.change_inputs_type(decoder, Type.i64)


def _ids(document: Mapping[str, Any]) -> dict[str, int]:
    vocab = document["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in document["added_tokens"]}


def _sequence(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """A part's steps, one after the other."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[name] for step in _sequence(inner, name)]


def _add_special_tokens(pipeline: Any, document: Mapping[str, Any]) -> None:
    from openvino_tokenizers.tokenizer_pipeline import SpecialToken, SpecialTokensSplit

    tokens = [SpecialToken(token["content"], token["lstrip"], token["rstrip"]) for token in document["added_tokens"]]
    if tokens:
        pipeline.add_steps(SpecialTokensSplit(tokens))


def _normalizer(part: Mapping[str, Any]) -> Any:
    from openvino_tokenizers import tokenizer_pipeline as steps

    kind = part["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return steps.NormalizeUnicode(kind)
    if kind == "Lowercase":
        return steps.CaseFoldStep()
    if kind == "StripAccents":
        return steps.RegexNormalizationStep.strip_accents_regex()
    if kind == "Strip":
        return steps.RegexNormalizationStep.strip_regex(part["strip_left"], part["strip_right"])
    if kind == "Prepend":
        return steps.RegexNormalizationStep.prepend_regex(part["prepend"])
    if kind == "Replace":
        return steps.RegexNormalizationStep(_literal(part["pattern"]), part["content"])
    raise NotImplementedError(f"the normalizer {kind}")


def _literal(pattern: Mapping[str, str]) -> str:
    from openvino_tokenizers.utils import quote_meta

    return str(quote_meta(pattern["String"]))


def _pre_tokenizer(part: Mapping[str, Any]) -> list[Any]:
    from openvino_tokenizers import tokenizer_pipeline as steps

    kind = part["type"]
    if kind == "ByteLevel":
        spaces = [steps.RegexNormalizationStep.add_prefix_whitespace_regex()] if part["add_prefix_space"] else []
        splits = [_split(steps.RegexSplitStep.byte_level_splitter())] if part.get("use_regex", True) else []
        return [*spaces, *splits, steps.BytesToCharsStep()]
    if kind == "Metaspace":
        return _metaspace(part)
    split = steps.RegexSplitStep
    if kind == "Split":
        pattern = part["pattern"].get("Regex") or _literal(part["pattern"])
        step = split(pattern, part["invert"], _behaviour(part["behavior"]))
    elif kind == "Digits":
        step = split.digits_splitter("isolate" if part["individual_digits"] else "contiguous")
    elif kind == "Punctuation":
        step = split.punctuation_splitter(_behaviour(part.get("behavior", "Isolated")))
    elif kind in ("Whitespace", "WhitespaceSplit"):
        step = split.whitespace_splitter() if kind == "Whitespace" else split(r"\s+")
    else:
        raise NotImplementedError(f"the pre-tokenizer {kind}")
    return [_split(step)]


def _behaviour(given: str) -> str:
    """In OpenVINO's words: isolate, remove, contiguous, mergedwithnext, mergedwithprevious."""
    return given.lower().rstrip("d")


def _split(step: Any) -> Any:
    """Not joined with others into one pattern, which would not split alike."""
    step.mergeable = False
    return step


def _metaspace(part: Mapping[str, Any]) -> list[Any]:
    from openvino_tokenizers import tokenizer_pipeline as steps

    sign = part.get("replacement") or part["str_rep"]
    replaced = [steps.RegexNormalizationStep.replace_spaces_metaspace(sign)]
    if _prepends(part) == "always":
        replaced.append(steps.RegexNormalizationStep.prepend_with_check_regex(sign, sign))
    return [*replaced, *([_split(steps.RegexSplitStep.metaspace_splitter(sign))] if part.get("split", True) else [])]


def _prepends(part: Mapping[str, Any]) -> str:
    """When a Metaspace step puts its sign in front: `always`, `never`, or `first`, only where the text begins."""
    return str(part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never"))


def _add_model(pipeline: Any, document: Mapping[str, Any]) -> None:
    from openvino_tokenizers import tokenizer_pipeline as steps

    kind = document["model"]["type"]
    step = {"BPE": steps.BPETokenizationStep, "Unigram": steps.UnigramModelStep}[kind]
    pipeline.add_steps(step.from_hf_json(document))
    pipeline.vocab = list(pipeline[-1].vocab)
    if kind == "BPE" and not document["model"].get("ignore_merges"):
        pipeline[-1].vocab = _reachable(pipeline.vocab, document)


def _reachable(vocab: Sequence[str], document: Mapping[str, Any]) -> list[str]:
    """The vocabulary without the tokens that no merge makes, which OpenVINO would look for in a text before it merges;
    their places stay, empty.
    """
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"])
    merged = {left + right for left, right in pairs} | {token["content"] for token in document["added_tokens"]}
    return [token if len(token) == 1 or token in merged or _BYTE.match(token) else "" for token in vocab]


def _add_post_processor(pipeline: Any, document: Mapping[str, Any], pad_id: int | None) -> None:
    from openvino_tokenizers import tokenizer_pipeline as steps

    templates = [
        part
        for part in _sequence(document["post_processor"], "processors")
        if part["type"] != "ByteLevel"  # which only moves offsets
    ]
    combine = steps.CombineSegmentsStep([steps.Sequence()])
    for part in templates:
        combine = steps.CombineSegmentsStep.from_hf_json_template_postprocessor(part)
    pipeline.add_steps(steps.TruncationStep(_NO_LIMIT - combine.number_of_added_tokens))
    pipeline.add_steps(combine)
    pipeline.add_steps(steps.PaddingStep(_token_id=pad_id))


def _add_decoder(pipeline: Any, document: Mapping[str, Any]) -> None:
    from openvino_tokenizers import tokenizer_pipeline as steps
    from openvino_tokenizers.constants import UTF8ReplaceMode

    parts = _sequence(document["decoder"], "decoders")
    vocabulary = steps.VocabDecoderStep.from_hf_json(
        tokenizer_json=document,
        pipeline_vocab=pipeline.vocab,
        skip_tokens=[token["id"] for token in document["added_tokens"] if token["special"]],
        added_tokens={token["id"]: token["content"] for token in document["added_tokens"]},
        is_byte_level=pipeline.is_byte_level,
    )
    kinds = [part["type"] for part in parts]
    if "ByteFallback" in kinds:  # done beforehand, token by token: OpenVINO's step takes `</div>` for a byte, too
        fuse = kinds.index("Fuse") if "Fuse" in kinds else len(parts)
        vocabulary.vocab = [_decoded(token, parts[:fuse]) for token in pipeline.vocab]
        parts = parts[fuse:]
    pipeline.add_steps(vocabulary)
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            pipeline.add_steps(steps.CharsToBytesStep())
        elif kind == "Replace":
            pipeline.add_steps(steps.RegexDecodingStep(_literal(part["pattern"]), part["content"]))
        elif kind == "Fuse":
            pipeline.add_steps(steps.FuseStep())
        elif kind == "Strip":
            pipeline.add_steps(steps.RegexDecodingStep(f"^{_literal({'String': part['content']})}", ""))
        elif kind == "Metaspace":
            pipeline.add_steps([steps.RegexDecodingStep.replace_sp_spaces(), steps.FuseStep()])
            if _prepends(part) != "never":
                pipeline.add_steps(steps.RegexDecodingStep.strip_forward_space())
        else:
            raise NotImplementedError(f"the decoder {kind}")
    pipeline.add_steps(steps.UTF8ValidateStep(UTF8ReplaceMode.REPLACE))


def _decoded(token: str, parts: Sequence[Mapping[str, Any]]) -> bytes:
    """A token's bytes, after the decoders that look at one token at a time."""
    for part in parts:
        if part["type"] == "Replace":
            token = token.replace(part["pattern"]["String"], part["content"])
        elif part["type"] == "ByteFallback":
            if _BYTE.match(token):
                return bytes.fromhex(token[3:5])
        else:
            raise NotImplementedError(f"the decoder {part['type']} before Fuse")
    return token.encode()
