// Gated delta net between its projections, in one launch for TIME positions: causal convolution and its rows, SiLU,
// l2 norm of queries and keys, decay and beta, delta rule, gated RMS norm.
//
// Shapes    u [B, TIME, C] with C = 2 HK DK + HV DV (queries, keys, values), z [B, TIME, HV DV], b, a [B, TIME, HV],
//           conv [B, WIDTH - 1, C], all in T; state [B, HV, DV, DK] float32; these six of any strides. Row-contiguous:
//           taps [WIDTH, C] of any float type; decay, dt_bias [HV], norm [DV] float32. Out: y [B, TIME, HV DV] in T,
//           and the conv rows and the state after the last position, or (EVERY) conv [B, TIME, WIDTH - 1, C] and state
//           [B, TIME, HV, DV, DK] after every position.
// Threads   one threadgroup of SIMDGROUPS * 32 per value head and batch row: the gated norm needs all DV of a head.
//           LANES neighbours share a row of the state; a thread owns ROWS rows, GROUPS apart, and in each of them
//           COLUMNS columns, runs of four that are 4 * LANES apart. It holds them in registers from the first position
//           to the last. Convolution and both norms: one simdgroup per vector.
// Numerics  float32 from the convolution to y, which is rounded once. Every product that is added to something is an
//           explicit fma (but in MLX's log1p), so that a position gives the same bits alone and among others.
// Traffic   reads the state once and writes it once (EVERY: TIME times); y, z, b, a and the new conv rows once. Queries
//           and keys of u, conv and taps are read by each of the HV / HK value heads that share them and written by the
//           first; TIME positions read a row of u up to WIDTH times, from caches.
// Divides   nothing has to: rows and columns are padded with zeros to ROWS * GROUPS and COLUMNS * LANES. LANES is a
//           power of two up to 32, COLUMNS a multiple of 4.

// Of loops over what a thread owns: an index that is no constant would put the array into memory.
#define DELTA_NET_UNROLL _Pragma("clang loop unroll(full)")

METAL_FUNC float delta_net_sigmoid(float x) {
  const float e = metal::precise::exp(-metal::abs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

METAL_FUNC float delta_net_softplus(float x) {
  return metal::max(x, 0.0f) + log1p(metal::precise::exp(-metal::abs(x)));
}

template <int LANES>
METAL_FUNC float delta_net_sum(float x) {
  for (ushort distance = 1; distance < LANES; distance *= 2) {
    x += simd_shuffle_xor(x, distance);
  }
  return x;
}

// The rows and columns of a state that a thread owns, zero where padded.
template <int DK, int DV, int LANES, int GROUPS, int ROWS, int COLUMNS>
METAL_FUNC void delta_net_load(
    const device float* state,
    int64_t row_stride,
    int64_t column_stride,
    int first_row,
    int first_column,
    thread float (&own)[ROWS][COLUMNS]) {
  DELTA_NET_UNROLL for (int r = 0; r < ROWS; r++) {
    const int row = first_row + r * GROUPS;
    const device float* source = state + row * row_stride;
    DELTA_NET_UNROLL for (int j = 0; j < COLUMNS; j++) {
      const int column = first_column + j / 4 * 4 * LANES + j % 4;
      const bool inside = (ROWS * GROUPS == DV || row < DV) && (COLUMNS * LANES == DK || column < DK);
      own[r][j] = inside ? source[column * column_stride] : 0.0f;
    }
  }
}

template <int DK, int LANES, int COLUMNS>
METAL_FUNC void delta_net_store(const thread float (&own)[COLUMNS], int first_column, device float* row) {
  DELTA_NET_UNROLL for (int j = 0; j < COLUMNS; j++) {
    const int column = first_column + j / 4 * 4 * LANES + j % 4;
    if (COLUMNS * LANES == DK || column < DK) {
      row[column] = own[j];
    }
  }
}

// G and H: pointers to b, a and to decay, dt_bias, which lie in constant memory if they are short.
template <
    typename T,
    bool EVERY,
    int TIME,
    int HK,
    int HV,
    int DK,
    int DV,
    int WIDTH,
    int LANES,
    int SIMDGROUPS,
    int ROWS,
    int COLUMNS,
    typename G,
    typename H,
    typename C>
METAL_FUNC void delta_net(
    const device T* u,
    const constant int64_t* u_strides,
    const device T* z,
    const constant int64_t* z_strides,
    G b,
    const constant int64_t* b_strides,
    G a,
    const constant int64_t* a_strides,
    const device T* conv,
    const constant int64_t* conv_strides,
    const device float* state,
    const constant int64_t* state_strides,
    const device C* taps,
    H decay,
    H dt_bias,
    const device float* norm,
    float eps,
    device T* y,
    device T* conv_after,
    device float* state_after,
    threadgroup float* queries, // [TIME, PADDED_DK]
    threadgroup float* keys, // [TIME, PADDED_DK]
    threadgroup float* values, // [TIME, PADDED_DV]
    threadgroup float* outputs, // [TIME, PADDED_DV]
    threadgroup float* gates, // [2, TIME]: decay, beta
    uint head,
    uint batch,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int GROUPS = SIMDGROUPS * 32 / LANES;
  constexpr int PADDED_DK = COLUMNS * LANES, PADDED_DV = ROWS * GROUPS;
  constexpr int AFTER = EVERY ? TIME : 1; // positions whose conv rows and state are written
  constexpr int64_t CHANNELS = 2 * HK * DK + HV * DV;
  const int first_row = thread_index / LANES, first_column = thread_index % LANES * 4;
  u += batch * u_strides[0];
  z += batch * z_strides[0] + head * DV * z_strides[2];
  b += batch * b_strides[0] + head * b_strides[2];
  a += batch * a_strides[0] + head * a_strides[2];
  conv += batch * conv_strides[0];
  state += batch * state_strides[0] + head * state_strides[1];

  // the state first: it is what takes long to arrive, and nothing before the recurrence needs it
  float own[ROWS][COLUMNS];
  if (state_strides[3] == 1) { // neighbours in memory, as the compiler can then see
    delta_net_load<DK, DV, LANES, GROUPS, ROWS, COLUMNS>(state, state_strides[2], 1, first_row, first_column, own);
  } else {
    delta_net_load<DK, DV, LANES, GROUPS, ROWS, COLUMNS>(
        state, state_strides[2], state_strides[3], first_row, first_column, own);
  }

  for (int t = thread_index; t < TIME; t += SIMDGROUPS * 32) {
    const float rate = float(a[t * a_strides[1]]) + dt_bias[head];
    gates[t] = metal::precise::exp(decay[head] * delta_net_softplus(rate));
    gates[TIME + t] = delta_net_sigmoid(float(b[t * b_strides[1]]));
  }
  for (int i = simdgroup; i < 3 * TIME; i += SIMDGROUPS) {
    const int t = i / 3, kind = i % 3; // queries, keys, values
    const int size = kind == 2 ? DV : DK, padded = kind == 2 ? PADDED_DV : PADDED_DK;
    const int start = kind == 2 ? 2 * HK * DK + head * DV : (kind * HK + head / (HV / HK)) * DK;
    const bool keeps = (EVERY || t == TIME - 1) && (kind == 2 || head % (HV / HK) == 0);
    device T* kept = conv_after + (size_t(batch) * AFTER + (EVERY ? t : 0)) * (WIDTH - 1) * CHANNELS;
    threadgroup float* vector =
        kind == 0 ? queries + t * PADDED_DK : kind == 1 ? keys + t * PADDED_DK : values + t * PADDED_DV;
    float squares = 0.0f;
    for (int c = lane; c < padded; c += 32) {
      float mixed = 0.0f;
      if (c < size) {
        const int64_t channel = start + c;
        for (int w = 0; w < WIDTH; w++) {
          const int row = t + w; // of conv with the rows of u behind it
          const device T* source = row < WIDTH - 1
              ? conv + row * conv_strides[1] + channel * conv_strides[2]
              : u + (row - (WIDTH - 1)) * u_strides[1] + channel * u_strides[2];
          const T value = *source;
          mixed = metal::fma(float(value), float(taps[w * CHANNELS + channel]), mixed);
          if (keeps && w > 0) {
            kept[(w - 1) * CHANNELS + channel] = value;
          }
        }
        mixed *= delta_net_sigmoid(mixed);
      }
      vector[c] = mixed;
      squares = metal::fma(mixed, mixed, squares);
    }
    if (kind < 2) {
      float factor = metal::precise::rsqrt(simd_sum(squares) + 1e-6f);
      factor *= kind == 0 ? metal::precise::rsqrt(float(DK)) : 1.0f;
      for (int c = lane; c < padded; c += 32) {
        vector[c] *= factor;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = 0; t < TIME; t++) {
    float q[COLUMNS], k[COLUMNS];
    DELTA_NET_UNROLL for (int j = 0; j < COLUMNS; j++) {
      const int column = first_column + j / 4 * 4 * LANES + j % 4;
      q[j] = queries[t * PADDED_DK + column];
      k[j] = keys[t * PADDED_DK + column];
    }
    const float fade = gates[t], beta = gates[TIME + t];
    DELTA_NET_UNROLL for (int r = 0; r < ROWS; r++) {
      const int row = first_row + r * GROUPS;
      float recalled = 0.0f, output = 0.0f;
      DELTA_NET_UNROLL for (int j = 0; j < COLUMNS; j++) {
        own[r][j] *= fade;
        recalled = metal::fma(own[r][j], k[j], recalled);
      }
      const float delta = beta * (values[t * PADDED_DV + row] - delta_net_sum<LANES>(recalled));
      DELTA_NET_UNROLL for (int j = 0; j < COLUMNS; j++) {
        own[r][j] = metal::fma(delta, k[j], own[r][j]);
        output = metal::fma(own[r][j], q[j], output);
      }
      output = delta_net_sum<LANES>(output);
      if (first_column == 0) {
        outputs[t * PADDED_DV + row] = output;
      }
      if ((EVERY || t == TIME - 1) && row < DV) {
        const size_t matrix = (size_t(batch) * AFTER + (EVERY ? t : 0)) * HV + head;
        delta_net_store<DK, LANES>(own[r], first_column, state_after + (matrix * DV + row) * DK);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = simdgroup; t < TIME; t += SIMDGROUPS) {
    float squares = 0.0f;
    for (int d = lane; d < DV; d += 32) {
      squares = metal::fma(outputs[t * PADDED_DV + d], outputs[t * PADDED_DV + d], squares);
    }
    const float factor = metal::precise::rsqrt(simd_sum(squares) / float(DV) + eps);
    for (int d = lane; d < DV; d += 32) {
      const float gate = float(z[t * z_strides[1] + d * z_strides[2]]);
      const float normed = outputs[t * PADDED_DV + d] * factor * norm[d];
      y[((size_t(batch) * TIME + t) * HV + head) * DV + d] = T(normed * (gate * delta_net_sigmoid(gate)));
    }
  }
}
