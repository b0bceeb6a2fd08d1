"""The texts of calibration and evaluation: two sides with nothing in common, always the same tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from moelocal.errors import MoelocalError, RequestError, TemplateError, TokenizerError
from moelocal.hub import EMBEDDED
from moelocal.quantize.corpus import SIDES, Corpus, chats, documentation
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.open(EMBEDDED)


def bare(tmp_path: Path) -> Path:
    """A folder with the embedded model's tokenizer and no template."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    return folder


def decoded(ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(ids, skip_special=False)


def paragraphs(side: str) -> list[str]:
    return [p.strip() for text in documentation(side) for p in text.split("\n\n") if p.strip()]


def test_the_sides_share_no_paragraph():
    ours, theirs = (set(paragraphs(side)) for side in SIDES)
    assert len(ours) > 500 and len(theirs) > 500
    assert not ours & theirs


def test_no_paragraph_of_the_documentation_is_lost_or_there_twice():
    from pydoc_data.topics import topics

    kept = [p for side in SIDES for p in paragraphs(side)]
    assert len(kept) == len(set(kept))
    assert set(kept) == {p.strip() for text in topics.values() for p in text.split("\n\n") if p.strip()}


def test_the_sides_share_no_chat_and_no_first_message():
    ours, theirs = ({chat["messages"][0]["content"] for chat in chats(side)} for side in SIDES)
    assert len(ours) > 80 and len(theirs) > 80
    assert not ours & theirs


def test_the_chats_are_what_the_training_side_of_the_generators_makes(root, tmp_path):
    # the program that wrote the file, told to write elsewhere, with a generator that refuses held-out tasks
    program = f"""
import sys; sys.path.insert(0, {str(root / "tools/embedded")!r})
from pathlib import Path
import data, chats
honest = data.sample
def sample(*args, **options):
    made = honest(*args, **options)
    assert not made.held_out
    return made
data.sample = chats.sample = sample
chats.TARGET = Path({str(tmp_path / "chats.jsonl")!r})
chats.main()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    shipped = root / "src/moelocal/quantize/chats.jsonl"
    assert (tmp_path / "chats.jsonl").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("side", SIDES)
def test_as_many_tokens_as_asked_in_sequences_no_longer_than_asked(side):
    corpus = Corpus.built_in(EMBEDDED, side, 5000, 300)
    assert corpus.tokens == sum(map(len, corpus.sequences)) == 5000
    assert all(2 <= len(ids) <= 300 for ids in corpus.sequences)
    assert corpus.name == f"built-in {side} text"
    assert corpus.kinds == ("documentation", "chats") * (len(corpus.kinds) // 2) + ("documentation",) * (
        len(corpus.kinds) % 2
    )


def test_a_short_corpus_is_the_beginning_of_a_long_one():
    short, long = (Corpus.built_in(EMBEDDED, "evaluation", tokens, 300) for tokens in (1000, 5000))
    for ours, theirs in zip(short.sequences, long.sequences, strict=False):
        assert ours == theirs[: len(ours)]


def test_everything_there_is_comes_once_when_more_is_asked_for():
    corpus = Corpus.built_in(EMBEDDED, "calibration", 10**7, 1000)

    def of(kind: str) -> list[int]:
        pairs = zip(corpus.sequences, corpus.kinds, strict=True)
        return [token for ids, its in pairs if its == kind for token in ids]

    template = ChatTemplate.open(EMBEDDED)
    talks = [
        template.render(chat["messages"], tools=chat.get("tools"), add_generation_prompt=False)
        for chat in chats("calibration")
    ]
    assert of("documentation") == [t for text in documentation("calibration") for t in TOKENIZER.encode(text)]
    assert of("chats") == [t for text in talks for t in TOKENIZER.encode(text)]


def test_chats_are_whole_where_they_fit():
    corpus = Corpus.built_in(EMBEDDED, "evaluation", 20_000, 2000)
    for ids, kind in list(zip(corpus.sequences, corpus.kinds, strict=True))[:-1]:
        if kind == "chats":
            assert decoded(ids).startswith("<|im_start|>") and decoded(ids).endswith("<|im_end|>\n")


def test_the_digest_is_of_lengths_and_ids():
    corpus = Corpus("any", ((1, 2, 3), (70_000,)), ("text", "text"))
    expected = hashlib.sha256(struct.pack("<6I", 3, 1, 2, 3, 1, 70_000)).hexdigest()
    assert corpus.digest == expected
    assert Corpus("other", ((1, 2), (3, 70_000)), ("text", "text")).digest != expected


def test_without_a_template_chats_are_plain_text(tmp_path):
    corpus = Corpus.built_in(bare(tmp_path), "evaluation", 3000, 1000)
    talk = decoded(corpus.sequences[corpus.kinds.index("chats")])
    first = chats("evaluation")[0]["messages"]
    assert talk.startswith("\n\n".join(message["content"] for message in first))
    assert "<|im_start|>" not in talk


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("chat_template.jinja", "{% if %}", "the chat template does not compile"),
        ("chat_template.json", "{", "not readable as JSON"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template is neither a string nor a list"),
    ],
)
def test_a_damaged_template_is_no_missing_one(tmp_path, name, content, message):
    folder = bare(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(TemplateError, match=message):
        Corpus.built_in(folder, "evaluation", 1000, 100)


@pytest.mark.parametrize("source", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_is_found_wherever_it_is(tmp_path, source):
    folder, text = bare(tmp_path), (EMBEDDED / "chat_template.jinja").read_text()
    (folder / source).write_text(text if source.endswith("jinja") else json.dumps({"chat_template": text}))
    assert Corpus.built_in(folder, "evaluation", 3000, 1000) == Corpus.built_in(
        EMBEDDED, "evaluation", 3000, 1000
    )


def test_a_plain_file_is_cut_where_a_sequence_is_full(tmp_path):
    file = tmp_path / "text.txt"
    text = "The quick brown fox jumps over the lazy dog. Größe 你好\n" * 40
    file.write_text(text, encoding="utf-8")
    corpus = Corpus.from_file(file, EMBEDDED, 10**6, 100)
    assert corpus.name == "text.txt" and set(corpus.kinds) == {"text"}
    assert [len(ids) for ids in corpus.sequences[:-1]] == [100] * (len(corpus.sequences) - 1)
    assert list(sum(corpus.sequences, ())) == TOKENIZER.encode(text)
    assert Corpus.from_file(file, EMBEDDED, 150, 100).tokens == 150


def test_of_a_large_file_only_the_beginning_is_encoded(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    paragraph = "The quick brown fox jumps over the lazy dog. Größe 你好\n"
    file.write_text(paragraph * 3000 + "~" * 10**6, encoding="utf-8")
    expected = TOKENIZER.encode(paragraph * 3000)[:7000]
    honest, encoded = Tokenizer.encode, []

    def encode(self, text: str) -> list[int]:
        encoded.append(len(text))
        return honest(self, text)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert list(sum(Corpus.from_file(file, EMBEDDED, 7000, 100).sequences, ())) == expected
    assert sum(encoded) < 100_000
    # few characters make many tokens, or many make few: as many are taken as are needed
    file.write_text(" " * 200_000 + paragraph, encoding="utf-8")
    assert (
        list(sum(Corpus.from_file(file, EMBEDDED, 10_000, 10_000).sequences, ()))
        == (honest(TOKENIZER, file.read_text(encoding="utf-8"))[:10_000])
    )


def test_the_documentation_of_the_sides_shares_no_run_of_100_tokens_and_the_chats_18_percent():
    """docs/evaluate.md says so: the generators of the chats repeat tool definitions and drawings."""
    shares = {}
    sides = [Corpus.built_in(EMBEDDED, side, 10**7, 2048) for side in SIDES]
    for kind in ("documentation", "chats"):
        seen, asked = (
            [tuple(ids[i : i + 100]) for ids in texts for i in range(len(ids) - 99)]
            for texts in (
                [ids for ids, its in zip(side.sequences, side.kinds, strict=True) if its == kind]
                for side in sides
            )
        )
        known = set(seen)
        shares[kind] = sum(run in known for run in asked) / len(asked)
    assert shares["documentation"] == 0 and round(shares["chats"], 2) == 0.18, shares


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfHello there")
    assert decoded(Corpus.from_file(file, EMBEDDED, 100, 100).sequences[0]) == "Hello there"


def test_lines_of_json_have_a_text_or_messages(tmp_path):
    file = tmp_path / "mine.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    lines = [{"text": "One plain line."}, {"messages": messages}, {"messages": messages, "tools": [tool]}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    corpus = Corpus.from_file(file, EMBEDDED, 10**6, 5000)
    template = ChatTemplate.open(EMBEDDED)
    assert decoded(corpus.sequences[0]) == (
        "One plain line."
        + template.render(messages, add_generation_prompt=False)
        + template.render(messages, tools=[tool], add_generation_prompt=False)
    )


def test_a_text_longer_than_a_sequence_is_cut(tmp_path):
    file = tmp_path / "long.jsonl"
    texts = ["short one", "word " * 300, "another short one"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = Corpus.from_file(file, EMBEDDED, 10**6, 50)
    assert list(sum(corpus.sequences, ())) == [t for text in texts for t in TOKENIZER.encode(text)]
    assert all(len(ids) <= 50 for ids in corpus.sequences)
    assert decoded(corpus.sequences[0]) == "short one"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine until \xff here", "{file}: not UTF-8 text: byte 11 is 0xff"),
        ("a.txt", b"", "{file}: the file is empty"),
        ("a.txt", b" \n\t\n", "{file}: the file is empty"),
        ("a.txt", b"x", "{file}: expected a text of at least 2 tokens, got fewer"),
        ("a.jsonl", b'{"text": "x"}', "{file}: expected a text of at least 2 tokens, got fewer"),
        (
            "a.jsonl",
            b'{"text": "good"}\n{"text": bad}\n',
            "{file}: line 2: not valid JSON: Expecting value: line 1 column 10 (char 9)",
        ),
        ("a.jsonl", b"[1]", '{file}: line 1: expected an object with "text", a string, or "messages"'),
        (
            "a.jsonl",
            b'{"text": 1}',
            '{file}: line 1: expected an object with "text", a string, or "messages"',
        ),
        (
            "a.jsonl",
            b'\n{"messages": []}',
            "{file}: line 2: messages must be a text or a non-empty list of messages",
        ),
        (
            "a.jsonl",
            b'{"text": "good"}\n{"text": "a \\ud800"}',
            "{file}: line 2: the text cannot be encoded: character 2 is U+D800, half of a surrogate pair; decode the "
            "input as UTF-8 first",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}',
            "{file}: line 1: no message has the role 'user'; a conversation needs at least one",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        Corpus.from_file(file, EMBEDDED, 1000, 100)
    assert str(caught.value) == message.format(file=file)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(RequestError) as caught:
        Corpus.from_file(tmp_path / "no.txt", EMBEDDED, 1000, 100)
    assert str(caught.value) == f"{tmp_path / 'no.txt'}: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    "name, reason",
    [("~nobody-of-this-name/a.txt", "Could not determine home directory"), ("a\0.txt", "embedded null byte")],
)
def test_a_name_that_is_none_says_so(name, reason):
    with pytest.raises(RequestError) as caught:
        Corpus.from_file(Path(name), EMBEDDED, 1000, 100)
    assert str(caught.value) == f"{name}: cannot be read: {reason}"


def test_chats_of_the_user_need_the_template(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    with pytest.raises(TemplateError, match="no chat template in"):
        Corpus.from_file(file, bare(tmp_path), 1000, 100)


@pytest.mark.parametrize("tokens, length", [(1, 100), (100, 1), (0, 0), (-5, 100)])
def test_impossible_sizes_are_refused(tokens, length):
    with pytest.raises(RequestError) as caught:
        Corpus.built_in(EMBEDDED, "evaluation", tokens, length)
    assert (
        str(caught.value)
        == f"expected at least 2 tokens in sequences of at least 2, got {tokens} in {length}"
    )


def test_without_a_tokenizer_there_is_no_text(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model is there"):
        Corpus.built_in(tmp_path, "evaluation", 100, 100)


def test_without_the_documentation_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MoelocalError) as caught:
        Corpus.built_in(EMBEDDED, "evaluation", 100, 100)
    assert str(caught.value) == (
        "this Python has no pydoc_data.topics, the built-in text; give a text of your own"
    )
