"""Upload of a folder as a model repository of the Hugging Face hub: `python -m reslt.export ... --push-to-hub NAME`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, get_token

from reslt.core.errors import UserError

T = TypeVar("T")
NOT_A_NAME = "not the name of a repository; give USER/NAME, of letters, digits, -, _ and ."
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def require_pushable(name: str, overwrite: bool) -> None:
    """Raise UserError if a repository cannot be written: there is no valid token or no connection, or the repository exists
    and `overwrite` is not set. Creates nothing."""
    if name.count("/") != 1:
        raise UserError(f"--push-to-hub {name}: {NOT_A_NAME}")
    if not get_token():
        raise UserError(f"--push-to-hub {name}: there is no token; {LOG_IN}")
    _asked(name, lambda api: api.whoami())
    if _asked(name, lambda api: api.repo_exists(name)) and not overwrite:
        raise UserError(
            f"--push-to-hub {name}: this repository exists; give another name, or --overwrite to add a commit to it"
        )


def push(folder: Path, name: str, private: bool) -> str:
    """Create a repository unless it exists, and upload the files of a folder in one commit. Return its address. Raises
    UserError."""

    def upload(api: HfApi) -> str:
        created = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Export of a trained run")
        return str(created)

    return _asked(name, upload)


def _asked(name: str, ask: Callable[[HfApi], T]) -> T:
    """Return the answer of the hub. Raises UserError, in one line, for every error of the request."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="reslt")
    place = f"--push-to-hub {name}"
    try:
        if not sys.stderr.isatty():
            disable_progress_bars()
        return ask(api)
    except HFValidationError:
        raise UserError(f"{place}: {NOT_A_NAME}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{place}: HF_HUB_OFFLINE is set; unset it, or drop the flag") from None
    except HfHubHTTPError as fault:
        status = fault.response.status_code if fault.response is not None else None
        answer = " ".join((fault.server_message or str(fault)).split())[:200]
        remedy = (
            LOG_IN if status in (401, 403) else "try again later" if status and status >= 500 else "see its message"
        )
        raise UserError(f"{place}: {api.endpoint} answers {status}: {answer}; {remedy}") from None
    except HfHubHTTPError.__bases__ as fault:  # errors of the library of requests, which depends on the version
        if getattr(fault, "filename", None):
            raise  # an error of a local file
        reason = " ".join(str(fault).split())[:200] or type(fault).__name__
        raise UserError(
            f"{place}: {api.endpoint} cannot be reached ({reason}); check the network, or HF_ENDPOINT"
        ) from None
    except (ValueError, RuntimeError) as fault:  # unexpected answers, failing storage
        raise UserError(f"{place}: {api.endpoint}: {' '.join(str(fault).split())[:200]}; try again later") from None
