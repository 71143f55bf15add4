"""Proves: every weight format is stored as it says, is as near to the source as it can be, and the export reports how
near; settings that contradict one another are one clear line.
"""

from __future__ import annotations

import logging
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf  # here, so that its logger is there when a test begins
import pytest
import torch
from transformers import AutoModelForCausalLM

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.convert.torch_model import load_torch
from dovetail.export.target.ir_weights import stored_format, weight_elements
from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import TARGET_MODEL, TARGET_WEIGHTS, Manifest
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError
from dovetail.runtime.targets.openvino.ir import read_ir

TEXT = Path(sysconfig.get_path("stdlib"), "bisect.py").read_text(encoding="utf-8")
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {},
    "int8": {},
    "int8_asym": {},
    "int4": {},
    "int4, rows": {"group_size": -1},
    "int4, half int8": {"int8_share": 0.5},
    "int4, data-aware": {"calibration_text": TEXT},
}


@pytest.fixture(scope="module")
def export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Manifest, Path]]:
    made: dict[str, tuple[Manifest, Path]] = {}

    def make(name: str) -> tuple[Manifest, Path]:
        if name not in made:
            out = tmp_path_factory.mktemp("formats") / "artifact"
            settings = {"weight_format": name.partition(",")[0], **FORMATS[name]}
            made[name] = write_artifact(tiny_checkpoint, out, check_text=TEXT, **settings), out
        return made[name]

    return make


def test_the_logging_of_others_stays_as_it_was(
    export: Callable[[str], tuple[Manifest, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """nncf's logger does not propagate, so pytest, like anybody who wants its lines, hangs handlers there."""
    assert caplog.handler in logging.getLogger(nncf.__name__).handlers
    export("int8")
    assert caplog.handler.level == logging.NOTSET
    logging.getLogger("dovetail").warning("heard")
    assert caplog.messages[-1:] == ["heard"]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_stored_and_runs(name: str, export: Callable[[str], tuple[Manifest, Path]]) -> None:
    manifest, path = export(name)
    artifact = open_artifact(path)
    model = read_ir(artifact.file(TARGET_MODEL))
    assert manifest.target.weight_format == name.partition(",")[0]
    assert abs(weight_elements(model).total() / manifest.target.parameters - 1) < 0.02, "scales are no weights"
    if "half" not in name:  # in a model this small, embedding and head are most of the weights, and stay in 8 bits
        assert name.startswith("int4") or stored_format(model) == manifest.target.weight_format
    checks = manifest.checks
    assert checks.tokens > 500
    assert checks.target_kl_mean is not None
    assert checks.target_argmax_agreement is not None
    assert checks.target_perplexity is not None
    assert checks.source_perplexity is not None
    assert abs(checks.target_perplexity / checks.source_perplexity - 1) < 0.3
    assert (checks.fast_kl_mean is None) == manifest.target.weight_format.startswith("fp"), (
        "only integers are rounded to"
    )
    with load(path, draft="lookup") as pipe:
        assert len(pipe.generate("def f(", max_new_tokens=8, ignore_eos=True).token_ids) == 8


def test_more_bits_are_nearer_to_the_source(export: Callable[[str], tuple[Manifest, Path]]) -> None:
    kl = {name: export(name)[0].checks.target_kl_mean or 0.0 for name in FORMATS}
    assert kl["fp32"] < 1e-8 < kl["fp16"] < 5e-6 < kl["int8"] < 1e-2 < kl["int4"], kl
    assert kl["int8_asym"] < 1e-2, kl
    fast = {name: export(name)[0].checks.fast_kl_mean or 0.0 for name in ("int8", "int4")}
    assert all(kl[name] < fast[name] < kl[name] + 0.05 for name in fast), (kl, fast)
    assert all(kl["int8"] < kl[name] < 0.2 for name in FORMATS if name.startswith("int4")), kl
    assert kl["int4, rows"] > kl["int4"], kl
    sizes = {name: export(name)[0].files[TARGET_WEIGHTS].bytes for name in FORMATS}
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert sizes["int4, data-aware"] < sizes["int4, half int8"] < sizes["int8"]


def test_a_checkpoint_in_bfloat16(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Is read without a float32 copy of it, in float32 arithmetic, and exported like any other."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained(source)
    ids = torch.arange(40)[None]
    model, copied = load_torch(source, as_stored=True), load_torch(source)
    with torch.no_grad():
        got, expected = model(ids).logits, copied(ids).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    manifest = write_artifact(source, tmp_path / "int8", check_text=TEXT)
    assert manifest.checks.target_kl_mean is not None
    assert manifest.checks.target_kl_mean < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_kept_as_they_are(dtype: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rounded rotary frequencies, which is what saving in float16 makes of them, would give a KL divergence of 1e-5."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype)).save_pretrained(source)
    checks = write_artifact(source, out, weight_format="fp16", check_text=TEXT).checks
    assert checks.target_kl_mean is not None
    assert checks.target_kl_mean < 1e-10
    assert checks.target_argmax_agreement == 1
    elements = weight_elements(read_ir(open_artifact(out).file(TARGET_MODEL)))
    assert elements[{"bfloat16": "bf16", "float16": "f16"}[dtype]] > 100 * elements["f32"] > 0
    shutil.copytree(out / "target", tmp_path / "ir")  # such an IR is a source, too
    shutil.copyfile(source / "tokenizer.json", tmp_path / "ir" / "tokenizer.json")
    again = write_artifact(tmp_path / "ir", tmp_path / "again", check_text=TEXT)
    assert again.target.weight_format == "fp16"
    assert again.files[TARGET_WEIGHTS] == open_artifact(out).manifest.files[TARGET_WEIGHTS]


def test_compressing_shows_how_far_it_is(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: pytest.LogCaptureFixture,
) -> None:
    """nncf's bars are drawn on a terminal, and on stderr; elsewhere a line is logged that says what is done."""
    by_nncf: dict[str, Any] = {"weight_format": "int4", "int8_share": 0.5, "check_text": TEXT}
    write_artifact(tiny_checkpoint, tmp_path / "log", **by_nncf)
    written = capsys.readouterr()
    assert any(line.endswith("M weights to int4") for line in told.messages)
    assert "Weight Compression" not in written.out + written.err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    write_artifact(tiny_checkpoint, tmp_path / "terminal", **by_nncf)
    written = capsys.readouterr()
    assert "Weight Compression" in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weight_format": "int3"}, "weight format"),
        ({"group_size": 64}, "`group_size` with `weight_format` int4"),
        ({"int8_share": 0.5}, "`int8_share` with `weight_format` int4"),
        ({"calibration_text": TEXT}, "`calibration_text` with `weight_format` int4"),
        ({"weight_format": "int4", "group_size": 48}, "power of two"),
        ({"weight_format": "int4", "group_size": 256}, "divides every matrix"),
        ({"weight_format": "int4", "int8_share": 1.0}, "below 1"),
        ({"weight_format": "int4", "calibration_text": "short"}, "calibration text of at least"),
    ],
)
def test_contradictions_are_one_line(
    settings: dict[str, Any], named: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named) as raised:
        write_artifact(tiny_checkpoint, tmp_path / "out", check_text=TEXT, **settings)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
