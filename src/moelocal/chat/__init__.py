"""The chat program: `python -m moelocal.chat`, or `moelocal chat`."""
