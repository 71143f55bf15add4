"""Models by their id on the Hugging Face hub, through huggingface_hub and its cache. No code of a repository is
fetched, and no pickle unless it is asked for by name.
"""

from __future__ import annotations

import logging
from pathlib import Path

from dovetail.runtime.errors import UserError

_log = logging.getLogger(__name__)

_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TEMPLATES = "additional_chat_templates/*.jinja"
_SAFE = ("*.safetensors", "*.safetensors.index.json")
_IR = ("openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.*", "openvino_detokenizer.*")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def download(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """The folder in huggingface_hub's cache that holds `repository`, fetched as far as it is not there yet.

    Settings, safetensors and OpenVINO files only; pickled weights with `allow_pickle`. Raises `UserError` when the id
    or the revision is unknown, access is not granted, or the hub is out of reach and the cache lacks it.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"expected huggingface_hub to fetch {repository}, got none installed; pip install 'dovetail[export]', or "
            f"give a folder"
        ) from None
    wanted = f"{repository} at {revision}" if revision else repository
    patterns = [*_SETTINGS, *_SAFE, *_IR, *(_PICKLED if allow_pickle else ())]
    below = [f"*/{pattern}" for pattern in patterns]  # a pattern's star stands for folders, too
    _log.info(f"hub: {wanted}")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[*patterns, _TEMPLATES], ignore_patterns=below
            )
        )
    except errors.GatedRepoError:
        raise UserError(
            f"expected access to {repository}, got a gated repository; accept its licence there and log in (hf auth "
            f"login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"expected a revision of {repository}, got {revision!r}, unknown there; check it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"expected a model on the hub, got {repository}, unknown there; check the id, or log in"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"expected {wanted} from the hub or its cache, got neither (offline?); download it where there is a "
            f"network, and give the folder"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected {wanted} from the hub, got: {reason[:200]}; try again, or give a folder") from None
