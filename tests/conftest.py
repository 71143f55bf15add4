"""Models and artifacts that the tests share: tiny, random, and made by the real exporter. No downloads."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import campaign
import hypothesis
import pytest
from models.tiny_llama import write_checkpoint, write_draft

hypothesis.settings.register_profile("dovetail", deadline=None)  # a busy machine is no mistake of ours
hypothesis.settings.load_profile("dovetail")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: tests share the cores with native runtimes
# what tests fetch (real_models.py) outlives them
_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
os.environ.setdefault("DOVETAIL_TESTS_CACHE", str(Path(_home, "dovetail-tests")))
_cache = tempfile.TemporaryDirectory(prefix="dovetail-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # no host profile of the user's decides what a test sees


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="Play all of the laws' random campaigns.")
    parser.addoption("--write-tables", action="store_true", help="Write the tables of docs/ that tests make.")
    parser.addoption("--gemma", action="store_true", help="Run the tests with Gemma 3, which is fetched.")


def pytest_configure(config: pytest.Config) -> None:
    campaign.is_thorough = config.getoption("--thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs a model made by torch, which is what takes long: `make test-fast` goes without."""
    for item in items:
        if item.get_closest_marker("gemma") and not config.getoption("--gemma"):
            item.add_marker(pytest.mark.skip(reason="Gemma 3 has a licence of its own: make test-gemma fetches it"))
        if "tiny_checkpoint" in getattr(item, "fixturenames", ()):  # all others are made of it
            item.add_marker("exports")


@pytest.fixture(scope="module", autouse=True)
def no_look_at_what_stays() -> None:
    """torch and its family are a million objects, and every export has the garbage collector look at all of them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that the library logs; a command would print it on stderr."""
    caplog.set_level(logging.INFO, "dovetail")
    return caplog


@pytest.fixture
def quiet_drafts() -> Iterator[None]:
    """Drafts that fail say so; here that is no news."""
    log = logging.getLogger("dovetail")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def documented(request: pytest.FixtureRequest) -> Callable[[str, str, list[str]], None]:
    """Holds the table between the marks `name` of a page in docs/ against `rows`; with --write-tables, writes it."""

    def check(page: str, name: str, rows: list[str]) -> None:
        path = Path(__file__).resolve().parents[1] / "docs" / page
        before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
        found, after = rest.split(f"<!-- /{name} -->")
        made = "".join(f"{row}\n" for row in rows)
        if request.config.getoption("--write-tables"):
            path.write_text(f"{before}<!-- {name} -->\n{made}<!-- /{name} -->{after}", encoding="utf-8")
        else:
            assert found == made, f"docs/{page} is stale: run the whole test file with --write-tables"

    return check


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random Llama: hidden 64, 2 layers, vocabulary 512, context 512."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_draft(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft folder for `tiny_checkpoint`: random, 2 blocks."""
    return write_draft(tmp_path_factory.mktemp("tiny") / "draft", tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` and `tiny_draft` as an INT8 artifact."""
    from dovetail.export.artifact.writing import write_artifact

    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    write_artifact(tiny_checkpoint, out, draft=tiny_draft)
    return out


@pytest.fixture(scope="session")
def tiny_artifact_fp32(tiny_checkpoint: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with float32 weights: what transformers can be compared with token by token."""
    from dovetail.export.artifact.writing import write_artifact

    out = tmp_path_factory.mktemp("artifacts") / "tiny-fp32"
    write_artifact(tiny_checkpoint, out, draft=tiny_draft, weight_format="fp32")
    return out


@pytest.fixture(scope="session")
def shipped_artifact() -> Path:
    """The artifact that ships in this repository."""
    path = Path(__file__).resolve().parents[1] / "artifacts" / "pystd"
    if not path.is_dir():
        pytest.fail("artifacts/pystd is not there: make it with `dovetail-export demo -o artifacts/pystd`")
    return path
