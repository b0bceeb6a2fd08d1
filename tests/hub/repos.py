"""Small repositories, and a machine's view of the loopback server: what tests of downloads share."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from hub.server import Repo, Server
from moelocal import hub

NAME = "owner/name"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    hub.INDEX,
    *SHARDS,
]


@cache
def shard(tensor: str, nbytes: int, seed: int) -> bytes:
    """A safetensors file with one tensor of `nbytes` random bytes."""
    head = json.dumps({tensor: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(head)) + head + np.random.default_rng(seed).bytes(nbytes)


def small_repo(nbytes: int = 300_000, **more: object) -> Repo:
    """A repository with three shards, the files beside them, and files that nobody should ask for."""
    shards = {name: shard(f"tensor.{i}", nbytes + i, i) for i, name in enumerate(SHARDS)}
    index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(SHARDS)}}
    junk = (
        "README.md .gitattributes pytorch_model.bin model.gguf onnx/model.onnx original/params.json .hidden.json "
        "consolidated.safetensors adapter.safetensors sub/model.safetensors training.pth merges.txt"
    )
    files = dict.fromkeys(junk.split(), b"junk") | {
        "config.json": b"{}",
        "generation_config.json": b"",
        "tokenizer.json": b'{"a": "\xc3\xa9"}' * 100,
        "chat_template.jinja": b"{{ messages }}",
        hub.INDEX: json.dumps(index).encode(),
        **shards,
    }
    return Repo(files, **more)  # type: ignore[arg-type]


@contextmanager
def connected(patch: pytest.MonkeyPatch, folder: Path, *repos: Repo) -> Iterator[Server]:
    """This process with its cache at `folder`, no token, and a server with `repos` ("owner/name", then
    "owner/name1", …) as its hub; attempts follow each other without a wait."""
    names = [NAME, *(f"{NAME}{i}" for i in range(1, len(repos)))]
    with Server(dict(zip(names, repos, strict=True))) as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(hub.transfer, "_WAITS", [0.0] * 5)
        yield server
        huggingface_hub.close_session()


def environment(server: Server, folder: Path) -> dict[str, str]:
    """The same view for another process."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(folder),
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder),
    }


def assert_whole(folder: Path, repo: Repo, names: list[str] = WANTED) -> None:
    """`folder` holds exactly these files of `repo`, with the right bytes, and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == repo.files[name], name


def leftovers(folder: Path) -> list[Path]:
    """Partial files anywhere in a cache."""
    return [path for path in folder.rglob("*") if path.name.endswith((".incomplete", ".writing"))]
