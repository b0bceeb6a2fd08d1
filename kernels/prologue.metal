// What stands between the projections of an attention layer and its cache: RMS norm of the query and key heads, rotary
// embedding of their first R elements, and all of it in the layout of attention.
//
// Shapes    q [B, T, heads * D], or per head [q D | gate D] where GATED (the gate is not read); k, v [B, T, kv * D], in
//           T, as they lie in the output of one projection; norms float32 [D]; frequencies float32 [R / 2], radians per
//           position; offset int [1] or [B], the position of the first token
//           -> rotated [B, heads, T, D]; stored [2 B, kv, T, D]: the keys of all rows, then the values of all rows.
//           D from 8, R even and from 2 to D.
// Threads   one simdgroup per (row, token, head), query heads first, then keys, then values. A lane owns the pairs
//           (p, p + R / 2) for p = lane, lane + 32, ... and, of the elements that do not turn, R + lane, R + lane + 32,
//           ... so that it rotates what is in its own registers. No threadgroup memory, no barrier.
// Numerics  float32 from the first read to the last rounding, through the norm and the rotation. The angle is the
//           float32 product of position and frequency, as in MLX's rope: half a unit in its last place is up to 8e-3
//           radians at position 262144.
// Traffic   reads and writes every element once (the gate excepted), and the norms from the cache.

template <typename T, uint D, uint R, bool GATED, typename F, typename P, typename S>
METAL_FUNC void prologue(
    const device T* q,
    const device T* k,
    const device T* v,
    const device float* q_norm,
    const device float* k_norm,
    F frequencies,
    P offset,
    device T* rotated,
    device T* stored,
    S q_strides,
    S k_strides,
    S v_strides,
    uint rows,
    uint times,
    uint offsets,
    uint heads,
    uint kv_heads,
    float eps,
    uint head,
    uint time,
    uint row,
    uint lane) {
  const bool is_q = head < heads;
  const bool is_k = !is_q && head < heads + kv_heads;
  const uint kv_head = (head - heads) % kv_heads;

  const device T* from = is_q ? q : is_k ? k : v;
  const size_t step = is_q ? q_strides[2] : is_k ? k_strides[2] : v_strides[2];
  from += is_q ? size_t(row) * q_strides[0] + size_t(time) * q_strides[1] + size_t(head) * (GATED ? 2 * D : D) * step
      : is_k   ? size_t(row) * k_strides[0] + size_t(time) * k_strides[1] + size_t(kv_head) * D * step
               : size_t(row) * v_strides[0] + size_t(time) * v_strides[1] + size_t(kv_head) * D * step;
  const size_t stored_row = is_k ? size_t(row) : size_t(rows) + row;
  device T* to = is_q ? rotated + ((size_t(row) * heads + head) * times + time) * D
                      : stored + ((stored_row * kv_heads + kv_head) * times + time) * D;

  if (!is_q && !is_k) {
    for (uint i = lane; i < D; i += 32) {
      to[i] = from[i * step];
    }
    return;
  }

  constexpr uint HALF = R / 2;
  constexpr uint PAIRS = (HALF + 31) / 32;
  constexpr uint REST = (D - R + 31) / 32;
  float first[PAIRS];
  float second[PAIRS];
  float rest[REST + 1];  // an array of no elements is none
  float squares = 0.0f;
#pragma unroll
  for (uint i = 0; i < PAIRS; ++i) {
    const uint p = lane + 32 * i;
    if (p < HALF) {
      first[i] = float(from[p * step]);
      second[i] = float(from[(p + HALF) * step]);
      squares += first[i] * first[i] + second[i] * second[i];
    }
  }
#pragma unroll
  for (uint i = 0; i < REST; ++i) {
    const uint p = R + lane + 32 * i;
    if (p < D) {
      rest[i] = float(from[p * step]);
      squares += rest[i] * rest[i];
    }
  }
  const float factor = metal::precise::rsqrt(simd_sum(squares) / float(D) + eps);

  const device float* norm = is_q ? q_norm : k_norm;
  const float position = float(offset[offsets == 1 ? 0 : row] + int(time));
#pragma unroll
  for (uint i = 0; i < PAIRS; ++i) {
    const uint p = lane + 32 * i;
    if (p < HALF) {
      const float angle = position * frequencies[p];
      const float c = metal::precise::cos(angle);
      const float s = metal::precise::sin(angle);
      const float x = first[i] * factor * norm[p];
      const float y = second[i] * factor * norm[p + HALF];
      to[p] = T(x * c - y * s);
      to[p + HALF] = T(x * s + y * c);
    }
  }
#pragma unroll
  for (uint i = 0; i < REST; ++i) {
    const uint p = R + lane + 32 * i;
    if (p < D) {
      to[p] = T(rest[i] * factor * norm[p]);
    }
  }
}
