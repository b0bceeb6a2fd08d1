// The router's logits: y = W x in float32 for a packed W and x in T, without a float32 copy of x or of the scales.
//
// Shapes    x [N, H] in T; W packed affine [rows, H] with scales and biases of any float type; y [N, rows] float32.
//           H is a multiple of the groups; rows is any number (256 experts and the shared expert's gate make 257).
// Threads   a simdgroup owns ROWS neighbouring rows of one token. A last block that is not full computes its last row
//           again. No barriers, no threadgroup memory.
// Numerics  float32 throughout (affine.metal).
// Traffic   reads W once per token and x 1 / ROWS times a row, from the caches; writes y once.

#include "affine.metal"

template <int BITS, int GROUP, int ROWS, typename T, typename S>
METAL_FUNC void router(
    const device T* x,
    const device uint* packed,
    const device S* scales,
    const device S* biases,
    device float* y,
    uint rows,
    uint cols,
    uint token,
    uint block,
    uint lane) {
  const uint row = block * ROWS;
  if (row >= rows) {
    return;
  }
  uint chosen[ROWS];
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    chosen[r] = min(row + r, rows - 1);
    sums[r] = 0.0f;
  }
  affine_rows<BITS, GROUP, ROWS>(x + size_t(token) * cols, packed, scales, biases, chosen, cols, lane, sums);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = simd_sum(sums[r]);
    if (lane == 0 && row + r < rows) {
      y[size_t(token) * rows + row + r] = sum;
    }
  }
}
