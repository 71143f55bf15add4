"""The one small exception tree. `UserError` is the caller's mistake (exit 2); anything else is ours (exit 1)."""


class UserError(Exception):
    """Something the user can mend. The message states, in one line, what was expected, found, and the remedy."""


class ArtifactError(UserError):
    """The artifact is missing, damaged, of a newer format, or not what its manifest says."""


class ContextOverflowError(UserError):
    """The prompt, or prompt plus answer, does not fit the context."""


class DeviceError(UserError):
    """The device that was asked for cannot be used on this machine."""


class ProfileError(UserError):
    """The host profile is damaged, or of another machine or artifact."""


class DrawError(Exception):
    """No token can be drawn from a row of logits. Nothing is emitted from it."""


class NothingAllowedError(DrawError, UserError):
    """The controls exclude the whole vocabulary."""


class TargetError(DrawError):
    """The target produced no usable numbers."""


class DraftError(Exception):
    """The draft produced no usable numbers. The text goes on without it."""


class PassAbandonedError(Exception):
    """Nobody waited for the pass any more; it is as if it had not begun."""


class CacheFullError(Exception):
    """The cache has no room now. Nobody's mistake: the text waits until others have ended."""
