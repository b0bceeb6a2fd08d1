// Attention of few queries over a long cache, keys and values read once for all query heads that share them.
//
// Shapes    q [B, heads, times, D] in T; k, v [B, kv, keys, D], the last axis dense, of which the first `keys` exist,
//           in T here (`PlainRows`), in codes with the reader of attend_packed.metal; query head h reads head
//           h / (heads / kv), the last query stands at the last key and sees all of them.
//           Pass 1 -> partial float32 [B, heads, times, blocks, D], the sum of exp(score - maximum) * value over a
//           block of keys, and stats float32 [B, heads, times, blocks, 2], its maximum and its sum of exponentials.
//           Pass 2 -> out [B, times, heads * D] in T, times the sigmoid of gate [B, times, heads, D] where GATED.
//           D = 32 n. Any number of keys from `times` on, any ratio of heads, any batch.
// Threads   Pass 1: a threadgroup of SIMDGROUPS has one block of one key-value head and ROWS of the
//           heads / kv * times rows that read it, and goes through the block in tiles of TILE keys. For the scores a
//           simdgroup owns some keys, a lane D / 32 elements of each; for the softmax a simdgroup owns some rows; for
//           the sum over values a thread owns D / (32 * SIMDGROUPS) columns of all rows. ROWS is a power of two up to
//           16, rows that are not there are computed on zeros and not written; TILE = 32 n.
//           Pass 2: a threadgroup of SIMDGROUPS has one row; a simdgroup owns every SIMDGROUPS-th block, a lane D / 32
//           columns.
// Numerics  float32 from the first read to the one rounding of the output. Every tile is scored before any exponential
//           is taken: the running maximum moves once per tile. No infinities: a key that a query does not see has the
//           weight zero, a row that sees nothing of a block the maximum `LOWEST` and the sum zero.
// Traffic   pass 1 reads every key and value once per ROWS rows (once at all where heads / kv * times <= ROWS), nothing
//           behind the last key, and q once per block; it writes, and pass 2 reads, D + 2 floats per row and block.
// Geometry  keys need not divide by anything; the number of blocks is the width of the grid.

constant constexpr float LOWEST = -3.4028235e38f;

// Keys or values [B, kv, keys, D] in T.
template <typename T>
struct PlainRows {
  const device T* place;
  const constant int64_t* strides;  // of batch, head, key

  METAL_FUNC void skip(size_t batch, size_t head, size_t key, uint column) {
    place += batch * strides[0] + head * strides[1] + key * strides[2] + column;
  }

  // COUNT neighbouring columns. The first, with those skipped before, is a multiple of COUNT.
  template <uint COUNT>
  METAL_FUNC void read(size_t key, uint column, thread float* values) const {
#pragma unroll
    for (uint c = 0; c < COUNT; ++c) {
      values[c] = float(place[key * strides[2] + column + c]);
    }
  }
};

template <typename T>
METAL_FUNC PlainRows<T> plain_rows(const device T* place, const constant int64_t* strides) {
  return {place, strides};
}

// Lanes whose numbers differ in `step` add up their values: one keeps the first WIDTH sums, the other the second.
template <uint WIDTH>
METAL_FUNC void exchange(thread float* values, ushort step, uint lane) {
  const bool upper = (lane & step) != 0;
#pragma unroll
  for (uint i = 0; i < WIDTH; ++i) {
    const float kept = upper ? values[i + WIDTH] : values[i];
    const float given = upper ? values[i] : values[i + WIDTH];
    values[i] = kept + simd_shuffle_xor(given, step);
  }
}

// Sums each of N = 8, 16 or 32 values over the lanes of a simdgroup: value i ends up in the lanes from i * 32 / N on.
// With N = 32 that takes 31 shuffles; 32 sums one by one take 160. Written out, so that values stay in registers.
template <uint N>
METAL_FUNC float sums_across(thread float* values, uint lane) {
  exchange<N / 2>(values, 16, lane);
  exchange<N / 4>(values, 8, lane);
  exchange<N / 8>(values, 4, lane);
  if (N >= 16) {
    exchange<N / 16>(values, 2, lane);
  } else {
    values[0] += simd_shuffle_xor(values[0], 2);
  }
  if (N >= 32) {
    exchange<N / 32>(values, 1, lane);
  } else {
    values[0] += simd_shuffle_xor(values[0], 1);
  }
  return values[0];
}

// queries: ROWS * D of T, weights: TILE * ROWS, factors: ROWS floats
template <typename T, uint D, uint ROWS, uint TILE, uint SIMDGROUPS, typename K, typename V, typename S>
METAL_FUNC void attend_block(
    const device T* q,
    K k,
    V v,
    device float* partial,
    device float* stats,
    threadgroup T* queries,
    threadgroup float* weights,
    threadgroup float* factors,
    S q_strides,
    uint heads,
    uint times,
    uint kv_heads,
    uint keys,
    float scale,
    uint block,
    uint blocks,
    uint share,
    uint batch,
    uint simdgroup,
    uint lane) {
  constexpr uint THREADS = 32 * SIMDGROUPS;
  constexpr uint COLUMNS = D / THREADS;
  constexpr uint OWN = D / 32;
  constexpr uint CHUNK = OWN % 4 == 0 ? 4 : OWN % 2 == 0 ? 2 : 1;
  constexpr uint KEYS = ROWS < 4 ? 8 : 32 / ROWS;  // scored at once by a simdgroup
  constexpr uint LANES = 32 / (KEYS * ROWS);       // that get to know each score
  constexpr uint OWNED = (ROWS + SIMDGROUPS - 1) / SIMDGROUPS;

  const uint thread_index = simdgroup * 32 + lane;
  const uint kv_head = share % kv_heads;
  const uint ratio = heads / kv_heads;
  const uint first = share / kv_heads * ROWS;  // of the ratio * times rows of this key-value head
  const uint rows = min(ROWS, ratio * times - first);
  k.skip(batch, kv_head, 0, 0);
  v.skip(batch, kv_head, 0, 0);
  q += size_t(batch) * q_strides[0] + size_t(kv_head * ratio) * q_strides[1];

  for (uint i = thread_index; i < ROWS * D; i += THREADS) {
    const uint row = i / D;
    T value = T(0.0f);
    if (row < rows) {
      value = q[size_t((first + row) / times) * q_strides[1] + size_t((first + row) % times) * q_strides[2] + i % D];
    }
    queries[i] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float sums[ROWS * COLUMNS] = {0.0f};
  float maximum[OWNED];
  float total[OWNED];
#pragma unroll
  for (uint i = 0; i < OWNED; ++i) {
    maximum[i] = LOWEST;
    total[i] = 0.0f;
  }

  const uint tiles = (keys + TILE - 1) / TILE;
  const uint tiles_each = (tiles + blocks - 1) / blocks;
  const uint stop = min(tiles, (block + 1) * tiles_each) * TILE;
  for (uint start = block * tiles_each * TILE; start < stop; start += TILE) {
    const uint count = min(TILE, keys - start);

    for (uint next = simdgroup * KEYS; next < count; next += SIMDGROUPS * KEYS) {
      float scores[KEYS * ROWS] = {0.0f};
      K from = k;
      from.skip(0, 0, start + next, lane * OWN);
      for (uint chunk = 0; chunk < OWN; chunk += CHUNK) {
        float held[KEYS * CHUNK];
#pragma unroll
        for (uint j = 0; j < KEYS; ++j) {
          if (next + j < count) {
            from.template read<CHUNK>(j, chunk, held + j * CHUNK);
          } else {
#pragma unroll
            for (uint c = 0; c < CHUNK; ++c) {
              held[j * CHUNK + c] = 0.0f;
            }
          }
        }
#pragma unroll
        for (uint row = 0; row < ROWS; ++row) {
#pragma unroll
          for (uint c = 0; c < CHUNK; ++c) {
            const float x = float(queries[row * D + lane * OWN + chunk + c]);
#pragma unroll
            for (uint j = 0; j < KEYS; ++j) {
              scores[j * ROWS + row] += x * held[j * CHUNK + c];
            }
          }
        }
      }
      const float score = sums_across<KEYS * ROWS>(scores, lane) * scale;
      if (lane % LANES == 0 && next + lane / LANES / ROWS < count) {
        weights[next * ROWS + lane / LANES] = score;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
    for (uint i = 0; i < OWNED; ++i) {
      const uint row = simdgroup + i * SIMDGROUPS;
      if (row < ROWS) {
        const uint sees = keys - times + (first + row) % times + 1;
        const uint seen = sees > start ? min(count, sees - start) : 0;
        float highest = maximum[i];
        for (uint key = lane; key < seen; key += 32) {
          highest = max(highest, weights[key * ROWS + row]);
        }
        highest = simd_max(highest);
        float sum = 0.0f;
        for (uint key = lane; key < count; key += 32) {
          const float weight = key < seen ? metal::precise::exp(weights[key * ROWS + row] - highest) : 0.0f;
          weights[key * ROWS + row] = weight;
          sum += weight;
        }
        const float factor = metal::precise::exp(maximum[i] - highest);
        total[i] = total[i] * factor + simd_sum(sum);
        maximum[i] = highest;
        if (lane == 0) {
          factors[row] = factor;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
    for (uint row = 0; row < ROWS; ++row) {
#pragma unroll
      for (uint c = 0; c < COLUMNS; ++c) {
        sums[row * COLUMNS + c] *= factors[row];
      }
    }
    V from = v;
    from.skip(0, 0, start, thread_index * COLUMNS);
    for (uint key = 0; key < count; ++key) {
      float values[COLUMNS];
      from.template read<COLUMNS>(0, 0, values);
#pragma unroll
      for (uint c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (uint row = 0; row < ROWS; ++row) {
          sums[row * COLUMNS + c] += weights[key * ROWS + row] * values[c];
        }
      }
      from.skip(0, 0, 1, 0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  const size_t out = (size_t(batch) * heads + kv_head * ratio) * times + first;  // [B, heads, times] in rows
#pragma unroll
  for (uint row = 0; row < ROWS; ++row) {
    if (row < rows) {
#pragma unroll
      for (uint c = 0; c < COLUMNS; ++c) {
        partial[((out + row) * blocks + block) * D + thread_index * COLUMNS + c] = sums[row * COLUMNS + c];
      }
    }
  }
#pragma unroll
  for (uint i = 0; i < OWNED; ++i) {
    const uint row = simdgroup + i * SIMDGROUPS;
    if (row < rows && lane == 0) {
      stats[((out + row) * blocks + block) * 2] = maximum[i];
      stats[((out + row) * blocks + block) * 2 + 1] = total[i];
    }
  }
}

// shared: SIMDGROUPS * D floats. The stats of up to three rows of one block arrive in constant address space.
template <typename T, uint D, uint SIMDGROUPS, bool GATED, typename P, typename S>
METAL_FUNC void attend_combine(
    const device float* partial,
    P stats,
    const device T* gate,
    device T* out,
    threadgroup float* shared,
    S gate_strides,
    uint heads,
    uint times,
    uint blocks,
    uint row,
    uint simdgroup,
    uint lane) {
  constexpr uint OWN = D / 32;
  partial += size_t(row) * blocks * D + lane * OWN;
  stats += size_t(row) * blocks * 2;

  float highest = LOWEST;
  for (uint block = lane; block < blocks; block += 32) {
    highest = max(highest, stats[block * 2]);
  }
  highest = simd_max(highest);
  float total = 0.0f;
  for (uint block = lane; block < blocks; block += 32) {
    total += metal::precise::exp(stats[block * 2] - highest) * stats[block * 2 + 1];
  }
  total = simd_sum(total);

  float sums[OWN] = {0.0f};
  for (uint block = simdgroup; block < blocks; block += SIMDGROUPS) {
    const float factor = metal::precise::exp(stats[block * 2] - highest);
#pragma unroll
    for (uint i = 0; i < OWN; ++i) {
      sums[i] += factor * partial[size_t(block) * D + i];
    }
  }
#pragma unroll
  for (uint i = 0; i < OWN; ++i) {
    shared[simdgroup * D + lane * OWN + i] = sums[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const size_t time = row % times;
  const size_t head = row / times % heads;
  const size_t batch = row / times / heads;
  out += ((batch * times + time) * heads + head) * D;
  for (uint d = simdgroup * 32 + lane; d < D; d += 32 * SIMDGROUPS) {
    float sum = 0.0f;
    for (uint i = 0; i < SIMDGROUPS; ++i) {
      sum += shared[i * D + d];
    }
    sum /= total;
    if (GATED) {
      const float g = float(
          gate[batch * gate_strides[0] + time * gate_strides[1] + head * gate_strides[2] + d * gate_strides[3]]);
      const float e = metal::precise::exp(-metal::abs(g));  // no overflow
      sum *= (g < 0.0f ? e : 1.0f) / (1.0f + e);
    }
    out[d] = T(sum);
  }
}
