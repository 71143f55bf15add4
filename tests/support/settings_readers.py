"""Readers of an artifact's small files, of what a user's machine keeps, of flags' files and prompts: see
untrusted_readers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping

from judged_readers import Reader, json_seeds, same, written
from models.tokenizer_files import KINDS, TEXTS

from dovetail.runtime.artifact import manifest, strict_json
from dovetail.runtime.commands import options
from dovetail.runtime.commands.generate import _prompt
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.machine import Machine
from dovetail.runtime.policies import host_profile
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig, read_generation_config
from dovetail.runtime.targets import row_check
from dovetail.runtime.text.tokenizer import Tokenizer, read_native
from dovetail.runtime.trees.shape import TreeShape

VOCABULARY = 1000


def _strict_json(data: bytes) -> None:
    document = strict_json.parse(data, "file", 1 << 16)
    assert same(document, json.loads(data.decode()))
    assert len(strict_json.shown(document)) <= 80
    again = json.dumps(document).encode()
    assert same(strict_json.parse(again, "file", 1 << 20), document)


def _manifest_seeds() -> list[bytes]:
    files = {name: manifest.FileEntry(5, "a" * 64) for name in (manifest.TARGET_MODEL, manifest.TARGET_WEIGHTS)}
    files |= {name: manifest.FileEntry(5, "0" * 64) for name in (manifest.TOKENIZER, manifest.DRAFT_MODEL)}
    target = manifest.TargetInfo("llama", 64, 2, 1000, 2048, 1000, "int8")
    draft = manifest.DraftInfo("dgf", 64, 1000, 2, 2, 16, 10, 1000, "float16")
    checks, tree = manifest.ExportChecks(100, 1e-3, 0.99, 0.97), TreeShape(12, 6, 4)
    whole = manifest.Manifest(manifest.FORMAT_VERSION, "m", target, draft, tree, checks, {"openvino": "1"}, files)
    windowed = dataclasses.replace(target, sliding_window=5, weight_forms={"Q4_1": 3}, rope_border=100)
    alone = {name: entry for name, entry in files.items() if name != manifest.DRAFT_MODEL}
    second = dataclasses.replace(whole, target=windowed, draft=None, files=alone)
    return [manifest.dumps(one).encode() for one in (whole, second)]


def _manifest(data: bytes) -> None:
    made = manifest.loads(data)
    assert manifest.loads(manifest.dumps(made)) == made
    for line in (made.checks.target_summary(), made.checks.warning() or "", made.name, made.target.architecture):
        assert line.isprintable(), line


_MACHINE = Machine("cpu", 2, 1, "none", {"numpy": "2"})
_ENGINES = host_profile.Engines("cpu", "fast", "confirmed", 2, 2)


def _profile_seeds() -> list[bytes]:
    table = ((1.0, 1.5), (1.1, 1.6))
    costs = Costs((64, 256), (1, 2), (1, 4), (1.0, 1.1), table, (1.0, 1.0), table, (0.2, 0.3), 0.1, 0.05, 0.0)
    shared = dataclasses.replace(costs, shared_texts=(2, 4), shared_plain=(1.5, 2.5), switch_ms=0.5)
    chances = Chances((0.9, 0.5, 0.1), ((0.6, 0.2), (0.5, 0.2)))
    choices = tuple(
        host_profile.Choice(t, kind, TreeShape(8, 3, 2), chances, 1.5, 150.0, 148.0, 90.0, None, 0.4)
        for t, kind in ((0.0, "adaptive"), (1.0, "fixed"))
    )
    made = host_profile.HostProfile(
        6, "a" * 64, _MACHINE, _ENGINES, "2026-01-31", "24 conversations", 0.02, costs, choices
    )
    return [host_profile.dumps(dataclasses.replace(made, costs=one)).encode() for one in (costs, shared)]


def _profile(data: bytes) -> None:
    made = host_profile.loads(data)
    assert host_profile.loads(host_profile.dumps(made).encode()) == made
    assert made.summary.isprintable(), made.summary
    for temperature in (0.0, 0.7):
        policy = made.choice(temperature).policy
        assert math.isfinite(policy.gain if hasattr(policy, "gain") else 0.0)
    for context in (0, 100, 1 << 20):
        prices = made.costs.at(context)
        costs = [prices.pass_ms(rows, texts) for rows in (1, 3, 200) for texts in (1, 8)]
        costs += [prices.plain_ms(9), prices.level_ms(40), prices.first_ms(3), prices.row_ms(7)]
        assert all(map(math.isfinite, costs)), costs
    made.check("a" * 64, _MACHINE, _ENGINES)


def _rows(data: bytes) -> None:
    record = row_check._read(written("rows.json", data))
    if record is None:
        raise UserError("expected a record; it is made again")
    assert record.check.summary.isprintable(), record
    assert record.how.isprintable(), record


def _rows_seeds() -> list[bytes]:
    checks = row_check.RowCheck(30, (), 0.0), row_check.RowCheck(30, ("a branch",), 0.5)
    records = [row_check.Record("a" * 64, "m", "fast", 2, check) for check in checks]
    return [json.dumps(dataclasses.asdict(record)).encode() for record in records]


def tokenizer_seeds() -> list[bytes]:
    seeds = []
    for kind in KINDS.values():
        document = kind()
        model = document["model"]
        if model["type"] == "BPE" and not model["byte_fallback"]:  # fewer bytes, the same fields
            keep = {*list(model["vocab"])[:60], "th", "he"}
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token in keep}
            model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= keep]
            document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in keep]
        elif model["type"] == "BPE":
            model["vocab"] = {token: i for token, i in model["vocab"].items() if not re.match("<0x[1-9]", token)}
        else:
            model["vocab"] = [entry for entry in model["vocab"] if not re.match("<0x[4-9A-F]", entry[0])]
            document["added_tokens"] = []
            document["post_processor"] = None
        seeds.append(json.dumps(document).encode())
    return seeds


def _tokenizer(data: bytes) -> None:
    document = strict_json.parse(data, manifest.TOKENIZER, 1 << 20)
    native = read_native(document)
    _use(Tokenizer(document, native, GenerationConfig(), 1 << 25, 1 << 18), TEXTS)


def _use(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(0 <= token < 1 << 25 for token in ids)
        assert len(ids) < 80 * len(text.encode()) + 200, "a text that grows"
        stream = tokenizer.stream()
        shown = "".join(stream.push([token]) for token in ids) + stream.finish()
        assert len(shown.encode("utf-8", "surrogatepass")) < 80 * 1024 * len(ids) + 80
        tokenizer.decode(ids)
    for token in (0, tokenizer.vocab_size - 1):
        tokenizer.token_text(token)


@functools.cache
def tokenizers_of_every_kind() -> list[Tokenizer]:
    documents = [kind() for kind in KINDS.values()]
    return [Tokenizer(one, read_native(one), GenerationConfig(), 1 << 25, 1 << 18) for one in documents]


def _prompt_file(data: bytes) -> None:
    text = _prompt(None, str(written("prompt", data)))
    for tokenizer in tokenizers_of_every_kind():
        _use(tokenizer, [text])
        controls = set(tokenizer._encoder._control)
        assert not controls & {*tokenizer.encode(text, add_special_tokens=False)}, "a control token was typed"
        tokenizer.encode(text, parse_special=True)


def _prompt_seeds() -> list[bytes]:
    return [*(text.encode() for text in TEXTS), b"<s>a</s> <|im_start|>\r\n", "\ufdd0\u2581 a\u0301".encode()]


def _generation(data: bytes) -> None:
    config = read_generation_config(strict_json.parse(data, "generation_config.json", 1 << 20), VOCABULARY)
    config.check(VOCABULARY)
    assert max(config.eos_token_id, default=0) < VOCABULARY
    assert all(math.isfinite(getattr(config, name)) for name in ("temperature", "top_p", "repetition_penalty"))


_GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "eos_token_id": [1, 2],
    "bad_words_ids": [[1, 2], [3]],
    "suppress_tokens": [4],
    "stop_strings": ["x"],
    "max_length": 100,
    "min_new_tokens": 2,
}


def _config_flag(data: bytes) -> None:
    document = options._read_config(str(written("config.json", data)))
    GenerationConfig().with_changes(**{name: document[name] for name in CONTROLS if name in document})
    engine = {name: value for name, value in document.items() if name not in CONTROLS and name != "tree"}
    EngineConfig(**engine)
    if document.get("tree"):
        dataclasses.replace(TreeShape(12, 6, 4), **document["tree"])


_CONFIG_FLAG = {"temperature": 0.5, "logit_bias": {"5": -1.0}, "tree": {"nodes": 8}, "numerics": "exact", "ctx_size": 9}


READERS: Mapping[str, Reader] = {
    "strict_json": Reader(_strict_json, json_seeds({"a": [1, -2.5, "\u00e9", None, True], "b": {"c": {}}}, [])),
    "manifest": Reader(_manifest, _manifest_seeds),
    "profile": Reader(_profile, _profile_seeds),
    "rows": Reader(_rows, _rows_seeds),
    "tokenizer": Reader(_tokenizer, tokenizer_seeds),
    "generation_config": Reader(_generation, json_seeds(_GENERATION, {"do_sample": False, "top_p": 0})),
    "config_flag": Reader(_config_flag, json_seeds(_CONFIG_FLAG)),
    "prompt": Reader(_prompt_file, _prompt_seeds, "text"),
}
