// Residual add and RMS norm in one pass: h = x + r, y = h / sqrt(mean(h^2) + eps) * w.
//
// Shapes    x, r, h, y [rows, size] in T; weight [size] float32. Any size from 1.
// Threads   as rms_norm.
// Numerics  the sum is rounded to T first, as a reader of h sees it; the norm of that is float32, y is rounded once.
// Traffic   reads x and r once, the weight once per row, and h once more, from the cache and by the thread that wrote
//           it; writes h and y.

#include "rms_norm.metal"

template <typename T>
METAL_FUNC void add_norm(
    const device T* x,
    const device T* r,
    const device float* weight,
    device T* h,
    device T* y,
    threadgroup float* partial,
    uint size,
    float eps,
    uint row,
    uint thread_index,
    uint threads,
    uint lane,
    uint simdgroup) {
  const size_t start = size_t(row) * size;
  float squares = 0.0f;
  for (uint i = thread_index; i < size; i += threads) {
    const T sum = T(float(x[start + i]) + float(r[start + i]));
    h[start + i] = sum;
    squares += float(sum) * float(sum);
  }
  const float factor = rms_factor(squares, partial, size, eps, threads, lane, simdgroup);
  for (uint i = thread_index; i < size; i += threads) {
    y[start + i] = T(float(h[start + i]) * factor * weight[i]);
  }
}
