"""How fast a model is on this machine, alone and beside other programs. The same as `moelocal bench`:

    python benchmarks/speed.py [--model NAME] [--against mlx-lm] [--against localhost:1234[=MODEL]]
                               [--contexts 0,4096,32k] [--tokens N] [--rounds N] [--loads N] [--plot FILE] [--json]

- A run reads a prompt of a known number of tokens (Python's documentation, behind a number that no other prompt begins
  with) on an empty cache and decodes greedily behind it; stop tokens do not stop it.
- decode: tokens after the first over their time. prefill: tokens of the prompt over the time to the first token, from
  the text (ours and mlx-lm's tokenizing included) or, for a server, from the request.
- load: the call that loads weights, tokenizer and template, in a fresh interpreter, imports excluded, files in the
  system's cache. MLX memory: the most that MLX held during a run. Resident memory: the most that the process had
  since it started, while it had read no longer prompt; contexts grow in a round, so all rounds count at the last one.
- J/token: of the whole machine, where it tells (macOS with zeus-apple-silicon; RAPL on Linux where everybody may read).
- of limit: decoding beside a program that does nothing but move the bytes that a token needs at least (weights of the
  experts that run and of all else, states, keys and values), as fast as MLX's device copies memory here, measured.

moelocal and mlx-lm each run in a process of their own. If both fit into memory they stay loaded and take turns run by
run; if not, each is loaded anew in every round, alone. A context is read and decoded once per process before it counts.
A figure is the median over the rounds, with the least and the largest; a ratio is the geometric mean over pairs of runs
on the same prompt, with a 95 % interval by Student's t of their logarithms. mlx-lm runs with MLX's own environment,
without what moelocal sets for itself; on the CPU in float32, as ours does, since MLX's product of experts knows no
other there.

The tokens of each pair are compared. Those of a server are known as text only: it is cut by our tokenizer, without the
marks of thinking. Its figures include HTTP, and its model may be quantized in another way: its user has to know.

Load other than this benchmark's own makes seconds noise; ratios suffer less.
"""

from __future__ import annotations

import argparse
import sys

from moelocal.bench.command import add_flags, run
from moelocal.chat.command import exit_code

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=run.__doc__)
    add_flags(parser)
    sys.exit(exit_code(run, parser.parse_args()))
