"""The host profile: what `dovetail calibrate` measured on this machine with one artifact, and what it chose.

It is no part of the artifact. It lies in the user's cache folder under the artifact's digest and the machine's
fingerprint, or where `--profile` says. Calibration writes it; the runtime reads it, strictly, and never measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import NoReturn, get_args

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError, ProfileError, UserError
from dovetail.runtime.hardware.machine import Machine, this_machine
from dovetail.runtime.policies.base import Policy, PolicyKind
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.trees.shape import TreeShape

# 5: chat models went on with source code; 4: passes of all sizes mixed, trees under masks;
# 3: prices of one text alone; 2: chosen without matches in the text;
# 1: sampled texts were drafted without foresight
PROFILE_VERSION = 6
_MAX_BYTES = 1 << 20
_POLICIES = get_args(PolicyKind)
_REMEDY = "run dovetail calibrate again"
_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def _refuse(expected: str, got: object) -> NoReturn:
    raise ProfileError(f"profile: expected {expected}, got {strict_json.shown(got)}; {_REMEDY}")


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        _refuse(expected, got)


@dataclasses.dataclass(frozen=True, slots=True)
class Engines:
    """How the pair is run: costs are true for this only."""

    draft_device: str
    numerics: str
    acceptance: str
    threads: int  # of the target
    draft_threads: int

    def __post_init__(self) -> None:
        for name in ("threads", "draft_threads"):
            _require(1 <= getattr(self, name) <= 4096, f"{name} from 1 to 4096", getattr(self, name))


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for texts sampled at `temperature`, and why. Speeds in tokens per second."""

    temperature: float
    kind: str  # see `Policy`
    tree: TreeShape
    chances: Chances
    accept_length: float  # foretold
    predicted: float
    measured: float | None
    plain_predicted: float
    plain_measured: float | None
    break_even_accept_length: float

    def __post_init__(self) -> None:
        _require(self.kind in _POLICIES, f"kind as one of {', '.join(_POLICIES)}", self.kind)
        _require(0 <= self.temperature <= 100, "temperature from 0 to 100", self.temperature)
        for name in ("predicted", "plain_predicted"):
            _require(0 < getattr(self, name) < 1e9, f"{name} as a speed", getattr(self, name))
        tables = [self.chances.by_score, *self.chances.by_rank]
        _require(len(tables) > 1 and all(tables), "chances by score and by rank", [len(table) for table in tables])
        _require(all(0 <= p <= 1 for table in tables for p in table), "chances from 0 to 1", tables[0][:4])
        falling = self.chances.by_score
        _require(list(falling) == sorted(falling, reverse=True), "chances that fall with the score", falling[:4])

    @property
    def summary(self) -> str:
        """A few words."""
        tree = f"width {self.tree.width}"
        if self.kind == "fixed":
            tree = f"{self.tree.nodes} nodes, depth {self.tree.depth}, {tree}"
        return f"at temperature {self.temperature:g} {self.kind}" + (f" ({tree})" if self.drafts else "")

    @property
    def policy(self) -> Policy:
        """What texts get by it."""
        kind: PolicyKind = self.kind  # type: ignore[assignment]  # checked when it was made
        return Policy(kind, self.tree, self.chances, self.predicted / self.plain_predicted)

    @property
    def drafts(self) -> bool:
        """Whether the artifact's draft is of use."""
        return self.kind in ("fixed", "adaptive")


@dataclasses.dataclass(frozen=True, slots=True)
class HostProfile:
    """One machine, one artifact, one way to run it."""

    profile_version: int
    artifact: str  # digest
    machine: Machine
    engines: Engines
    created: str  # date
    text: str  # what acceptance was recorded on, in words
    error: float  # of the measured times, relative, typical
    costs: Costs
    choices: tuple[Choice, ...]  # by ascending temperature

    def __post_init__(self) -> None:
        _require(self.profile_version == PROFILE_VERSION, f"profile_version {PROFILE_VERSION}", self.profile_version)
        _require(_SHA256.match(self.artifact) is not None, "an artifact's digest", self.artifact)
        temperatures = [choice.temperature for choice in self.choices]
        engines, machine = self.engines, self.machine
        texts = (
            self.created,
            self.text,
            engines.draft_device,
            engines.numerics,
            engines.acceptance,
            machine.cpu,
            machine.gpu,
        )
        for text in (*texts, *machine.versions, *machine.versions.values()):
            _require(text.isprintable(), "texts that print", text)
        good = temperatures and temperatures == sorted(set(temperatures))
        _require(bool(good), "choices by ascending temperature", temperatures)

    def choice(self, temperature: float) -> Choice:
        """The one made at the nearest temperature."""
        return min(self.choices, key=lambda choice: abs(choice.temperature - temperature))

    @property
    def drafts(self) -> bool:
        """Whether the artifact's draft is of use at any temperature."""
        return any(choice.drafts for choice in self.choices)

    @property
    def looks_up(self) -> bool:
        """Whether matches in the text are taken at any temperature."""
        return any(choice.kind != "plain" for choice in self.choices)

    @property
    def summary(self) -> str:
        """One line: how the pair is run, and what was chosen."""
        engines = self.engines
        chosen = "; ".join(choice.summary for choice in self.choices)
        how = f"draft on {engines.draft_device}, {engines.numerics}, {engines.acceptance}, {engines.threads} threads"
        return f"{chosen} ({how}, {self.created}, by {self.text})"

    def check(self, artifact: str, machine: Machine, engines: Engines) -> None:
        """Raises `ProfileError` unless it was made for exactly these."""
        if self.artifact != artifact:
            raise ProfileError(
                f"profile: expected one of the artifact {artifact[:12]}…, got one of {self.artifact[:12]}…; {_REMEDY}"
            )
        found = [*machine.differences(self.machine), *_differences(engines, self.engines)]
        if found:
            raise ProfileError(
                f"profile: expected one of this machine and these settings, got another's ({'; '.join(found):.300}); "
                f"{_REMEDY}"
            )


def _differences(ours: Engines, theirs: Engines) -> list[str]:
    names = [field.name for field in dataclasses.fields(ours)]
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [f"{name}: {a}, {b}" for name, a, b in pairs if a != b]


def dumps(profile: HostProfile) -> str:
    """The profile as the text that is stored; `loads` reads it back equal."""
    return json.dumps(dataclasses.asdict(profile), indent=1, allow_nan=False) + "\n"


def loads(data: bytes, what: str = "profile") -> HostProfile:
    """Read a profile strictly. Raises `ProfileError` naming the field."""
    try:
        document = strict_json.parse(data, what, _MAX_BYTES, _REMEDY)
        version = document.get("profile_version") if isinstance(document, dict) else None
        if type(version) is int and version > PROFILE_VERSION:
            raise ProfileError(f"{what}: expected profile_version {PROFILE_VERSION}, got {version}; upgrade dovetail")
        return strict_json.decode(HostProfile, document, "profile", _refuse)
    except ProfileError:
        raise
    except (ArtifactError, UserError) as error:
        text = str(error)
        raise ProfileError(text if text.endswith(_REMEDY) else f"{what}: {text}; {_REMEDY}") from None


def read(path: Path) -> HostProfile:
    """The profile at `path`. Raises `ProfileError`."""
    try:
        with open(path, "rb") as file:
            return loads(file.read(_MAX_BYTES + 1), str(path))
    except OSError as error:
        raise ProfileError(
            f"profile {str(path)!r}: expected a readable file, got {error.strerror}; check the path or {_REMEDY}"
        ) from None


def write(profile: HostProfile, path: Path) -> None:
    """Write it beside `path` and rename: a reader sees the old one or the new one. Raises `OSError`."""
    strict_json.write(path, dumps(profile))


def cache_path(artifact: str, machine: Machine, draft_device: str, numerics: str, acceptance: str) -> Path:
    """Where the profile for these lies in the user's cache folder."""
    key = hashlib.sha256(f"{machine.fingerprint} {draft_device} {numerics} {acceptance}".encode()).hexdigest()
    return _folder() / f"{artifact[:16]}-{key[:16]}.json"


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("dovetail") / "profiles"


def profile_for(
    artifact: str,
    given: str | os.PathLike[str] | None,
    draft_device: str,
    numerics: str,
    acceptance: str,
    threads: int | None,
) -> HostProfile | None:
    """The profile to run `artifact` by, `threads` as the user wants them: the file `given`, `auto` for the cached one,
    None for none. The log says what it holds. Raises `ProfileError` when the file is not for this.
    """
    if given is None:
        return None
    from dovetail.runtime.hardware.devices import likely_device

    machine, device = this_machine(), likely_device(draft_device)
    if given == "auto":
        found = find(artifact, machine, device, numerics, acceptance)
        if found is not None and threads not in (None, found.engines.threads):
            _log.info("profile: not used, it was made with %d threads; run dovetail calibrate", found.engines.threads)
            return None
    else:
        found = read(Path(given))
        theirs = found.engines
        ours = Engines(device, numerics, acceptance, threads or theirs.threads, theirs.draft_threads)
        found.check(artifact, machine, ours)
    if found is not None:
        _log.info("profile: %s", found.summary)
    return found


def profiles_of(artifact: str) -> list[HostProfile]:
    """All cached profiles of `artifact` for this machine, however it is run."""
    machine, found = this_machine(), []
    for path in sorted(_folder().glob(f"{artifact[:16]}-*.json")):
        try:
            one = read(path)
            engines = one.engines
            if path == cache_path(artifact, machine, engines.draft_device, engines.numerics, engines.acceptance):
                one.check(artifact, machine, one.engines)
                found.append(one)
        except ProfileError as error:
            _log.warning("%s is ignored: %s", path, error)
    return found


def find(artifact: str, machine: Machine, draft_device: str, numerics: str, acceptance: str) -> HostProfile | None:
    """The cached profile for these, or None. A damaged or misplaced one is ignored, and the log says so."""
    path = cache_path(artifact, machine, draft_device, numerics, acceptance)
    if not path.is_file():
        return None
    try:
        found = read(path)
        its = found.engines
        found.check(artifact, machine, Engines(draft_device, numerics, acceptance, its.threads, its.draft_threads))
    except ProfileError as error:
        _log.warning("%s is ignored: %s", path, error)
        return None
    return found
