"""The operations of the model, each in up to four forms; `op.py` alone chooses between them."""

from moelocal.ops.op import force

__all__ = ["force"]
