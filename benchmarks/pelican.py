"""Pelicans: `moelocal pelican` as a script, with the same flags.

python benchmarks/pelican.py --count 12
python benchmarks/pelican.py --model embedded --server localhost:1234 --svgs others --blind
"""

from __future__ import annotations

import argparse
import sys

from moelocal.chat.command import exit_code
from moelocal.pelican.command import add_flags, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=run.__doc__)
    add_flags(parser)
    sys.exit(exit_code(run, parser.parse_args()))
