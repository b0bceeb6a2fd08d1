"""From the name of a model to a folder on this machine. `transfer.py` alone may connect to others."""

from moelocal.hub.repository import (
    EMBEDDED,
    INDEX,
    RemoteFile,
    Repository,
    download,
    fetch,
    find,
    is_offline,
    locate,
    outline,
    read_head,
    remaining,
    resolve,
    skeleton,
    storage,
    write_stub,
)
from moelocal.hub.transfer import Meter, check_space, writing

__all__ = [
    "EMBEDDED",
    "INDEX",
    "Meter",
    "RemoteFile",
    "Repository",
    "check_space",
    "download",
    "fetch",
    "find",
    "is_offline",
    "locate",
    "outline",
    "read_head",
    "remaining",
    "resolve",
    "skeleton",
    "storage",
    "write_stub",
    "writing",
]
