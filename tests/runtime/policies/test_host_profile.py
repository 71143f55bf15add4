"""Proves that a profile is read back as it was written, that no damaged or foreign one is ever used, and that the
runtime picks up the right one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ProfileError, UserError
from dovetail.runtime.hardware.machine import Machine, this_machine
from dovetail.runtime.hardware.threads import default_threads
from dovetail.runtime.policies import host_profile as profile
from dovetail.runtime.policies.base import PLAIN_TREE, Policy
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.policies.host_profile import Choice, Engines, HostProfile
from dovetail.runtime.trees.shape import TreeShape

COSTS = Costs(
    contexts=(64, 256),
    nodes=(1, 2, 8, 16),
    widths=(1, 4),
    plain_ms=(10.0, 11.0),
    verify_ms=((10.0, 10.0, 11.0, 20.0), (11.0, 11.0, 12.0, 22.0)),
    first_ms=(1.0, 1.0),
    level_ms=((0.5, 0.6), (0.5, 0.6)),
    text_ms=(0.2, 0.3),
    host_ms=0.1,
    host_level_ms=0.05,
    host_node_ms=0.0,
)
CHANCES = Chances((0.9, 0.5, 0.1), ((0.6, 0.2), (0.5, 0.2)))


def choice(temperature: float, kind: str) -> Choice:
    tree = PLAIN_TREE if kind in ("plain", "lookup") else TreeShape(8, 3, 2)
    return Choice(temperature, kind, tree, CHANCES, 1.5, 150.0, 148.0, 90.0, None, 0.4)


def made(digest: str = "a" * 64, *, greedy: str = "adaptive", sampled: str = "plain", **changes: Any) -> HostProfile:
    engines = Engines("cpu", "fast", "confirmed", default_threads(), default_threads())
    choices = (choice(0.0, greedy), choice(1.0, sampled))
    whole = HostProfile(
        profile.PROFILE_VERSION, digest, this_machine(), engines, "2026-01-31", "12 talks", 0.02, COSTS, choices
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    profile.write(made(), path)
    assert profile.read(path) == made()
    profile.write(made("b" * 64), path)
    assert profile.read(path).artifact == "b" * 64
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"], "nothing temporary is left"


def test_each_temperature_has_its_policy() -> None:
    found = made(greedy="adaptive", sampled="fixed")
    assert (
        found.choice(0.0).policy
        == found.choice(0.4).policy
        == Policy("adaptive", TreeShape(8, 3, 2), CHANCES, 150 / 90)
    )
    assert (
        found.choice(0.8).policy == found.choice(3.0).policy == Policy("fixed", TreeShape(8, 3, 2), CHANCES, 150 / 90)
    )
    assert made(sampled="lookup").choice(1.0).policy.tree == PLAIN_TREE
    assert [made(sampled=kind).choice(1.0).policy.kind for kind in ("lookup", "plain")] == ["lookup", "plain"]
    assert [made(sampled=kind).choice(1.0).policy.most_nodes for kind in ("lookup", "plain")] == [23, 0]


def test_a_summary_names_what_was_chosen() -> None:
    summary = made(greedy="adaptive", sampled="fixed").summary
    assert summary.startswith(
        "at temperature 0 adaptive (width 2); at temperature 1 fixed (8 nodes, depth 3, width 2) (draft on cpu, fast, "
    )
    assert summary.endswith(", 2026-01-31, by 12 talks)")
    assert made(greedy="lookup").summary.startswith("at temperature 0 lookup; at temperature 1 plain (")


def test_what_a_profile_needs() -> None:
    assert (made().drafts, made().looks_up) == (True, True)
    assert (made(greedy="lookup").drafts, made(greedy="lookup").looks_up) == (False, True)
    assert (made(greedy="plain").drafts, made(greedy="plain").looks_up) == (False, False)


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(profile.dumps(made()))
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        profile.dumps(made()).encode()[:-200],
        b" " * (2 << 20),
        damaged(lambda d: d.update(profile_version=1)),
        damaged(lambda d: d.update(profile_version=3)),
        damaged(lambda d: d.update(extra=1)),
        damaged(lambda d: d.pop("engines")),
        damaged(lambda d: d.update(artifact="short")),
        damaged(lambda d: d["engines"].update(threads=0)),
        damaged(lambda d: d["engines"].update(threads=True)),
        damaged(lambda d: d["costs"].update(plain_ms=[1.0])),
        damaged(lambda d: d["costs"].update(plain_ms=[-1.0, 1.0])),
        damaged(lambda d: d["costs"].update(nodes="1,2")),
        damaged(lambda d: d["costs"]["verify_ms"][0].pop()),
        damaged(lambda d: d["costs"].pop("text_ms")),
        damaged(lambda d: d["costs"].update(text_ms=[0.1])),
        damaged(lambda d: d["costs"].update(text_ms=[0.1, -0.1])),
        damaged(lambda d: d.update(choices=[])),
        damaged(lambda d: d["choices"].reverse()),
        damaged(lambda d: d["choices"][0].update(kind="magic")),
        damaged(lambda d: d["choices"][0].update(kind="dynamic")),
        damaged(lambda d: d["choices"][0].update(kind="static")),
        damaged(lambda d: d["choices"][0].update(predicted=0)),
        damaged(lambda d: d["choices"][0]["tree"].update(nodes=4096)),
        damaged(lambda d: d["choices"][0]["chances"].update(by_score=[])),
        damaged(lambda d: d["choices"][0]["chances"].update(by_score=[0.1, 0.5])),
        damaged(lambda d: d["choices"][0]["chances"]["by_rank"][0].append(1.5)),
    ],
)
def test_a_damaged_one_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="expected") as caught:
        profile.read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_another_machines_or_artifacts_is_refused() -> None:
    here, engines = this_machine(), made().engines
    made().check("a" * 64, here, engines)
    with pytest.raises(ProfileError, match="artifact"):
        made().check("b" * 64, here, engines)
    other = dataclasses.replace(here, cpu="Another CPU")
    with pytest.raises(ProfileError, match=r"cpu: .*Another CPU"):
        made(machine=other).check("a" * 64, here, engines)
    with pytest.raises(ProfileError, match="versions"):
        made(machine=dataclasses.replace(here, versions={"openvino": "1"})).check("a" * 64, here, engines)
    with pytest.raises(ProfileError, match="threads: 1, "):
        made().check("a" * 64, here, dataclasses.replace(engines, threads=1, draft_threads=99))


def test_the_fingerprint_changes_with_every_part() -> None:
    here = this_machine()
    others = [
        dataclasses.replace(here, **{field: value})
        for field, value in {"cpu": "x", "cpus": 999, "cores": 999, "gpu": "x", "versions": {}}.items()
    ]
    assert len({one.fingerprint for one in [here, *others]}) == 6
    assert this_machine().fingerprint == here.fingerprint
    assert Machine(**dataclasses.asdict(here)).fingerprint == here.fingerprint


def keep(found: HostProfile) -> Path:
    engines = found.engines
    key = engines.draft_device, engines.numerics, engines.acceptance
    path = profile.cache_path(found.artifact, found.machine, *key)
    profile.write(found, path)
    return path


def test_one_of_a_newer_version_asks_for_a_newer_program() -> None:
    data = damaged(lambda d: d.update(profile_version=profile.PROFILE_VERSION + 1))
    with pytest.raises(ProfileError, match="upgrade dovetail"):
        profile.loads(data)


def test_the_cached_one_is_found_and_a_damaged_one_ignored(cache: Path, told: pytest.LogCaptureFixture) -> None:
    def found(draft_device: str = "cpu", numerics: str = "fast", acceptance: str = "confirmed") -> HostProfile | None:
        return profile.find("a" * 64, this_machine(), draft_device, numerics, acceptance)

    assert found() is None
    path = keep(made())
    assert path.is_relative_to(cache)
    assert found() == made()
    assert found(numerics="exact") is None
    assert found("cuda:0") is None
    assert found(acceptance="relaxed") is None
    assert profile.profiles_of("a" * 64) == [made()]
    assert not told.records
    path.write_text(path.read_text()[:-40])
    assert found() is None
    assert profile.profiles_of("a" * 64) == []
    assert len(told.messages) == 2
    assert all("is ignored" in line and "\n" not in line for line in told.messages)
    profile.write(made("b" * 64), path)  # a file under another's name
    assert found() is None
    assert len(told.messages) == 3


def test_the_runtime_picks_it_up(cache: Path, tiny_artifact: Path, told: pytest.LogCaptureFixture) -> None:
    digest = open_artifact(tiny_artifact).digest
    with load(tiny_artifact) as pipe:
        assert pipe.profile is None
        expected = pipe.generate("def main(", max_new_tokens=12, ignore_eos=True).token_ids
    assert not any("profile" in line for line in told.messages)
    keep(made(digest))
    with load(tiny_artifact) as pipe:
        assert pipe.profile == made(digest)
        assert pipe.policy(0.0) == made(digest).choice(0.0).policy
        assert pipe.policy(1.0).kind == "plain"
        assert pipe.generate("def main(", max_new_tokens=12, ignore_eos=True, temperature=1.0).drafted_tokens == 0
        assert len(pipe.generate("def main(", max_new_tokens=12, ignore_eos=True).token_ids) == len(expected)
    assert sum(line.startswith("profile: at temperature 0 adaptive") for line in told.messages) == 1
    with load(tiny_artifact, tree=TreeShape(4, 2, 2)) as pipe:
        assert pipe.profile is None
    with load(tiny_artifact, profile=None) as pipe:
        assert pipe.profile is None
    with load(tiny_artifact, draft="none") as pipe:
        assert pipe.profile is None


def test_where_the_draft_never_pays_it_is_not_loaded(
    cache: Path, tiny_artifact: Path, told: pytest.LogCaptureFixture
) -> None:
    keep(made(open_artifact(tiny_artifact).digest, greedy="plain"))
    with load(tiny_artifact) as pipe:
        assert pipe.draft is None
        assert pipe.generate("x", max_new_tokens=4, ignore_eos=True).drafted_tokens == 0
    assert "draft: none, plain decoding is faster here (dovetail calibrate)" in told.messages


def test_where_matches_alone_pay_only_they_are_taken(
    cache: Path, tiny_artifact: Path, told: pytest.LogCaptureFixture
) -> None:
    keep(made(open_artifact(tiny_artifact).digest, greedy="lookup"))
    repeated = {"max_new_tokens": 40, "ignore_eos": True, "logit_bias": {7: 100.0}}
    with load(tiny_artifact) as pipe:
        assert (pipe.draft, pipe.draft_kind) == (None, "lookup")
        assert pipe.generate([7, 7, 7, 7], temperature=0.0, **repeated).drafted_tokens > 0
        assert pipe.generate([7, 7, 7, 7], temperature=1.0, **repeated).drafted_tokens == 0
    assert any(line.startswith("draft: lookup, matches in the text") for line in told.messages)
    with load(tiny_artifact, draft="artifact") as pipe:  # the same profile, which says that this draft is of no use
        assert (pipe.draft, pipe.draft_kind) == (None, "none")
        assert pipe.generate([7, 7, 7, 7], temperature=0.0, **repeated).drafted_tokens == 0


def test_a_given_file_must_be_for_this(cache: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    digest = open_artifact(tiny_artifact).digest
    profile.write(made(digest), path)
    with load(tiny_artifact, profile=path) as pipe:
        assert pipe.profile == made(digest)
    for wrong in (made("b" * 64), made(digest, machine=dataclasses.replace(this_machine(), cpu="x"))):
        profile.write(wrong, path)
        with pytest.raises(ProfileError, match="expected one of"):
            load(tiny_artifact, profile=path)
    profile.write(made(digest), path)
    with pytest.raises(ProfileError, match="numerics"):
        load(tiny_artifact, profile=path, numerics="exact")
    with pytest.raises(ProfileError, match="threads"):
        load(tiny_artifact, profile=path, threads=default_threads() + 1)
    with pytest.raises(UserError, match="drop the profile"):
        load(tiny_artifact, profile=path, tree=TreeShape(4, 2, 2))
    with pytest.raises(ProfileError, match="expected a readable file"):
        load(tiny_artifact, profile=tmp_path / "nothing.json")


def test_other_threads_than_the_cached_profiles_do_without_it(
    cache: Path, tiny_artifact: Path, told: pytest.LogCaptureFixture
) -> None:
    keep(made(open_artifact(tiny_artifact).digest))
    with load(tiny_artifact, threads=default_threads() + 1) as pipe:
        assert pipe.profile is None
    assert sum(line.startswith("profile: not used") for line in told.messages) == 1


def test_a_place_that_can_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        profile.write(made(), tmp_path / "file" / "profile.json")
