// RMS norm: y = x / sqrt(mean(x^2) + eps) * w. With a float32 weight and 16-bit x, MLX's own takes three launches.
//
// Shapes    x, y [rows, size] in T; weight [size] float32. Any size from 1.
// Threads   one threadgroup of `threads` (a multiple of 32, at most 1024) per row; a thread owns the elements
//           thread, thread + threads, ... of its row.
// Numerics  float32 inside, y is rounded once.
// Traffic   reads the row twice, the second time from the cache, and the weight once per row; writes the row.

// 1 / sqrt(mean + eps) of a row, from each thread's sum of squares. `partial` has one float per simdgroup.
METAL_FUNC float rms_factor(
    float squares,
    threadgroup float* partial,
    uint size,
    float eps,
    uint threads,
    uint lane,
    uint simdgroup) {
  squares = simd_sum(squares);
  if (lane == 0) {
    partial[simdgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = simd_sum(lane < threads / 32 ? partial[lane] : 0.0f);
  return metal::precise::rsqrt(squares / float(size) + eps);
}

template <typename T>
METAL_FUNC void rms_norm(
    const device T* x,
    const device float* weight,
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
    const float value = float(x[start + i]);
    squares += value * value;
  }
  const float factor = rms_factor(squares, partial, size, eps, threads, lane, simdgroup);
  for (uint i = thread_index; i < size; i += threads) {
    y[start + i] = T(float(x[start + i]) * factor * weight[i]);
  }
}
