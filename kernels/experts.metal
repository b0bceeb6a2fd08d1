// The expert block of few tokens in two launches: what is inside the experts (gate, up, SwiGLU), then the way down
// with the weights, the shared expert and the residual in one sum.
//
// Shapes    x, residual, y [N, H] in T; chosen uint32 [N, K], weights float32 [N, K], share float32 [N, 1];
//           gate_up packed [E, 2I, H] (gate above up), down packed [E, H, I]; the shared expert's alike without E, of
//           width J, with bits and groups of its own; scales and biases of any float type.
//           inner [N, K * I + J] in T: the chosen experts of a token one after the other, then the shared one. J = 0
//           and its arrays are not touched without SHARED; residual is not without RESIDUAL.
//           H, I and J are multiples of the groups and need not be multiples of anything else.
// Threads   a simdgroup owns ROWS neighbouring rows of one token: of gate and of up of one expert in the first launch,
//           of y in the second. In place of rows past the end the last one is computed again, and not written.
//           No barriers, no threadgroup memory: simdgroups of a threadgroup have nothing to do with each other.
// Numerics  float32 inside, T only in memory: inner is rounded once to T (a stock product rounds gate and up as well),
//           y once, after the sum over experts, shared expert and residual.
// Traffic   each token reads the weights of its experts and of the shared one once. x, inner and y are kilobytes; they
//           come from the caches, 1 / ROWS times a row. Tokens that choose the same expert read it again.

#include "affine.metal"

// inner[row ...] = silu(gate x) * (up x) for ROWS rows of one expert's gate_up [2 * width, cols].
template <int BITS, int GROUP, int ROWS, typename T, typename S>
METAL_FUNC void experts_swiglu(
    const device T* x,
    const device uint* packed,
    const device S* scales,
    const device S* biases,
    device T* inner,
    uint width,
    uint cols,
    uint row,
    uint lane) {
  uint rows[2 * ROWS];
  float sums[2 * ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r] = min(row + r, width - 1);
    rows[ROWS + r] = width + rows[r];
    sums[r] = sums[ROWS + r] = 0.0f;
  }
  affine_rows<BITS, GROUP, 2 * ROWS>(x, packed, scales, biases, rows, cols, lane, sums);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float gate = simd_sum(sums[r]), up = simd_sum(sums[ROWS + r]);
    if (lane == 0 && row + r < width) {
      inner[row + r] = T(gate / (1.0f + metal::precise::exp(-gate)) * up);
    }
  }
}

template <int BITS, int GROUP, bool SHARED, int SHARED_BITS, int SHARED_GROUP, int ROWS, typename T, typename S,
          typename S2, typename C>
METAL_FUNC void experts_inner(
    const device T* x,
    const device uint* packed,
    const device S* scales,
    const device S* biases,
    const device uint* shared_packed,
    const device S2* shared_scales,
    const device S2* shared_biases,
    C chosen,
    device T* inner,
    uint per_token,
    uint width,
    uint shared_width,
    uint hidden,
    uint token,
    uint block,
    uint lane) {
  const uint blocks = (width + ROWS - 1) / ROWS;
  x += size_t(token) * hidden;
  inner += size_t(token) * (per_token * width + shared_width);
  if (block < per_token * blocks) {
    const uint slot = block / blocks;
    const size_t first = size_t(chosen[token * per_token + slot]) * 2 * width;  // row of the stacked matrices
    const size_t group = first * (hidden / GROUP);
    experts_swiglu<BITS, GROUP, ROWS>(x, packed + first * (hidden / 32 * BITS), scales + group, biases + group,
        inner + slot * width, width, hidden, (block - slot * blocks) * ROWS, lane);
  } else if (SHARED) {
    experts_swiglu<SHARED_BITS, SHARED_GROUP, ROWS>(x, shared_packed, shared_scales, shared_biases,
        inner + per_token * width, shared_width, hidden, (block - per_token * blocks) * ROWS, lane);
  }
}

template <int BITS, int GROUP, bool SHARED, int SHARED_BITS, int SHARED_GROUP, int ROWS, bool RESIDUAL, typename T,
          typename S, typename S2, typename C, typename W, typename G>
METAL_FUNC void experts_sum(
    const device T* inner,
    const device uint* packed,
    const device S* scales,
    const device S* biases,
    const device uint* shared_packed,
    const device S2* shared_scales,
    const device S2* shared_biases,
    C chosen,
    W weights,
    G share,
    const device T* residual,
    device T* y,
    uint per_token,
    uint width,
    uint shared_width,
    uint hidden,
    uint token,
    uint block,
    uint lane) {
  const uint row = block * ROWS;
  uint rows[ROWS];
  float totals[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r] = min(row + r, hidden - 1);
    totals[r] = 0.0f;
  }
  inner += size_t(token) * (per_token * width + shared_width);
  for (uint slot = 0; slot < per_token; slot++) {
    const size_t first = size_t(chosen[token * per_token + slot]) * hidden;
    const size_t group = first * (width / GROUP);
    float sums[ROWS] = {0.0f};
    affine_rows<BITS, GROUP, ROWS>(inner + slot * width, packed + first * (width / 32 * BITS), scales + group,
        biases + group, rows, width, lane, sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      totals[r] += float(weights[token * per_token + slot]) * sums[r];
    }
  }
  if (SHARED) {
    float sums[ROWS] = {0.0f};
    affine_rows<SHARED_BITS, SHARED_GROUP, ROWS>(inner + per_token * width, shared_packed, shared_scales,
        shared_biases, rows, shared_width, lane, sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      totals[r] += float(share[token]) * sums[r];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float total = simd_sum(totals[r]);
    if (lane == 0 && row + r < hidden) {
      const size_t at = size_t(token) * hidden + row + r;
      y[at] = T(RESIDUAL ? float(residual[at]) + total : total);
    }
  }
}
