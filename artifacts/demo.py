"""`make demo`: one text made twice, by plain decoding and by Dovetail, and what each of them cost."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPT = Path(__file__).with_name("demo_prompt.txt")
SAMPLING = ["--max-new-tokens", "256", "--temperature", "0.8", "--seed", "7", "--ignore-eos", "--json"]
WHY = """
The pair that ships is for tests: its target has 12.6 M parameters, and a pass over them takes less time than one call
of the draft on the same CPU. What Dovetail saves is passes, and they are what a target of billions costs."""
ROWS = {
    "tokens/s": ("tokens_per_second", "{:.1f}"),
    "ms a pass, target": ("verify_ms_per_round", "{:.2f}"),
    "ms a round, draft": ("draft_ms_per_round", "{:.2f}"),
    "passes over the weights": ("rounds", "{}"),
    "accept length": ("accept_length_mean", "{:.2f}"),
    "decode ms": ("decode_ms", "{:.0f}"),
}


def generate(artifact: str, *options: str) -> dict[str, Any]:
    """Run the command as a user would; returns its JSON document. Leaves with the command's exit code if it fails."""
    program = Path(sys.executable).with_name("dovetail")
    command = ["generate", artifact, "--file", str(PROMPT), *SAMPLING, *options]
    print(f"\n$ dovetail {shlex.join(command)}", flush=True)
    done = subprocess.run([program, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for part in ("verify_ms", "draft_ms"):
        document[f"{part}_per_round"] = document[part] / document["rounds"]
    return document


def main() -> None:
    artifact = sys.argv[1]
    plain = generate(artifact, "--no-draft")
    ours = generate(artifact)
    same = next((i for i, (a, b) in enumerate(zip(plain["token_ids"], ours["token_ids"], strict=True)) if a != b), None)
    print(f"\n{PROMPT.read_text()}{ours['text']}\n")
    print(f"{'':<26}{'plain':>12}{'dovetail':>12}")
    for label, (key, form) in ROWS.items():
        print(f"{label:<26}{form.format(plain[key]):>12}{form.format(ours[key]):>12}")
    print("\nthe two texts are", "the same, token by token" if same is None else f"the same up to token {same}")
    print(f"speed against plain decoding: {ours['tokens_per_second'] / plain['tokens_per_second']:.2f}x")
    print(WHY)


if __name__ == "__main__":
    main()
