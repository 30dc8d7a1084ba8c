"""Pretrained weights, and files of the Hugging Face hub. Files in a cache of this machine are used without a network. For
others the host is asked first: if it does not answer, that takes seconds, not the minute of a library's retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from reslt.core.errors import UserError

PATIENCE_SECONDS = 5  # for the first answer of a host, including the time to find it and to connect
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a repository or a folder, the first that exists
SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
INSTEAD = (
    "download it where there is a network, and give it with --pretrained-file FILE; --no-pretrained starts from random "
    "weights, which takes many more epochs and, with few photos, remains far less accurate"
)


def weights_of(model: str) -> dict[str, object]:
    """Return the changes to timm's description of a model's pretrained weights by which timm reads them from a file on this
    machine. The file is fetched if no cache contains it.

    Raises UserError if there are no such weights, or if they cannot be fetched: after at most about PATIENCE_SECONDS if
    their host does not answer."""
    cfg, subject = timm.get_pretrained_cfg(model), f"--pretrained: the weights of {model}"
    if cfg is None or cfg.file or cfg.state_dict:  # from a user's own module
        return {}
    if cfg.hf_hub_id:
        named = cfg.hf_hub_filename or WEIGHTS[1]
        names = [SAFE_NAMES.get(named, named.removesuffix(".bin") + ".safetensors"), named]
        if cfg.custom_load == "hf":  # the model reads exactly this file itself
            names = [named]
        file = hub_file(cfg.hf_hub_id, list(dict.fromkeys(names)), subject, INSTEAD)
        return {"file": str(file), "custom_load": cfg.custom_load == "hf"}
    if cfg.url:
        return {"file": str(_url_file(cfg.url, subject))}
    raise UserError(
        f"--pretrained: timm has no pretrained weights for {model}; give a file of weights with --pretrained-file FILE, "
        "or start without weights: --no-pretrained"
    )


def hub_file(repository: str, names: Sequence[str], subject: str, remedy: str) -> Path:
    """Return the first of these files in a repository of the hub, ORG/NAME or ORG/NAME@REVISION. A file in the hub's cache
    is preferred, and returned without asking the hub.

    Raises UserError, which names `subject`, the file, the reason and `remedy`."""
    repository, _, revision = repository.partition("@")
    where = {"repo_id": repository, "revision": revision or None}
    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(filename=name, **where), str):
                return Path(cached)
    except HFValidationError:
        raise UserError(
            f"{subject}: {repository!r} is not the name of a repository of the hub; give ORG/NAME, as on its page"
        ) from None
    url = ""
    for name in names:
        url = hf_hub_url(filename=name, **where)
        try:
            if constants.HF_HUB_OFFLINE:
                raise ConnectionError("HF_HUB_OFFLINE is set")
            _answered(lambda url=url: get_hf_file_metadata(url, timeout=PATIENCE_SECONDS))
            return Path(hf_hub_download(filename=name, **where))
        except Exception as fault:  # the hub's client raises errors of several libraries
            if isinstance(fault, EntryNotFoundError) and not isinstance(fault, LocalEntryNotFoundError):
                continue
            raise _unavailable(subject, url, fault, remedy) from None
    missing = f"the repository has none of {', '.join(names)}" if len(names) > 1 else "there is no such file"
    raise UserError(f"{subject}: {url}: {missing}; {remedy}")


def _url_file(url: str, subject: str) -> Path:
    """Return the file of a URL in torch's cache, which timm uses too. Raises UserError if it cannot be fetched."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not file.exists():
        try:
            _answered(lambda: urlopen(Request(url, method="HEAD"), timeout=PATIENCE_SECONDS).close())
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except Exception as fault:
            raise _unavailable(subject, url, fault, INSTEAD) from None
    return file


def _answered(ask: Callable[[], object]) -> None:
    """Ask a host for a file. Raise the error of asking, or TimeoutError. Unlike the timeouts of sockets, the limit includes
    finding a host by its name, and trying one address after another."""
    raised = []

    def asked() -> None:
        try:
            ask()
        except Exception as fault:
            raised.append(fault)

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS + 0.5)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {PATIENCE_SECONDS} s")
    if raised:
        raise raised[0]


def _unavailable(subject: str, url: str, fault: Exception, remedy: str) -> UserError:
    """Return the error for a file that is in no cache and cannot be fetched."""
    reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    if isinstance(fault, HfHubHTTPError) and fault.response is not None:
        reason = f"HTTP {fault.response.status_code}, {type(fault).__name__}"
    return UserError(f"{subject}: {url} is in no cache of this machine and cannot be fetched ({reason}); {remedy}")
