"""The memory of MLX arrays: what a kernel gets, and what it made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from offmetal.machine import Buffer


class _PyBuffer(ctypes.Structure):
    """Py_buffer of CPython: `memoryview` hides the address."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_PYBUF_STRIDES = 0x18


def _view(array: Any) -> memoryview:
    return memoryview(array)  # the stubs of MLX do not tell that an array can be viewed


def evaluate(arrays: Sequence[mx.array]) -> None:
    """Raises `RuntimeError` inside a function that MLX traces: the simulator runs at once, not lazily."""
    try:
        mx.eval(arrays)
    except Exception as error:
        if any(word in str(error) for word in ("tracer", "compile", "transformation")):
            raise RuntimeError(
                "a simulated Metal kernel runs at once, not lazily: call mx.disable_compile() first"
            ) from error
        raise


def contiguous(array: mx.array) -> mx.array:
    return array if _view(array).c_contiguous else mx.contiguous(array)


def of_input(name: str, array: mx.array) -> Buffer:
    """The memory that an evaluated array covers, which strides may leave holes in. Valid while the array lives."""
    view = _view(array)
    raw = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(array), ctypes.byref(raw), _PYBUF_STRIDES)
    address = raw.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))
    if not array.size:
        return Buffer(name, address, 0, 0, array.itemsize)
    reach = [
        stride * (length - 1) for stride, length in zip(view.strides or (), view.shape or (), strict=True)
    ]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + array.itemsize
    return Buffer(name, address + low, high - low, -low, array.itemsize)


def description(array: mx.array, what: str) -> np.ndarray[Any, Any]:
    """MLX's `<input>_shape`, `<input>_strides` (in elements) or `<input>_ndim`."""
    if what == "shape":
        return np.array(array.shape, np.int32)
    if what == "strides":
        return np.array([stride // array.itemsize for stride in _view(array).strides or ()], np.int64)
    return np.array([array.ndim], np.int32)


def of_numpy(
    name: str, array: np.ndarray[Any, Any], *, output: bool = False, initialised: bool = True
) -> Buffer:
    """Valid while the array lives."""
    return Buffer(name, array.ctypes.data, array.nbytes, 0, array.itemsize, output, initialised)


def output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray[Any, Any]:
    """Memory for an output: `init_value`, or what shows where nobody wrote (NaN, -1, true). bfloat16 lies in uint16."""
    kind = np.dtype(np.uint16 if dtype == mx.bfloat16 else str(dtype).rpartition(".")[2].rstrip("_"))
    if init_value is not None:
        value = mx.array(init_value, dtype)
        return np.full(shape, np.array(value.view(mx.uint16) if dtype == mx.bfloat16 else value), kind)
    made = np.empty(shape, kind)
    made.reshape(-1).view(np.uint8)[:] = 1 if dtype == mx.bool_ else 0xFF
    return made


def to_mlx(array: np.ndarray[Any, Any], dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)
