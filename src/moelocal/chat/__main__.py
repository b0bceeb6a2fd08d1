"""`python -m moelocal.chat`: the same as `moelocal chat`."""

import sys

from moelocal.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]], program="python -m moelocal"))
