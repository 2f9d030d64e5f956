"""Hugging Face's hub: whether it can be reached, and what a repository there holds."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from featdistill.core.errors import ModelError
from featdistill.models.weights import read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_BESIDE = ("preprocessor_config.json", "processor_config.json")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_reachable(repository: str, what: str, *, fix: str) -> None:
    """Fail in seconds, not in the hub client's minute of retries, where there is no network.

    Args:
        repository: `OWNER/NAME`, perhaps with `@REVISION`.
        what: is asked for, for the message.

    Raises:
        ModelError: neither the hub nor a copy of the weights is there.
    """
    if _cached(repository) or any(os.environ.get(name) for name in _PROXIES):
        return
    from huggingface_hub import constants

    address = urlparse(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not _reachable(address.hostname or "", address.port or 443):
        raise ModelError(
            f"cannot get the weights of '{what}': {address.hostname} is out of reach and they "
            "are not in the cache",
            fix=fix,
        )


def download(repository: str) -> Path:
    """A repository's settings and weights, in a folder of the cache.

    Only `config.json`, where that is timm's: timm fetches the rest itself.

    Raises:
        Exception: of many kinds, by the hub's client.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision or None))

    folder = fetch("config.json").parent
    if "architecture" in read_json(folder / "config.json"):
        return folder
    for file in _BESIDE:
        try:
            fetch(file)
            break
        except (EntryNotFoundError, LocalEntryNotFoundError):
            continue
    try:
        fetch(WEIGHTS[0])
    except (EntryNotFoundError, LocalEntryNotFoundError):
        fetch(WEIGHTS[1])
    return folder


def _reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    return any(
        isinstance(try_to_load_from_cache(name, file, revision=revision or None), str)
        for file in WEIGHTS
    )
