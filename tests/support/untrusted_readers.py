"""Every reader of bytes that nobody vouches for, as a function of bytes, with what must hold of what it takes.

tests/laws/test_corpus.py judges them by inputs that are kept, tests/tools/fuzz_readers.py by as many as there is time
for.
"""

from __future__ import annotations

from collections.abc import Mapping

import chat_readers
import export_readers
import settings_readers
from judged_readers import Reader, judged, kept, packed

__all__ = ["READERS", "judged", "kept", "packed"]

READERS: Mapping[str, Reader] = {**settings_readers.READERS, **chat_readers.READERS, **export_readers.READERS}
