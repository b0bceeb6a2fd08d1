"""`python -m moelocal.chat`."""

import sys

from moelocal.chat.command import main

if __name__ == "__main__":
    sys.exit(main())
