"""How long plain decoding takes for one token here and in OpenVINO GenAI, on the same IR, interleaved. Not a test:
run it by hand.

Usage: python tests/tools/compare_single_token.py ARTIFACT [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys

import numpy as np
import openvino as ov
import openvino_genai

from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact

PROMPT_TOKENS, NEW_TOKENS = 200, 64


def main() -> None:
    path, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 9
    pipe = load(path, draft="none")
    folder = str(open_artifact(path).file(TARGET_MODEL).parent)
    genai = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=pipe.threads)
    prompt = np.random.default_rng(0).integers(1, pipe.artifact.manifest.target.vocab_size, PROMPT_TOKENS)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(prompt[None]), ov.Tensor(np.ones_like(prompt[None])))
    config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)
    ours_ms, theirs_ms = [], []
    for turn in range(rounds + 1):
        done = pipe.generate(prompt.tolist(), temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        theirs = genai_ms(genai, inputs, config)
        if turn:  # the first is the warm-up
            ours_ms.append(done.decode_ms / NEW_TOKENS)
            theirs_ms.append(theirs)
    ratio = statistics.median(a / b for a, b in zip(ours_ms, theirs_ms, strict=True))
    print(
        f"threads {pipe.threads}, {PROMPT_TOKENS} tokens of context, {rounds} interleaved rounds of {NEW_TOKENS} tokens"
    )
    print(f"dovetail        {statistics.median(ours_ms):.3f} ms a token")
    print(f"OpenVINO GenAI  {statistics.median(theirs_ms):.3f} ms a token")
    print(f"ratio           {ratio:.3f} (median of the pairs)")


def genai_ms(genai: openvino_genai.LLMPipeline, inputs: object, config: object) -> float:
    """Mean time per output token by GenAI's own metrics, the first token not counted."""
    return float(genai.generate(inputs, config).perf_metrics.get_tpot().mean)


if __name__ == "__main__":
    main()
