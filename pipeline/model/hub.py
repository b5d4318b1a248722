"""Repositories of the Hugging Face hub, as folders of its cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from passes.errors import UserError, whole_message

Progress = Callable[[str], None]

OTHERWISE = "or set model.weights=random (needs no network), or model=local model.path=DIR"


def snapshot(
    source: str,
    revision: str | None,
    patterns: list[str],
    progress: Progress,
    fetch: bool,
    otherwise: str = OTHERWISE,
) -> Path:
    """``snapshot_download`` of the top folder; offline it answers at once, with what is in the hub's cache or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        """Hands the hub's byte count to ``progress`` instead of drawing on the terminal."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total:
                progress(f"fetching {source}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB")

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # other formats of the same weights live in subfolders
                etag_timeout=5,
                local_files_only=not fetch,
                tqdm_class=Bar,
            )
        )
    except GatedRepoError:
        what = "is gated; accept its licence on its page, then run `hf auth login`"
    except RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {source} has no such revision") from None
    except RepositoryNotFoundError:
        what = "does not exist or is private; check the name or run `hf auth login`"
    except HFValidationError:
        what = "is not the name of a repository (OWNER/NAME)"
    except (LocalEntryNotFoundError, HTTPError) as error:
        what = f"cannot be reached and is not in the cache ({whole_message(error.__cause__ or error)[:120]}); connect"
    raise UserError(f"model.source={source}: {what}, {otherwise}")
