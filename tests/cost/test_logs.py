"""Files: every line is counted once, whatever it is, plain or gzip, alone or in folders."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost import logs
from moelocal.cost.logs import Lines, Logs, Place
from moelocal.cost.shapes import Entry
from moelocal.errors import RequestError

CALL = json.dumps(
    {"object": "chat.completion", "model": "m", "choices": [], "usage": {"prompt_tokens": 1}}
).encode()


def read(*names: Path) -> tuple[list[tuple[Place, Entry]], Lines]:
    lines = Lines()
    return list(Logs.find(names).read(lines)), lines


def test_each_fate_is_counted_and_the_first_are_named(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(
        b"\n".join([CALL, b"", b'{"a": ', b"\xff\xfe", b'{"level": 1}', CALL, b"  ", b"[" * 100_000, CALL])
    )
    entries, lines = read(file)
    assert [place.line for place, _ in entries] == [1, 6, 9]
    assert lines.counts == {"read": 3, "empty": 2, "malformed": 3, "unknown": 1}
    assert lines.shown["malformed"][0] == (str(file), "line 3", "not JSON: Expecting value, character 7")
    assert lines.shown["malformed"][1] == (str(file), "line 4", "not UTF-8 text: byte 1")
    assert lines.shown["malformed"][2][:2] == (str(file), "line 8")
    assert lines.shown["unknown"] == [(str(file), "line 5", "an object with level")]


def test_a_bad_item_of_a_page_loses_none_of_the_others(tmp_path):
    good = json.loads(CALL)
    bad = good | {"usage": {"prompt_tokens": -1}}
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps({"object": "list", "data": [good, bad, {"x": 1}, good]}))
    entries, lines = read(file)
    assert [place for place, _ in entries] == [Place(0, 1, 0), Place(0, 1, 3)]
    assert lines.counts == {"read": 1, "empty": 0, "malformed": 0, "unknown": 0}
    assert lines.items == {"malformed": 1, "unknown": 1}
    reason = "usage.prompt_tokens: expected a number of tokens, got -1"
    assert lines.shown["malformed"] == [(str(file), "line 1, item 2", reason)]
    assert lines.shown["unknown"] == [(str(file), "line 1, item 3", "an object with x")]
    assert Logs.find([file]).reread([Place(0, 1, 3)]) == dict(entries[1:])


def test_the_reasons_of_the_first_few_are_kept_and_the_places_of_all(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"x\n" * 1000 + CALL + b"\n\n\nx\n{}\nx\n")
    _, lines = read(file)
    assert (lines.counts["malformed"], len(lines.shown["malformed"])) == (1002, 5)
    assert lines.unread == {
        "empty": {(str(file), 0): [[1002, 1003]]},
        "malformed": {(str(file), 0): [[1, 1000], [1004, 1004], [1006, 1006]]},
        "unknown": {(str(file), 0): [[1005, 1005]]},
    }


def rejected(*names: Path) -> list[dict[str, Any]]:
    """What `reject` is told of, through JSON."""
    told: list[dict[str, Any]] = []
    lines = Lines(reject=lambda each: told.append(json.loads(json.dumps(each))))
    list(Logs.find(names).read(lines))
    return told


def test_every_line_that_is_not_read_is_passed_on_as_it_is(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    file.write_bytes(CALL + b"\n \t\r\n\xffx\n" + b'{"a": "\xc3\xa9"}\n[' + CALL + b"]")
    place = {"file": str(file)}
    assert rejected(file) == [
        {"rejected": "empty", **place, "line": 2, "reason": "empty", "raw": " \t"},
        {"rejected": "malformed", **place, "line": 3, "reason": "not UTF-8 text: byte 1", "raw": "\udcffx"},
        {"rejected": "unknown", **place, "line": 4, "reason": "an object with a", "raw": '{"a": "\u00e9"}'},
        {"rejected": "unknown", **place, "line": 5, "reason": "a list, not an object",
         "raw": f"[{CALL.decode()}]"},
    ]  # fmt: skip
    assert "\udcffx".encode("utf-8", "surrogateescape") == b"\xffx"
    monkeypatch.setattr(logs, "LONGEST", 1 << 20)
    file.write_bytes(b"x" * (2 << 20))
    (long,) = rejected(file)
    assert (long["line"], long["reason"], long["raw"]) == (1, "longer than 1 MB", None)


def test_items_of_pages_and_of_lists_are_passed_on_too(tmp_path):
    (tmp_path / "page.jsonl").write_text(json.dumps({"object": "list", "data": [json.loads(CALL), {"x": 1}]}))
    (tmp_path / "whole.json").write_text(json.dumps([json.loads(CALL), [1, "\ud800"]]))
    page, item = rejected(tmp_path)
    assert (page["line"], page["item"], json.loads(page["raw"])) == (1, 2, {"x": 1})
    assert (item["line"], "item" in item, json.loads(item["raw"])) == (2, False, [1, "\ud800"])


@given(st.lists(st.sampled_from([CALL, b"", b" \t", b"{", b"nul", b"[]", b"{}", b'"\\ud800"', b"\xf0\x28", b"1e999"])
                | st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b" ")), max_size=30),
       st.booleans(), st.sampled_from([b"\n", b"\r\n"]))  # fmt: skip
def test_no_line_is_lost_whatever_it_holds(tmp_path_factory, content, packed, newline):
    data = newline.join(content)
    file = tmp_path_factory.mktemp("logs") / "log.jsonl"
    file.write_bytes(gzip.compress(data) if packed else data)
    if not packed and data[:2] == b"\x1f\x8b":
        return  # a damaged gzip file, see below
    entries, lines = read(file)
    assert lines.total == data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    assert len(entries) == lines.counts["read"]
    assert not lines.damaged
    named = {place.line for place, _ in entries}
    for by_place in lines.unread.values():
        for first, last in by_place.get((str(file), 0), []):
            assert named.isdisjoint(range(first, last + 1))
            named |= set(range(first, last + 1))
    assert named == set(range(1, lines.total + 1))


def test_gzip_is_told_by_its_first_bytes_not_by_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(CALL + b"\n" + CALL))
    (tmp_path / "b.jsonl.gz").write_bytes(CALL)
    entries, lines = read(tmp_path)
    assert (len(entries), lines.counts["read"]) == (3, 3)


def test_a_gzip_file_that_ends_too_early_is_read_as_far_as_it_goes(tmp_path):
    file = tmp_path / "log.jsonl.gz"
    packed = gzip.compress((CALL + b"\n") * 3)
    file.write_bytes(packed[:-9])
    entries, lines = read(file)
    assert lines.damaged == [
        f"{file}: damaged behind line {len(entries)}: "
        "Compressed file ended before the end-of-stream marker was reached"
    ]


def test_a_folder_is_read_in_order_and_what_is_no_log_is_counted(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.ndjson", "1.jsonl", "notes.txt", "b/picture.png"):
        (tmp_path / name).write_bytes(CALL)
    found = Logs.find([tmp_path])
    assert [file.name for file in found.files] == ["1.jsonl", "2.ndjson"]
    assert found.left_out == 2


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(CALL)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(Logs.find([tmp_path, tmp_path / "a.jsonl"]).files) == 1


def test_a_json_file_is_one_value_or_lines(tmp_path):
    one = json.loads(CALL)
    (tmp_path / "list.json").write_text(json.dumps([one, {"x": 1}, one], indent=2))
    (tmp_path / "single.json").write_text(json.dumps(one, indent=2))
    (tmp_path / "lines.json").write_bytes(CALL + b"\n" + CALL)
    entries, lines = read(tmp_path)
    assert lines.counts == {"read": 5, "empty": 0, "malformed": 0, "unknown": 1}
    assert len(entries) == 5


def test_a_byte_order_mark_is_no_damage(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + CALL)
    assert read(file)[1].counts["read"] == 1


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST", 1 << 20)
    file = tmp_path / "log.jsonl"
    file.write_bytes(CALL + b"\n" + b"x" * (3 << 20) + b"\n" + CALL)
    entries, lines = read(file)
    assert [place.line for place, _ in entries] == [1, 3]
    assert lines.shown["malformed"] == [(str(file), "line 2", "longer than 1 MB")]


def test_places_lead_back_to_their_entries(tmp_path):
    for name in "ab":
        content = [CALL.replace(b'"m"', f'"{name}{number}"'.encode()) for number in range(50)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(content))
    found = Logs.find([tmp_path])
    entries = dict(found.read(Lines()))
    chosen = list(entries)[::7]
    assert found.reread(chosen) == {place: entries[place] for place in chosen}


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(RequestError) as caught:
        Logs.find([tmp_path / "no.jsonl"])
    assert str(caught.value) == f"{tmp_path}/no.jsonl: no such file or folder"
    with pytest.raises(RequestError) as caught:
        Logs.find([tmp_path])
    assert str(caught.value) == (
        f"{tmp_path}: no log in it; a folder's files are read if they end in .jsonl, .ndjson, .json, .log "
        "(or those with .gz)"
    )
    with pytest.raises(RequestError) as caught:
        Logs.find([Path("/dev/null")])
    assert str(caught.value) == "/dev/null: expected a file or a folder, got something else"


def test_progress_reaches_the_end(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes((CALL + b"\n") * 1000)
    seen: list[tuple[int, int]] = []
    list(Logs.find([file]).read(Lines(), lambda done, total: seen.append((done, total))))
    assert seen[-1] == (file.stat().st_size, file.stat().st_size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) > 2
