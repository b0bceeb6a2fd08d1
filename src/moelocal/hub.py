"""From the name of a model to a folder on this machine. The only module that may use the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, cast

from moelocal.errors import ModelNotFound

EMBEDDED: Final = Path(__file__).parent / "embedded"
"""The small demonstration model that ships with the package."""

_FILES: Final = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
_REPOSITORY: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve(
    model: str | Path | None, *, revision: str | None = None, offline: bool = False, progress: bool = True
) -> Path:
    """The folder of a model: the embedded one for None, an existing folder as it is, or a Hugging Face repository,
    downloaded into the Hugging Face cache (its environment variables hold) unless it is there.

    `offline`: use what the cache has, open no connection. Raises `ModelNotFound`.
    """
    if model is None:
        return EMBEDDED
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or not _REPOSITORY.fullmatch(model):
        raise ModelNotFound(
            f"{model}: no such folder; a model is a folder or a Hugging Face name like owner/name"
        )
    return _download(model, revision, offline, progress)


def _download(name: str, revision: str | None, offline: bool, progress: bool) -> Path:
    # imported here: it costs a tenth of a second that runs with local weights need not pay
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # huggingface_hub 1 is built on httpx, 2 on httpx2: the base of their errors is reached through its own
    http_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])

    was_disabled = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    where = f"{name}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_FILES, local_files_only=offline
            )
        )
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{where}: access must be granted first: accept the terms at https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(f"{where}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"{where}: no such folder and no such public repository on Hugging Face; "
            "for a private one, log in with `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ModelNotFound(
            f"{where}: not in the local cache, "
            + ("and offline was asked for" if offline else "and huggingface.co cannot be reached")
        ) from None
    except (errors.HfHubHTTPError, http_error, OSError, ValueError) as error:
        raise ModelNotFound(f"{where}: download failed: {error}") from None
    finally:
        if not progress and not was_disabled:
            enable_progress_bars()
