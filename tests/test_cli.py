"""The command line: exit codes, what goes to which stream, pipes. The models are scripted."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import moelocal
from moelocal.chat import conversation
from moelocal.chat.command import FLAGSHIP, SAMPLING_FLAGS
from moelocal.cli import main
from moelocal.engine.completion import Completion, Event, Timing, Usage
from moelocal.engine.sampling import Sampling
from moelocal.errors import ModelNotFound
from moelocal.text.tool_calls import ToolCall

# A program with a model that answers with what it was told, or talks until it is stopped.
SCRIPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits that Ctrl-C is ignored
from types import SimpleNamespace
import moelocal
from moelocal.cli import main
from moelocal.engine.completion import Completion, Event, Timing, Usage

def stream(model, prompt, **options):
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    while text == "forever":
        yield Event(text="again and again ", tokens=(1,))
    yield Event(text=text.upper(), reasoning="hm", tokens=(1,))
    timing = Timing(0.1, 0.2, 10.0, 20.0, 30_000_000)
    yield Event(completion=Completion(text.upper(), "hm", (), (1,), "stop", Usage(3, 1), timing))

moelocal.stream = stream
moelocal.load = lambda *args, **options: SimpleNamespace(
    name="scripted", defaults=moelocal.Sampling(), session=lambda: None
)
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments, stdin=b""):
    return subprocess.run(
        [sys.executable, "-c", SCRIPTED, *arguments],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def engine(monkeypatch):
    """Replaces the library behind the command line in this process; keeps what it was asked."""
    asked = SimpleNamespace(load=None, prompt=None, options=None)
    done = Completion(
        "Hällo",
        "hm",
        (ToolCall("f", {"n": 1}),),
        (5, 6),
        "stop",
        Usage(3, 2, 1),
        Timing(0.1, 0.2, 10.0, 20.0, 30_000_000),
    )

    def load(name, **options):
        asked.load = (name, options)
        if name == "nowhere":
            raise ModelNotFound("nowhere: no such folder")
        return SimpleNamespace(name=name, defaults=Sampling(temperature=0.6, top_k=20), session=lambda: None)

    def generate(model, prompt, **options):
        asked.prompt, asked.options = prompt, options
        return done

    def stream(model, prompt, **options):
        generate(model, prompt, **options)
        yield Event(text=done.text, reasoning=done.reasoning, tokens=done.tokens)
        yield Event(completion=done)

    for name, function in (("load", load), ("generate", generate), ("stream", stream)):
        monkeypatch.setattr(moelocal, name, function, raising=False)
    return asked


def test_help_loads_nothing_that_it_does_not_need():
    code = (
        "import sys\nfrom moelocal.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', sorted({each.split('.')[0] for each in sys.modules} & "
        "{'prompt_toolkit', 'rich', 'transformers', 'torch', 'huggingface_hub'}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: moelocal [-h] COMMAND")
    assert shown.endswith("LOADED []\n")


def test_chat_and_its_module_are_one_program():
    shown = [
        subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=True).stdout
        for arguments in (["moelocal.chat", "--help"], ["moelocal", "chat", "--help"])
    ]
    assert shown[0].partition("\n\n")[2] == shown[1].partition("\n\n")[2]
    assert "--no-thinking" in shown[0]


def test_version(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["chat", "--seed", "x"],
        ["generate"],
        ["generate", "a", "--dtype", "int3"],
        ["chat", "--system", "\udcff"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: moelocal")


def test_an_argument_that_is_not_utf8(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a\udcff"])
    assert (
        "argument PROMPT: argument: expected UTF-8, got the byte 0xff at position 1"
        in capsys.readouterr().err
    )


def test_an_error_of_ours_is_one_line_and_1(engine, capsys):
    assert main(["generate", "Hi", "--model", "nowhere"]) == 1
    assert capsys.readouterr() == ("", "moelocal: error: nowhere: no such folder\n")


def test_impossible_sampling_is_refused_before_the_model_loads(engine, capsys):
    assert main(["chat", "--prompt", "Hi", "--top-p", "2"]) == 1
    expected = "moelocal: error: sampling: top_p: expected a number above 0, at most 1, got 2.0\n"
    assert capsys.readouterr().err == expected
    assert engine.load is None


def test_generate(engine, capsys):
    assert main(["generate", "Hi", "--model", "m", "--offline", "--revision", "r", "--dtype", "float16"]) == 0
    assert capsys.readouterr() == ("Hällo\n", "")
    asked = {"revision": "r", "quantization": "auto", "dtype": "float16", "snapshots": "0", "offline": True}
    asked |= {"context": None, "kv_bits": None, "progress": False}
    assert engine.load == ("m", asked)
    assert engine.prompt == "Hi"
    assert engine.options == {
        "sampling": Sampling(temperature=0.6, top_k=20),
        "seed": None,
        "max_tokens": None,
        "stop": (),
        "thinking": None,
        "raw": False,
    }


def test_generate_flags(engine):
    flags = ["--temperature", "0.5", "--seed", "7", "--max-tokens", "9", "--stop", "a", "--stop", "b"]
    assert main(["generate", "Hi", "--model", "m", "--system", "Short.", "--no-thinking", *flags]) == 0
    assert engine.prompt == [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    # What a flag does not say stays as the checkpoint recommends.
    assert engine.options == {
        "sampling": Sampling(temperature=0.5, top_k=20),
        "seed": 7,
        "max_tokens": 9,
        "stop": ("a", "b"),
        "thinking": False,
        "raw": False,
    }


def test_every_sampling_flag_is_a_field(engine):
    values = dict.fromkeys(SAMPLING_FLAGS, 1)
    flags = [part for name in values for part in ("--" + name.replace("_", "-"), "1")]
    assert main(["generate", "Hi", "--model", "m", *flags]) == 0
    assert engine.options["sampling"] == Sampling(**values)


def test_generate_json(engine, capsys):
    assert main(["generate", "Hi", "--model", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "Hällo",
        "reasoning": "hm",
        "tool_calls": [{"name": "f", "arguments": {"n": 1}, "id": ""}],
        "tokens": [5, 6],
        "finish_reason": "stop",
        "usage": {"prompt": 3, "completion": 2, "cached": 1, "miss": None},
        "timing": {
            "first_token_seconds": 0.1,
            "total_seconds": 0.2,
            "prefill_tokens_per_second": 10.0,
            "decode_tokens_per_second": 20.0,
            "peak_memory_nbytes": 30_000_000,
        },
        "logprobs": None,
    }


def test_one_shot_chat(engine, capsys):
    assert main(["chat", "--prompt", "Hi\nyou", "--system", "Short."]) == 0
    out, err = capsys.readouterr()
    assert out == "Hällo\n"
    assert err.splitlines()[1] == f"  python -m moelocal.chat --model {FLAGSHIP}"
    assert err.splitlines()[-1].startswith("[2 tokens · 20.0 tokens/s")
    assert engine.load[0] is None
    assert engine.prompt == [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi\nyou"}]


def test_chat_in_a_pipe(tmp_path):
    path = tmp_path / "chat.json"
    done = run("chat", stdin=f"grüße\n\nzwei 🦩\n/save {path}\n/quit\nnever".encode())
    assert done.returncode == 0
    assert done.stdout.decode() == "GRÜSSE\nZWEI 🦩\n"
    assert "\x1b" not in done.stdout.decode() + done.stderr.decode()
    assert "4 messages written" in done.stderr.decode()
    assert len(conversation.load(path)[0].messages) == 4


def test_bytes_that_are_not_utf8_in_a_pipe():
    done = run("chat", stdin=b"ok\n\xc3(\n")
    assert done.returncode == 1
    assert done.stdout == b"OK\n"
    last = done.stderr.decode().splitlines()[-1]
    assert last == "moelocal: error: standard input, line 2: expected UTF-8, got the byte 0xc3 at position 0"
    done = run("generate", "-", stdin=b"\xff")
    assert done.returncode == 1
    expected = "moelocal: error: standard input: expected UTF-8, got the byte 0xff at position 0"
    assert done.stderr.decode().splitlines()[-1] == expected


def test_generate_reads_standard_input():
    assert run("generate", "-", stdin=b"two\nlines").stdout == b"TWO\nLINES\n"


def test_an_error_in_a_pipe_is_one_line():
    done = run("chat", stdin=b"/load nowhere\n")
    assert done.returncode == 1
    expected = "moelocal: error: nowhere: cannot be read: No such file or directory"
    assert done.stderr.decode().splitlines()[-1] == expected


@pytest.mark.parametrize("command", [["chat", "--prompt", "forever"], ["generate", "forever"]])
def test_a_reader_that_leaves_is_no_error(command):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout.read(5) == b"again"
        program.stdout.close()
        assert program.wait(timeout=30) == 0
        assert b"Traceback" not in program.stderr.read()


def test_interrupt_ends_a_pipe_with_130():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, "chat", "--prompt", "forever"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout.read(5) == b"again"
        program.send_signal(signal.SIGINT)
        program.stdout.read()
        assert program.wait(timeout=30) == 130
        assert b"Traceback" not in program.stderr.read()


def test_a_dialogue_at_a_terminal(tmp_path):
    """Keys as a person types them: an answer stopped with Ctrl-C, a pasted text of two lines, Ctrl-D."""
    environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, "chat"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    ) as program:
        os.close(theirs)
        shown = ""

        def expect(text: str) -> None:
            nonlocal shown
            while text not in shown:
                if not select.select([ours], [], [], 20)[0]:
                    program.kill()
                    raise AssertionError(f"expected {text!r} after {shown!r}")
                new = os.read(ours, 65536).decode(errors="replace")
                if "\x1b[6n" in new:  # the program asks where the cursor is
                    os.write(ours, b"\x1b[1;1R")
                shown += new
            shown = shown.split(text, 1)[1]

        expect(">")
        os.write(ours, b"forever\r")
        expect("again and again")
        program.send_signal(signal.SIGINT)
        expect("stays in the conversation")
        expect(">")
        os.write(ours, b"\x1b[200~one\ntwo\x1b[201~")
        expect("two")
        os.write(ours, b"\r")
        expect("ONE\r\nTWO")
        expect(">")
        os.write(ours, b"\x04")
        assert program.wait(timeout=20) == 0
    os.close(ours)
