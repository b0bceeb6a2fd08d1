"""Snapshots on disk: they come back whole or not at all, whatever happened to the files, the disk or the process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.timelines import active, extend, made, same
from moelocal.cache import Cache, Chunks, Disk, Store, disk, file
from moelocal.cache.file import Packed
from moelocal.cache.keys import GRID
from moelocal.cache.snapshot import Segment

TOKENS = np.random.default_rng(4).integers(0, 500, 4000).tolist()
PLENTY = 1 << 30


def opened(folder: Path, budget: int = PLENTY, fingerprint: str = "f", memory: int = PLENTY) -> Store:
    return Store(fingerprint, memory, Disk(folder, fingerprint, budget))


def kept(store: Store) -> Disk:
    assert store.disk is not None
    return store.disk


def stored(folder: Path, *sequences: list[int], **arguments: int | str) -> Store:
    """A store that has put these on disk and keeps nothing in memory."""
    store = opened(folder, **arguments)  # type: ignore[arg-type]
    for tokens in sequences:
        store.put(tokens, made(tokens))
        kept(store).flush()
    store.clear()
    return store


def restored(store: Store, tokens: list[int]) -> Cache | None:
    """The longest stored prefix, which is what it should be or none."""
    found = store.find(tokens)
    cache = None if found is None else store.restore(found)
    if found is not None and cache is not None:
        assert cache.position == found.position and same(cache, made(tokens[: found.position]))
    return cache


def files(folder: Path, kind: str = "") -> list[Path]:
    return sorted(folder.glob(f"*/*{kind}.safetensors"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 1000])
def test_a_snapshot_survives_its_process(tmp_path: Path, position: int):
    stored(tmp_path, TOKENS[:position])
    store = opened(tmp_path)
    found = store.find(TOKENS)
    assert found is not None and (found.position, found.where) == (position, "disk")
    before = active()
    cache = restored(store, TOKENS)
    assert cache is not None and cache.chunks == made(TOKENS[:position]).chunks
    buffers = cache.nbytes - sum(a.nbytes for s in store._snapshots.values() for a in s.states)
    assert active() - before == store.nbytes + buffers  # states are shared
    found = store.find(TOKENS)
    assert found is not None and found.where == "memory"
    assert store.counts == {"disk": 1} and kept(store).counts == {"read": 1} and not kept(store).refused


def test_another_process_reads_them(tmp_path: Path):
    stored(tmp_path, TOKENS[:700])
    program = f"""
from pathlib import Path
from cache.timelines import made, same
from moelocal.cache import Disk, Store
tokens = {TOKENS[:800]}
store = Store("f", 1 << 30, Disk(Path({str(tmp_path)!r}), "f", 1 << 30))
print(same(store.restore(store.find(tokens)), made(tokens[:700])))
"""
    assert run(program).stdout == "True\n"


def run(program: str, **arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), **arguments
    )  # type: ignore[call-overload]
    assert not done.stderr, done.stderr
    return done  # type: ignore[no-any-return]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_what_was_put_is_written_before_the_process_ends(tmp_path: Path):
    program = f"""
from pathlib import Path
from cache.timelines import made
from moelocal.cache import Disk, Store
tokens = {TOKENS[:1500]}
store = Store("f", 1 << 30, Disk(Path({str(tmp_path)!r}), "f", 1 << 30))
for stop in range(300, 1501, 300):
    store.put(tokens[:stop], made(tokens[:stop]))
"""
    run(program)
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 1500
    assert len(files(tmp_path, "snapshot")) == 5 and len(files(tmp_path, "segment")) == 5


def test_every_safetensors_library_reads_the_files(tmp_path: Path):
    stored(tmp_path, TOKENS[:700])
    (snapshot,) = files(tmp_path, "snapshot")
    arrays, metadata = mx.load(str(snapshot), return_metadata=True)  # type: ignore[misc]
    assert arrays["tokens"].tolist() == TOKENS[:700] and metadata["layers"] == "rara"
    cache = made(TOKENS[:700])
    for index, layer in enumerate((0, 2)):
        conv, state = cache.layers[layer].arrays
        assert mx.array_equal(arrays[f"state.{2 * index}"], conv)
        assert mx.array_equal(arrays[f"state.{2 * index + 1}"], state)
    whole, (first, *_) = cache.layers[1].arrays[0], files(tmp_path, "segment")
    arrays, _ = mx.load(str(first), return_metadata=True)  # type: ignore[misc]
    assert arrays["part.0"].dtype == mx.bfloat16 and arrays["part.0"].shape == (2, 2, GRID, 8)
    assert any(mx.array_equal(arrays["part.0"], whole[:, :, i : i + GRID]) for i in (0, GRID))


def test_only_the_user_may_read_them(tmp_path: Path):
    folder = tmp_path / "snapshots"
    stored(folder, TOKENS[:300])
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_long_conversation_does_not_rewrite_itself(tmp_path: Path):
    store, cache, written = opened(tmp_path), made(()), []
    for stop in (1030, 1035, 1040, 1300):
        extend(cache, TOKENS[: cache.position], TOKENS[cache.position : stop])
        before = size(tmp_path)
        store.put(TOKENS[:stop], cache)
        kept(store).flush()
        written.append(size(tmp_path) - before)
    position = {path: path.stat().st_mtime_ns for path in files(tmp_path, "segment")}
    assert len(position) == 1300 // GRID
    segment = max(path.stat().st_size for path in position)
    assert written[0] > 4 * segment > 10 * max(written[1:3]) and segment < written[3] < 2 * segment
    fresh = opened(tmp_path)  # knows nothing of what is there
    fresh.put(TOKENS[:1300], cache)
    kept(fresh).flush()
    assert kept(fresh).counts == {} and {p: p.stat().st_mtime_ns for p in position} == position


def test_a_snapshot_too_large_for_memory_goes_to_disk_alone(tmp_path: Path):
    store = opened(tmp_path, memory=1000)
    before, cache = active(), made(TOKENS[:1000])
    held = active() - before
    store.put(TOKENS[:1000], cache)
    kept(store).flush()
    assert store.nbytes == 0 and store.counts == {"too large": 1} and active() - before == held
    assert store.fate(TOKENS[:1000]) == "disk"
    again = restored(store, TOKENS)
    assert again is not None and again.position == 1000 and store.nbytes == 0


def test_what_is_read_costs_the_same_however_many_segments_are_in_memory(tmp_path: Path):
    stored(tmp_path, TOKENS[:600])
    store = opened(tmp_path, memory=0)  # what is read does not stay
    found = store.find(TOKENS)
    assert found is not None

    def most() -> int:
        tracemalloc.start()
        assert store.restore(found) is not None
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    most()  # what only the first one makes
    before = most()
    store._segments.update((f"{number:032x}", Segment(())) for number in range(10_000))
    assert abs(most() - before) < 20_000  # bytes; a copy of the dict takes 200,000 more
    assert store.counts["disk"] == 3


def test_what_only_memory_is_to_have_is_not_written(tmp_path: Path):
    store = opened(tmp_path)
    store.put(TOKENS[:300], made(TOKENS[:300]), keep=False)
    kept(store).flush()
    assert not files(tmp_path)
    store.put(TOKENS[:300], made(TOKENS[:300]))
    kept(store).flush()
    assert len(files(tmp_path)) == 2


def test_only_what_was_evaluated_in_accepted_chunks_is_found(tmp_path: Path):
    store = opened(tmp_path)
    evaluated = {300: [(1, 300)], 301: [(1, 300), (1, 1)], 700: [(1, 300), (1, 1), (1, 399)]}
    cache = made(())
    for stop in evaluated:
        extend(cache, TOKENS[: cache.position], TOKENS[cache.position : stop], chunk=400)
        store.put(TOKENS[:stop], cache)
    asked = []

    def accept(chunks: Chunks) -> bool:
        asked.append(list(chunks))
        return all(size > 1 for _, size in chunks)

    for where in ("memory", "disk"):
        asked.clear()
        found = store.find(TOKENS, accept)
        assert found is not None and (found.position, found.where) == (300, where)
        assert asked[:3] == list(evaluated.values())[::-1]
        kept(store).flush()
        store.clear()


def test_what_was_evaluated_in_other_chunks_is_replaced(tmp_path: Path):
    store, base = opened(tmp_path), active()
    for chunk in (7, 600, 100, 88, 1):  # the last two differ behind the last grid line only
        cache = made(TOKENS[: 2 * GRID], chunk if chunk > 88 else GRID)
        extend(cache, TOKENS[: 2 * GRID], TOKENS[2 * GRID : 600], chunk)
        chunks = cache.chunks
        store.put(TOKENS[:600], cache)
        del cache
        kept(store).flush()
        assert active() - base == store.nbytes and len(store) == 1
        assert len(files(tmp_path, "snapshot")) == 1
        for each in (store, opened(tmp_path)):
            cache = restored(each, TOKENS)
            assert cache is not None and cache.chunks == chunks
        del each, cache
    assert not kept(store).refused


def test_dropping_removes_the_files(tmp_path: Path):
    store = stored(tmp_path, TOKENS[:600], [*TOKENS[:300], *TOKENS[700:1000]], TOKENS[:300])
    found = store.find(TOKENS[:600])
    assert found is not None and found.position == 600
    store.drop(found)
    assert len(files(tmp_path, "snapshot")) == 2 and len(files(tmp_path, "segment")) == 2
    cache = restored(store, TOKENS)
    assert cache is not None and cache.position == 300
    store.put(TOKENS[:600], made(TOKENS[:600]))  # and what went with it is written again
    kept(store).flush()
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 600


Step = tuple[str, int, int]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from("pppffrce"), st.integers(0, 2), st.integers(1, 900)), max_size=14),
    st.sampled_from([0, 100_000, PLENTY]),
)
def test_memory_and_disk_find_together_what_was_ever_put(steps: list[Step], memory: int):
    """Through restarts, emptied and small memories: with room on disk nothing is lost, and nothing is mistaken."""
    with temporary() as folder:
        store, known, base = opened(folder, memory=memory), [[-1]], active()
        for action, branch, length in steps:
            tokens = [branch, *TOKENS[:length]]
            if action == "p":
                store.put(tokens, made(tokens))
                known.append(tokens)
            elif action == "f":
                if memory < PLENTY:
                    kept(store).flush()
                cache = restored(store, tokens)
                best = max((len(k) for k in known if k == tokens[: len(k)]), default=0)
                assert (cache.position if cache else 0) == best
                del cache
            elif action == "r":
                store.close()
                store = opened(folder, memory=memory)
            elif action == "c":
                kept(store).flush()
                store.clear()
            else:
                kept(store).flush()
                assert active() - base == store.nbytes <= memory
        store.close()
        assert not kept(store).refused


# The budget


def test_the_least_recently_used_file_goes_first(tmp_path: Path):
    sequences = [[number, *TOKENS[:99]] for number in range(4)]
    stored(tmp_path / "one", sequences[0])
    budget = 3 * size(tmp_path / "one") + 100
    store = stored(tmp_path / "all", *sequences[:3], budget=budget)
    assert restored(store, sequences[0]) is not None
    store.put(sequences[3], made(sequences[3]))
    kept(store).flush()
    assert [opened(tmp_path / "all").find(t) is not None for t in sequences] == [True, False, True, True]
    assert kept(store).counts == {"written": 4, "read": 1, "evicted": 1}


def test_the_budget_is_that_of_all_models_together(tmp_path: Path):
    for fingerprint in ("one", "two"):
        stored(tmp_path, TOKENS[:600], fingerprint=fingerprint)
    whole = size(tmp_path)
    both = stored(tmp_path, TOKENS[1000:1300], fingerprint="two", budget=whole)
    assert size(tmp_path) <= whole
    assert opened(tmp_path, fingerprint="one").find(TOKENS) is None
    assert restored(both, TOKENS) is not None and restored(both, TOKENS[1000:]) is not None


@settings(max_examples=12)
@given(st.integers(0, 400_000), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), max_size=12))
def test_the_budget_is_never_exceeded(budget: int, puts: list[tuple[int, int]]):
    with temporary() as folder:
        store = opened(folder, budget=budget)
        for branch, length in puts:
            tokens = [branch, *TOKENS[:length]]
            store.put(tokens, made(tokens))
            kept(store).flush()
            assert size(folder) <= budget
        fresh = opened(folder)
        names = {path.name for path in files(folder, "snapshot")}
        for branch, length in puts:
            tokens = [branch, *TOKENS[:length]]
            cache = restored(fresh, tokens)
            there = any(f"-{len(tokens)}-" in name for name in names)
            assert cache is None or there or cache.position < len(tokens)
        assert not fresh.disk.refused and len(fresh) == len(names)  # type: ignore[union-attr]
        needed = sum(len(path.name.split("-")) == 2 for path in files(folder))
        assert needed == len({link for s in fresh._snapshots.values() for link in s.links})


@contextmanager
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_segments_that_a_new_snapshot_shares_survive_the_eviction_it_causes(tmp_path: Path):
    long = made(TOKENS[:700])
    extend(long, TOKENS[:700], TOKENS[700:720])
    store = stored(tmp_path, TOKENS[:700])
    kept(store).budget = size(tmp_path) + 5000  # not enough for the states and the tail of another one
    store.put(TOKENS[:720], long)
    kept(store).flush()
    assert kept(store).counts == {"written": 2, "evicted": 1} and size(tmp_path) <= kept(store).budget
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 720


def test_what_is_larger_than_the_budget_evicts_nothing(tmp_path: Path):
    store = stored(tmp_path, TOKENS[:300])
    kept(store).budget = size(tmp_path) + 10
    store.put(TOKENS[:900], made(TOKENS[:900]))
    kept(store).flush()
    assert kept(store).refused == {"too large": 1}
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 300


def test_files_of_others_stay_where_they_are(tmp_path: Path):
    store = stored(tmp_path, TOKENS[:300])
    shelf = files(tmp_path)[0].parent
    others = [tmp_path / "letter.txt", shelf / "letter.txt", shelf / "x.snapshot.safetensors"]
    for path in others:
        path.write_text("mine")
    (tmp_path / ("0" * 32)).write_text("a file where a folder could be")
    kept(store).budget = size(tmp_path) + 100
    for number in range(3):
        tokens = [number, *TOKENS[:299]]
        store.put(tokens, made(tokens))
        kept(store).flush()
    assert kept(store).counts["evicted"] == 3
    assert all(path.read_text() == "mine" for path in others) and not kept(store).refused


def test_what_an_interrupted_write_left_is_removed_by_the_next(tmp_path: Path):
    store = stored(tmp_path, TOKENS[:300])
    for path in files(tmp_path):
        path.with_name(f".{path.name}.12345.part").write_bytes(path.read_bytes()[:1000])
    assert restored(opened(tmp_path), TOKENS) is not None
    store.put(TOKENS[:10], made(TOKENS[:10]))
    kept(store).flush()
    assert len(files(tmp_path)) == 3 == len([p for p in tmp_path.glob("*/*") if p.is_file()])


def test_a_snapshot_without_its_segments_makes_room_first(tmp_path: Path):
    short = [7, *TOKENS[:10]]
    store = stored(tmp_path, TOKENS[:300], short)
    files(tmp_path, "segment")[0].unlink()
    found = store.find(short)
    assert found is not None
    store.drop(found)
    assert not files(tmp_path)


# Damage


def truncated(path: Path, other: Path, place: float, bits: int) -> None:
    os.truncate(path, int(place * (path.stat().st_size - 1)))


def flipped(path: Path, other: Path, place: float, bits: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= bits
    path.write_bytes(content)


def extended(path: Path, other: Path, place: float, bits: int) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * bits)


def swapped(path: Path, other: Path, place: float, bits: int) -> None:
    shutil.copy(other, path)


def emptied(path: Path, other: Path, place: float, bits: int) -> None:
    path.write_bytes(b"")


DAMAGES = (truncated, flipped, extended, swapped, emptied)


@settings(max_examples=60)
@given(
    st.sampled_from(DAMAGES),
    st.integers(0, 4),
    st.integers(0, 4),
    st.floats(0, 1),
    st.integers(1, 255),
)
def test_damaged_files_are_refused_reported_once_and_replaced(
    damage: Callable[[Path, Path, float, int], None], which: int, other: int, place: float, bits: int
):
    sequences = [TOKENS[:700], [7, *TOKENS[:400]]]
    with temporary() as folder, reports() as said:
        stored(folder, *sequences)
        names = files(folder)
        assert len(names) == 5
        intact = names[which].read_bytes()
        damage(names[which], names[other], place, bits)
        changed = names[which].read_bytes() != intact
        store = opened(folder)
        caches = [restored(store, tokens) for tokens in sequences]  # equal, or none
        refused = kept(store).refused
        assert sum(refused.values()) == len(said) == caches.count(None) <= changed
        assert {"damaged", "wrong tokens"} >= set(refused)
        if changed and (
            damage is not flipped or place > 0.5
        ):  # else a space of the header may be another one
            assert None in caches
        assert [restored(store, tokens) is None for tokens in sequences] == [c is None for c in caches]
        for tokens in sequences:
            store.put(tokens, made(tokens))
        kept(store).flush()
        fresh = opened(folder)
        assert all(restored(fresh, tokens) is not None for tokens in sequences)
        assert len(said) == caches.count(None) and not kept(fresh).refused


@contextmanager
def reports() -> Iterator[list[str]]:
    """The warnings that are logged meanwhile."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("moelocal")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("kind", ["snapshot", "segment"])
def test_who_wrote_a_damaged_file_writes_it_again(tmp_path: Path, kind: str):
    store = stored(tmp_path, TOKENS[:700])
    flipped(files(tmp_path, kind)[-1], files(tmp_path)[0], 1, 1)
    assert restored(store, TOKENS) is None and kept(store).refused == {"damaged": 1}
    store.put(TOKENS[:700], made(TOKENS[:700]))
    kept(store).flush()
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 700


def test_a_report_says_which_file_and_why(tmp_path: Path):
    stored(tmp_path, TOKENS[:100])
    (path,) = files(tmp_path)
    os.truncate(path, 100)
    store = opened(tmp_path)
    with reports() as said:
        assert restored(store, TOKENS) is None and restored(store, TOKENS) is None
    assert said == [f"snapshots: {path}: damaged: the header is not as it was written"]
    assert store.fate(TOKENS[:100]) == "refused" and not path.exists()


def test_a_file_of_another_fingerprint_is_refused(tmp_path: Path):
    stored(tmp_path, TOKENS[:300], fingerprint="other")
    stored(tmp_path, TOKENS[:300])
    ours = [path for path in files(tmp_path) if path.parent.name == kept(opened(tmp_path))._shelf.name]
    for path in ours:
        (other,) = (p for p in files(tmp_path) if p.parent != path.parent and suffix(p) == suffix(path))
        shutil.copy(other, path)
    store = opened(tmp_path)
    with reports() as said:
        assert restored(store, TOKENS) is None and restored(store, TOKENS) is None
    assert kept(store).refused == {"foreign": 1} and len(said) == 1
    assert said[0].endswith("foreign: of another model, setting or version")


def suffix(path: Path) -> str:
    return path.name.split(".", 1)[1]


@pytest.mark.parametrize("change", ["fingerprint", "version", "key", "tokens", "chunks"])
@pytest.mark.parametrize("kind", ["snapshot", "segment"])
def test_a_whole_file_with_another_content_is_refused(tmp_path: Path, change: str, kind: str):
    """As a version with a bug would write it: all checksums are right."""
    stored(tmp_path, TOKENS[:300])
    (path,) = files(tmp_path, kind)
    metadata, content = file.read(path)
    del metadata["format"]
    if change == "tokens":
        content["tokens"] = file.Tensor.of_bytes(bytes(content["tokens"].data)[:-4] + b"\1\0\0\0")
    elif change == "chunks":
        metadata["chunks"] = "[[300, 1]]"
    else:
        metadata[change] = "0"
    Packed.of(content, metadata).write(path)
    store = opened(tmp_path)
    if (kind, change) == ("segment", "chunks"):  # says nothing there
        assert restored(store, TOKENS) is not None
        return
    assert restored(store, TOKENS) is None
    cause = "foreign" if change in ("fingerprint", "version") else "wrong tokens"
    assert kept(store).refused == {cause: 1} and not path.exists()


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stored(tmp_path, TOKENS[:300])
    store = opened(tmp_path)

    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, reports() as said:
        patch.setattr(Path, "read_bytes", broken)
        found = store.find(TOKENS)
        assert found is not None and store.restore(found) is None and store.find(TOKENS) is None
    assert kept(store).refused == {"unreadable": 1} and len(files(tmp_path)) == 2
    assert said[0].endswith("unreadable: Input/output error")


@pytest.mark.parametrize("kind", ["snapshot", "segment"])
def test_a_file_removed_by_another_process_is_no_fault(tmp_path: Path, kind: str):
    store = stored(tmp_path, TOKENS[:300])
    found = store.find(TOKENS)
    assert found is not None
    files(tmp_path, kind)[0].unlink()
    with reports() as said:
        assert store.restore(found) is None
    assert kept(store).refused == {"gone": 1} and not said
    assert store.find(TOKENS) is None
    store.put(TOKENS[:300], made(TOKENS[:300]))
    kept(store).flush()
    assert restored(opened(tmp_path), TOKENS) is not None


def test_checksums_that_are_not_compared_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The control of the tests above: without them a flipped byte is used."""
    monkeypatch.setattr(file.zlib, "crc32", lambda data, *start: 0)
    stored(tmp_path, TOKENS[:100])
    flipped(files(tmp_path)[0], files(tmp_path)[0], 1, 1)
    store = opened(tmp_path)
    found = store.find(TOKENS)
    assert found is not None
    cache = store.restore(found)
    assert cache is not None and not same(cache, made(TOKENS[:100]))


# The disk and the writer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_costs_a_snapshot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    store = stored(tmp_path, TOKENS[:300])
    write, count = Packed.write, 0

    def failing(self: Packed, path: Path) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(code, os.strerror(code))
        write(self, path)

    with monkeypatch.context() as patch, reports() as said:
        patch.setattr(Packed, "write", failing)
        for stop in (1000, 1001):
            store.put(TOKENS[:stop], made(TOKENS[:stop]))
            kept(store).flush()
            count = 0
    cause = "full" if code == errno.ENOSPC else "failed"
    assert kept(store).refused == {cause: 2}
    assert said == [f"snapshots: {tmp_path}: {cause}: {os.strerror(code)}"]
    fresh = opened(tmp_path)
    cache = restored(fresh, TOKENS)
    assert cache is not None and cache.position == 300
    store.put(TOKENS[:1000], made(TOKENS[:1000]))
    kept(store).flush()
    cache = restored(opened(tmp_path), TOKENS)
    assert cache is not None and cache.position == 1000


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_nothing_of_it(tmp_path: Path):
    program = f"""
import logging, resource
from pathlib import Path
from cache.timelines import made
from moelocal.cache import Disk, Store
logging.disable()
tokens = {TOKENS[:300]}
disk = Disk(Path({str(tmp_path)!r}), "f", 1 << 30)
store = Store("f", 1 << 30, disk)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
store.put(tokens, made(tokens)); disk.flush()
left = [p.name for p in Path({str(tmp_path)!r}).rglob("*") if p.is_file()]
print(dict(disk.refused), left)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.put(tokens, made(tokens)); disk.flush()
print(dict(disk.counts))
"""
    assert run(program).stdout == "{'full': 1} ['lock']\n{'written': 1}\n"
    assert restored(opened(tmp_path), TOKENS) is not None


def test_a_folder_that_cannot_be_made_costs_no_answer(tmp_path: Path):
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "folder")
    with reports() as said:
        store.put(TOKENS[:300], made(TOKENS[:300]))
        kept(store).flush()
    assert kept(store).refused == {"failed": 1} and len(said) == 1
    found = store.find(TOKENS)
    assert found is not None and found.where == "memory"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The lock, as another process would hold it."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def test_an_answer_does_not_wait_for_the_disk(tmp_path: Path):
    store = opened(tmp_path)
    with held(tmp_path):
        store.put(TOKENS[:700], made(TOKENS[:700]))  # returns although nothing can be written
        store.clear()
        assert not files(tmp_path)
    kept(store).flush()
    assert restored(store, TOKENS) is not None


def test_segments_wait_once(tmp_path: Path):
    store = opened(tmp_path)
    with held(tmp_path):
        cache = made(TOKENS[:1030])
        store.put(TOKENS[:1030], cache)
        first = kept(store)._writer.nbytes
        extend(cache, TOKENS[:1030], TOKENS[1030:1031])
        store.put(TOKENS[:1031], cache)
        assert 0 < kept(store)._writer.nbytes - first < first / 10
    kept(store).flush()
    fresh = opened(tmp_path)
    assert restored(fresh, TOKENS[:1030]) is not None and restored(fresh, TOKENS[:1031]) is not None
    assert len(fresh) == 2


def test_what_waits_to_be_written_is_bounded(tmp_path: Path):
    store = Store("f", PLENTY, Disk(tmp_path, "f", PLENTY, waiting=100_000))
    base = active()
    with held(tmp_path), reports() as said:
        for number in range(8):
            tokens = [number, *TOKENS[:300]]
            store.put(tokens, made(tokens))
        store.clear()
        assert 0 < active() - base <= 100_000
    kept(store).flush()
    written, refused = kept(store).counts["written"], kept(store).refused["busy"]
    assert written >= 2 and written + refused == 8 and len(said) == 1
    assert active() == base and len(files(tmp_path, "snapshot")) == written
    store.put(TOKENS[:900], made(TOKENS[:900]))  # more than may wait, but nothing does
    kept(store).flush()
    assert kept(store).counts["written"] == written + 1


def test_another_process_that_keeps_the_lock_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "PATIENCE", 0.05)
    store = opened(tmp_path)
    with held(tmp_path), reports() as said:
        store.put(TOKENS[:300], made(TOKENS[:300]))
        kept(store).flush()
    assert kept(store).refused == {"failed": 1} and len(said) == 1


def test_a_bug_in_a_job_does_not_end_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = opened(tmp_path)
    with monkeypatch.context() as patch, reports() as said:
        patch.setattr(Packed, "of", lambda *arguments: 1 / 0)
        store.put(TOKENS[:300], made(TOKENS[:300]))
        kept(store).flush()
    assert kept(store).refused == {"failed": 1} and "ZeroDivisionError" in said[0]
    store.put(TOKENS[:300], made(TOKENS[:300]))
    kept(store).flush()
    assert kept(store).counts == {"written": 1}


def test_a_closed_disk_takes_nothing_and_its_thread_has_ended(tmp_path: Path):
    store = opened(tmp_path)
    store.put(TOKENS[:300], made(TOKENS[:300]))
    store.close()
    thread = kept(store)._writer._thread
    assert thread is not None and not thread.is_alive() and len(files(tmp_path)) == 2
    store.put(TOKENS[:400], made(TOKENS[:400]))
    assert kept(store).refused == {"busy": 1}


def test_a_disk_that_nobody_has_any_more_ends_its_thread(tmp_path: Path):
    store = opened(tmp_path)
    store.put(TOKENS[:300], made(TOKENS[:300]))
    kept(store).flush()
    thread = kept(store)._writer._thread
    assert thread is not None and thread.is_alive()
    del store
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("steps", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_writing_evicting_and_reading_leaves_memory_flat(tmp_path: Path, steps: int):
    store = opened(tmp_path, budget=400_000, memory=200_000)
    chance, base, readings = random.Random(5), active(), set()
    for step in range(steps):
        tokens = [chance.randrange(6), *TOKENS[: chance.randrange(1, 900)]]
        if restored(store, tokens) is None or chance.random() < 0.5:
            store.put(tokens, made(tokens))
        if step % (steps // 10) == 0:
            kept(store).flush()
            readings.add(active() - base - store.nbytes)
            assert size(tmp_path) <= 400_000
    assert readings == {0}
    assert kept(store).counts["evicted"] > steps // 10 and kept(store).counts["read"] > steps // 20
    assert set(kept(store).refused) <= {"too large", "gone"}


# Processes


WRITER = """
import random, sys
from pathlib import Path
from cache.timelines import made
from moelocal.cache import Disk, Store
folder, seed, budget = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokens, chance = list(map(int, sys.argv[4].split(","))), random.Random(seed)
disk = Disk(folder, "f", budget)
store = Store("f", 1 << 20, disk)
print("ready", flush=True)
for number in range(10_000):
    mine = [chance.randrange(8), *tokens[: chance.randrange(1, len(tokens))]]
    store.put(mine, made(mine))
    disk.flush()
    print(mine[0], len(mine), flush=True)
"""


def writer(folder: Path, seed: int, budget: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(seed), str(budget), ",".join(map(str, TOKENS[:1500]))]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True, env=environment()
    )


@pytest.mark.parametrize("moments", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_writes_loses_nothing_that_was_finished(tmp_path: Path, moments: int):
    chance, finished = random.Random(6), set()
    parts = 0
    for moment in range(moments):
        process = writer(tmp_path, moment, PLENTY)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(chance.random() * 0.15)
        process.kill()
        lines = process.stdout.read().split("\n")[:-1]
        process.stdout.close()
        process.wait()
        finished |= {tuple(map(int, line.split())) for line in lines}
        parts += len(list(tmp_path.glob("*/.*.part")))
        store = opened(tmp_path)
        for first, length in finished:
            tokens = [first, *TOKENS[: length - 1]]
            found = store.find(tokens)
            assert found is not None and found.position == length
            assert restored(store, tokens) is not None
        assert not kept(store).refused
    assert finished and (parts or moments < 50)
    store = opened(tmp_path)
    store.put(TOKENS[:10], made(TOKENS[:10]))
    kept(store).flush()
    assert not list(tmp_path.glob("*/.*.part"))
    for path in files(tmp_path):
        file.read(path)


USER = """
import random, sys
from pathlib import Path
from cache.timelines import made, same
from moelocal.cache import Disk, Store
folder, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokens, chance = list(map(int, sys.argv[4].split(","))), random.Random(seed)
disk = Disk(folder, "f", 400_000)
store = Store("f", 100_000, disk)
for number in range(steps):
    mine = [chance.randrange(4), *tokens[: chance.randrange(1, len(tokens))]]
    found = store.find(mine)
    cache = store.restore(found) if found else None
    assert cache is None or same(cache, made(mine[: found.position]))
    store.put(mine, made(mine))
    if chance.random() < 0.3:
        disk.flush()
disk.close()
assert set(disk.refused) <= {"gone", "busy", "too large"}, disk.refused
print(disk.counts["written"] > steps // 4, disk.counts["read"] > 0, disk.counts["evicted"] > 0)
"""


@pytest.mark.parametrize("steps", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_two_processes_write_read_and_evict_at_the_same_time(tmp_path: Path, steps: int):
    arguments = [str(steps), ",".join(map(str, TOKENS[:900]))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(tmp_path), str(seed), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for seed in (1, 2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=500)
        assert (out, err) == ("True True True\n", "")
    assert 0 < size(tmp_path) <= 400_000
    for path in files(tmp_path):
        file.read(path)
    fresh = opened(tmp_path)
    for branch in range(4):
        restored(fresh, [branch, *TOKENS[:900]])
    assert not kept(fresh).refused and len(fresh)
