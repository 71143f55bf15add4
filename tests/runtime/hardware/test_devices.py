"""Proves the choice of the draft's device: names, what `auto` takes and says, why CUDA can't be used in every way that
it can't, memory limits, and `dovetail doctor`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from dovetail.runtime.artifact.manifest import DRAFT_MODEL, loads
from dovetail.runtime.commands.cli import dovetail
from dovetail.runtime.drafts import loading
from dovetail.runtime.drafts.graph_contract import row_bytes
from dovetail.runtime.drafts.loading import load_draft
from dovetail.runtime.drafts.row_pool import ROWS_A_BLOCK
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.hardware import devices
from dovetail.runtime.hardware.devices import CudaDriver, Gpu, check_device, why_no_cuda

GPU = Gpu(0, "NVIDIA Quadro P2000", 5 << 30)


def load(artifact: Path, **settings: Any) -> Any:
    info = loads((artifact / "dovetail.json").read_bytes()).draft
    assert info is not None
    settings = {"device": "auto", "threads": 1, "context_length": 256, **settings}
    return load_draft(artifact / DRAFT_MODEL, info, **settings)


def pretend(monkeypatch: pytest.MonkeyPatch, *, built_for: int | None = 13000, driver: CudaDriver | None) -> None:
    monkeypatch.setattr(devices, "cuda_build_version", lambda: built_for)
    monkeypatch.setattr(devices, "cuda_driver", lambda: driver)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "openvino:CPU", "openvino:GPU.1"])
def test_names(name: str) -> None:
    check_device(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "openvino", "openvino:NPU\n", "cpu:0"]
)
def test_other_names_are_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda, cuda:INDEX, openvino:CPU or openvino:GPU, got"):
        check_device(name)


@pytest.mark.parametrize(
    ("built_for", "driver", "index", "why"),
    [
        (None, None, 0, r"built without CUDA; pip install 'dovetail\[cuda13\]'"),
        (13000, None, 0, "no NVIDIA GPU with its driver"),
        (13000, CudaDriver(13000, []), 0, "no NVIDIA GPU with its driver"),
        (13000, CudaDriver(13000, [GPU]), 1, "expected an index from 0 to 0, got 1"),
        (13000, CudaDriver(12040, [GPU]), 0, r"for CUDA 13 or newer, got one for CUDA 12.4; .*dovetail\[cuda12\]"),
        (12080, CudaDriver(11080, [GPU]), 0, r"for CUDA 12 or newer, got one for CUDA 11.8; update the driver$"),
    ],
)
def test_why_cuda_is_not_usable(
    monkeypatch: pytest.MonkeyPatch,
    tiny_artifact: Path,
    built_for: int | None,
    driver: CudaDriver | None,
    index: int,
    why: str,
) -> None:
    pretend(monkeypatch, built_for=built_for, driver=driver)
    with pytest.raises(DeviceError, match=why):
        raise DeviceError(why_no_cuda(index) or "nothing")
    with pytest.raises(DeviceError, match=f"draft_device 'cuda:{index}': "):
        load(tiny_artifact, device=f"cuda:{index}")


@pytest.mark.parametrize("driver", [CudaDriver(13000, [GPU]), CudaDriver(12080, [GPU])])
def test_an_older_minor_version_of_the_driver_will_do(monkeypatch: pytest.MonkeyPatch, driver: CudaDriver) -> None:
    pretend(monkeypatch, built_for=12080 if driver.cuda_version < 13000 else 13000, driver=driver)
    assert why_no_cuda(0) is None


def test_auto_says_what_it_chose_and_why(
    monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path, told: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, driver=None)
    assert load(tiny_artifact).device == "cpu"
    assert told.messages == ["draft: dgf on cpu (auto: no NVIDIA GPU with its driver on this machine)"]


def test_a_session_that_does_not_get_cuda_is_an_error_and_auto_goes_on(
    monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path, told: pytest.LogCaptureFixture
) -> None:
    """A driver without cuBLAS and cuDNN: ONNX Runtime gives a session on the CPU and only logs a line."""
    pretend(monkeypatch, driver=CudaDriver(13000, [GPU]))
    real = ort.InferenceSession

    def on_cpu(path: str, options: Any, providers: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", on_cpu)
    with pytest.raises(DeviceError, match="expected the session on CUDAExecutionProvider, got CPUExecutionProvider"):
        load(tiny_artifact, device="cuda")
    assert not told.messages, "nothing is said of a device that it is not on"
    assert load(tiny_artifact).device == "cpu"
    assert "expected the session on CUDAExecutionProvider" in told.messages[0]


def test_an_operator_that_the_gpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path) -> None:
    pretend(monkeypatch, driver=CudaDriver(13000, [GPU]))
    real = ort.InferenceSession

    class Pretending:
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            self._session = real(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(ort, "InferenceSession", Pretending)
    with pytest.raises(DeviceError, match=r"it lacks .*Attention.*; install a newer onnxruntime-gpu"):
        load(tiny_artifact, device="cuda")


def test_an_openvino_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path
) -> None:
    monkeypatch.setattr(loading, "openvino_devices", lambda: {"CPU": "some CPU"})
    with pytest.raises(DeviceError, match=r"expected one of OpenVINO's devices \(CPU\), got GPU"):
        load(tiny_artifact, device="openvino:GPU")


def test_a_limit_too_small_for_the_draft_is_refused_with_what_it_needs(tiny_artifact: Path) -> None:
    with pytest.raises(DeviceError, match=r"expected at least \d+ MiB .* got 10 MiB; raise it, or lower ctx_size"):
        load(tiny_artifact, memory_limit=10 << 20)
    load(tiny_artifact, memory_limit=1 << 30)


def test_a_limit_bounds_the_rows_that_texts_share(tiny_artifact: Path) -> None:
    one, four = (load(tiny_artifact, texts=texts).pool.max_blocks for texts in (1, 4))
    assert four == 4 * one
    rows = ROWS_A_BLOCK * one
    info = loads((tiny_artifact / "dovetail.json").read_bytes()).draft
    assert info is not None
    weights = (tiny_artifact / DRAFT_MODEL).stat().st_size
    limit = weights + (64 << 20) + 2 * rows * row_bytes(info)
    assert load(tiny_artifact, texts=4, memory_limit=limit).pool.max_blocks == 2 * one


def test_doctor_reports_every_part_and_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=CudaDriver(12040, [GPU]))
    done = CliRunner().invoke(dovetail, ["doctor", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout.splitlines()[-1])
    parts = {part["name"]: part for part in report["parts"]}
    assert set(parts) >= {
        "target",
        "draft cpu",
        "draft cuda",
        "draft openvino:CPU",
        "dovetail-export",
        "dovetail bench",
    }
    assert parts["target"]["usable"]
    assert parts["draft cpu"]["usable"]
    assert not parts["draft cuda"]["usable"]
    assert parts["draft cuda"]["install"] == "pip install 'dovetail[cuda12]'"
    assert {"machine", "versions", "parts"} <= set(report)
    table = CliRunner().invoke(dovetail, ["doctor"])
    assert table.exit_code == 0
    assert "pip install 'dovetail[cuda12]'" in table.stdout
