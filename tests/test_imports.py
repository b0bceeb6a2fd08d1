"""`import moelocal` is cheap: it loads no framework, opens no model and no connection. (How long it takes is
printed by the benchmarks; seconds are no matter for a test.)"""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
opened, sockets = [], []
def note(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))
    elif event.startswith("socket."):
        sockets.append(event)
sys.addaudithook(note)
{statement}
print(json.dumps({"modules": sorted(sys.modules), "opened": opened, "sockets": sockets}))
"""
HEAVY = {
    *("torch", "transformers", "mlx_lm", "mlx.nn", "mlx.optimizers"),
    *("huggingface_hub", "httpx", "requests", "rich", "prompt_toolkit", "matplotlib", "asyncio"),
}


def trace(statement: str) -> dict:
    program = PROGRAM.replace("{statement}", statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_loads_no_framework():
    found = HEAVY & set(trace("import moelocal")["modules"])
    assert not found


def test_import_opens_no_model_and_no_connection():
    seen = trace("import moelocal")
    assert not [
        file for file in seen["opened"] if "embedded" in file or file.endswith((".json", ".safetensors"))
    ]
    assert seen["sockets"] == []


def test_the_trace_sees_what_it_looks_for(tmp_path):
    # the control: a program that does all three
    (tmp_path / "config.json").write_text("{}")
    seen = trace(f"import socket, asyncio; socket.socket(); open({str(tmp_path / 'config.json')!r})")
    assert "asyncio" in HEAVY & set(seen["modules"])
    assert "socket.__new__" in seen["sockets"]
    assert str(tmp_path / "config.json") in seen["opened"]
