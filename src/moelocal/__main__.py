"""`python -m moelocal`: the same as `moelocal`."""

import sys

from moelocal.cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m moelocal"))
