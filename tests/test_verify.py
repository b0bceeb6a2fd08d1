"""`moelocal verify`: right on a right engine, and loud about every fault that is planted in it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import moelocal
from moelocal.cache.layers import AttentionCache
from moelocal.cache.snapshot import Snapshot
from moelocal.chat.conversation import Conversation, save
from moelocal.cli import main
from moelocal.engine.session import Session
from moelocal.errors import RequestError
from moelocal.evaluate.verify import CONVERSATION, DECODED, prompts, verify
from moelocal.evaluate.verify_command import Replay, read
from moelocal.model import Decoder

SHORT = CONVERSATION[1:2]


@pytest.fixture(scope="module")
def model() -> moelocal.Model:
    return moelocal.load()


def wrong(model: moelocal.Model) -> set[str]:
    return {way.name for way in verify(model, CONVERSATION[1:4]) if not way.right}


def test_every_way_gives_what_a_cold_run_gives(model):
    ways = list(verify(model))
    assert [way.name for way in ways if not way.right] == []
    reused = {way.name: way.reused for way in ways}
    # a row of a batch is computed as if it were alone, on this device
    assert next(way for way in ways if way.name == "batched with others").error == 0
    whole = ways[0].tokens
    warm = (
        "warm: one call after the other",
        "one session",
        "forked",
        "rewound",
        "from disk, a process for each",
    )
    assert all(0 < reused[name] < whole for name in warm)
    # what was decoded, and what was read ahead, is reused besides
    behind = next(way for way in ways if way.name == "gone on behind those answers")
    assert behind.reused > reused["answered in a session"]
    # of three prompts, all but the first find what the one before left
    assert len({reused[name] for name in warm}) == 1


def test_prompts_are_what_was_sent_at_each_turn(model):
    turns = prompts(model, CONVERSATION)
    assert [len(turn) for turn in turns] == [2, 4, 6]
    tools = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "12 degrees"},
    ]
    assert [len(turn) for turn in prompts(model, tools)] == [1, 4]


def state_lost(monkeypatch):
    """The recurrent state of a snapshot is not the one of its position."""
    restore = Snapshot.restore

    def lost(self, segments):
        cache = restore(self, segments)
        recurrent = next(layer for layer in cache.layers if not isinstance(layer, AttentionCache))
        recurrent.state = recurrent.state * 0.999
        return cache

    monkeypatch.setattr(Snapshot, "restore", lost)


def conv_lost(monkeypatch):
    restore = Snapshot.restore

    def lost(self, segments):
        cache = restore(self, segments)
        recurrent = next(layer for layer in cache.layers if not isinstance(layer, AttentionCache))
        recurrent.conv = mx.zeros_like(recurrent.conv)
        return cache

    monkeypatch.setattr(Snapshot, "restore", lost)


def position_off(monkeypatch):
    restore = Snapshot.restore

    def off(self, segments):
        cache = restore(self, segments)
        cache.position += 1
        return cache

    monkeypatch.setattr(Snapshot, "restore", off)


@pytest.mark.parametrize("plant", [state_lost, conv_lost])
def test_a_planted_fault_is_found(model, monkeypatch, plant):
    plant(monkeypatch)
    found = wrong(model)
    assert {"warm: one call after the other", "from disk, a process for each"} <= found
    assert "cold, again" not in found


def test_a_wrong_position_does_not_even_get_so_far(model, monkeypatch):
    position_off(monkeypatch)
    with pytest.raises(RequestError, match=r"snapshot: expected the \d+ tokens of the timeline"):
        wrong(model)


def test_rows_of_a_batch_that_disturb_each_other_are_found(model, monkeypatch):
    step = Decoder.step_rows

    def disturbed(self, tokens, rows):
        logits = step(self, tokens, rows)
        return logits + 1e-3 * (logits.shape[0] > 1) * logits[:, :, ::-1]

    monkeypatch.setattr(Decoder, "step_rows", disturbed)
    assert wrong(model) == {"batched with others"}


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_keys_and_values_in_codes_are_reused_as_they_are(kv_bits):
    ways = list(verify(moelocal.load(kv_bits=kv_bits)))
    assert [way.name for way in ways if not way.right] == []


def shifted(session, tokens):
    """Each place has the token behind it."""
    session.tokens = [*session.tokens, *tokens[1:], *tokens[:1]]


def one_early(session, tokens):
    """The first token is noted twice and the last one not: as many as the cache holds."""
    session.tokens = [*session.tokens, *tokens[:1], *tokens[:-1]]


@pytest.mark.parametrize("note", [shifted, one_early])
def test_decoded_tokens_that_are_noted_wrongly_are_found(model, monkeypatch, note):
    def fed(self, tokens):
        if tokens:
            note(self, tokens)
            self._mark = None

    monkeypatch.setattr(Session, "fed", fed)
    assert {way.name for way in verify(model, SHORT) if not way.right} == {"gone on behind those answers"}


def test_one_decoded_token_too_few_does_not_even_get_so_far(model, monkeypatch):
    def fed(self, tokens):
        if tokens:
            self.tokens = [*self.tokens, *tokens[:-1]]
            self._mark = None

    monkeypatch.setattr(Session, "fed", fed)
    with pytest.raises(RequestError, match=r"snapshot: expected the \d+ tokens of the timeline"):
        list(verify(model, SHORT))


def test_a_form_of_an_operation_that_computes_something_else_is_found(model, monkeypatch):
    from moelocal.ops.norm import rms_norm

    reference = rms_norm.reference
    monkeypatch.setattr(rms_norm, "reference", lambda x, *rest: reference(x, *rest) * 1.01)
    assert wrong(model) == {"all operations reference"}


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["verify", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ways = json.loads(lines[-1])["ways"]
    assert len(ways) == len(lines) - 2 and all(way["right"] for way in ways)
    assert any(line.startswith("one session ") and "same bits" in line for line in lines)


def test_the_command_fails_loudly(capsys, monkeypatch):
    state_lost(monkeypatch)
    assert main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert "WRONG" in out
    assert err.startswith("moelocal: error: not what a cold run gives: warm: one call after the other; ")


EXPECTED = (
    "chat.json: expected a chat saved with /save, a JSON list of messages, or an object "
    '{"messages": [...], "tools": [...], "thinking": false}, where all but the messages may be left out'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "expected JSON in UTF-8"),
        ("{}", EXPECTED),
        ("[1]", EXPECTED),
        ('{"messages": [], "tools": [1]}', "chat.json: tools: expected a list of objects or null"),
        ('{"messages": [], "thinking": 1}', "chat.json: thinking: expected true, false or null, got 1"),
        ('{"messages": [], "system": 1}', "chat.json: system: expected a string or null, got int"),
        ("[]", "conversation: expected at least one message of the user, got none"),
    ],
)
def test_a_bad_conversation_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content)
    assert main(["verify", "--conversation", str(path)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_saved_chat_can_be_replayed(tmp_path, capsys):
    path = tmp_path / "chat.json"
    messages = list(CONVERSATION[1:3])
    path.write_text(json.dumps({"system": "Be brief.", "messages": messages}))
    assert main(["verify", "--conversation", str(path)]) == 0


def test_tools_and_thinking_of_a_file_are_used(tmp_path, model):
    path = tmp_path / "chat.json"
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    messages = [{"role": "user", "content": "Look."}]
    path.write_text(json.dumps({"messages": messages, "tools": [tool], "thinking": False}))
    replay = read(path)
    ways = list(verify(model, replay.messages, tools=replay.tools, thinking=replay.thinking))
    text = model.template.render(messages, tools=[tool], thinking=False)
    assert ways[0].tokens == len(model.tokenizer.encode(text))
    assert [way.name for way in ways if not way.right] == []


def test_what_save_writes_is_read(tmp_path):
    path, messages = tmp_path / "chat.json", list(CONVERSATION[1:])
    save(path, Conversation("Be brief.", False, messages), "embedded")
    assert read(path) == Replay([{"role": "system", "content": "Be brief."}, *messages], None, False)


def test_the_bound_for_decoded_tokens_is_not_met_by_other_weights(model):
    """Else it would say nothing."""
    other = moelocal.load(dtype="bfloat16")
    tokens = model.tokenizer.encode(model.template.render(list(CONVERSATION)))
    a, b = model(mx.array([tokens]), rows=1), other(mx.array([tokens]), rows=1)
    off = mx.sqrt(mx.mean(mx.square(a - b))) / mx.sqrt(mx.mean(mx.square(a)))
    assert off.item() > DECODED[mx.float32]
