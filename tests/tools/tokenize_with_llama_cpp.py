"""Tokenizes the tests' varied lines with llama.cpp and with the tokenizer.json that we make of the same GGUF, shows
where they differ, and keeps digests of llama.cpp's ids, which the tests hold ours against: compiling llama.cpp takes
ten minutes, so they go without it (llama-cpp-python, extra `bench`).

Usage: PYTHONPATH=tests/support python tests/tools/tokenize_with_llama_cpp.py GGUF smollm2|gemma3 [VARIANT ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
from oracles.llama_cpp_ids import AS_TEXT, digests, lines_for, tokenizer_of, variants

FOLDER = Path(__file__).parents[1] / "export/tokenizers/llama_cpp"


def main(gguf: Path, model: str, only: list[str]) -> None:
    """Compare, and write the digests where all variants were asked for."""
    kept = {}
    for variant, changes in variants(model).items():
        if only and variant not in only:
            continue
        theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False, kv_overrides=dict(changes) or None)
        ours = tokenizer_of(gguf, model, variant)
        lines = lines_for(ours, variant)
        expected = [theirs.tokenize(line.encode(), add_bos=False, special=variant != AS_TEXT) for line in lines]
        ids = [encoding.ids for encoding in ours.encode_batch(lines, add_special_tokens=False)]
        different = [i for i, row in enumerate(ids) if row != expected[i]]
        for i in different[:5]:
            print(f"  {i}: {lines[i]!r}")
            for name, row in (("ours", ids[i]), ("llama.cpp", expected[i])):
                print(f"    {name}: {[ours.id_to_token(token) for token in row]}")
        distinct = len({token for row in expected for token in row})
        print(f"{variant}: {len(different)} of {len(lines)} lines differ; {distinct} distinct tokens", flush=True)
        kept[variant] = digests(expected)
    if not only:
        FOLDER.mkdir(parents=True, exist_ok=True)
        record = {"llama_cpp_python": llama_cpp.__version__, "digests": kept}
        (FOLDER / f"{model}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
