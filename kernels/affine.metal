// Reading packed affine weights: W[r, c] = scale * q + bias with one scale and bias for GROUP columns of a row, and
// q >= 0 of BITS bits, as `mx.quantize` packs them: a row is one string of bits, lowest first, in uint32 words.
//
// Threads   the 32 lanes of a simdgroup share a row; a lane takes `affine_run` columns, the next lane the next ones.
//           They lie in one group (groups are multiples of 32), so that a lane is never half past the end of a row.
// Numerics  float32: scale * sum(q * x) + bias * sum(x) for the columns of a lane. The codes are masked, not shifted;
//           the power of two that is left in them is taken out of x beforehand, which is exact.
// Traffic   every 16-bit word of a row is read once, by one lane; a scale and a bias by the lanes of their group.
// Divides   GROUP divides cols; the run of a lane divides 32, hence GROUP.

// Columns that a lane takes at a time: whole 16-bit words.
template <int BITS>
inline constexpr int affine_run() {
  return BITS == 6 || BITS == 8 ? 8 : 16;
}

// Whether the code at column `i` of a run lies in two words.
template <int BITS>
inline constexpr bool affine_split(int i) {
  return i * BITS % 16 + BITS > 16;
}

// The run at x, scaled for `affine_dot`; returns its sum.
template <int BITS, typename T>
METAL_FUNC float affine_load(const device T* x, thread float* values) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < affine_run<BITS>(); i++) {
    const float value = float(x[i]);
    sum += value;
    values[i] = affine_split<BITS>(i) ? value : value * (1.0f / float(1 << i * BITS % 16));
  }
  return sum;
}

// sum(q * x) over the run whose codes start at `words`.
template <int BITS>
METAL_FUNC float affine_dot(const device ushort* words, const thread float* values) {
  constexpr int RUN = affine_run<BITS>();
  constexpr uint MASK = (1u << BITS) - 1;
  uint codes[RUN * BITS / 16];
#pragma unroll
  for (int i = 0; i < RUN * BITS / 16; i++) {
    codes[i] = words[i];
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const int word = i * BITS / 16, shift = i * BITS % 16;
    const uint code = affine_split<BITS>(i) ? (codes[word] >> shift | codes[word + 1] << (16 - shift)) & MASK
                                            : codes[word] & MASK << shift;
    sum += float(code) * values[i];
  }
  return sum;
}

// Adds this lane's part of the dot products of x [cols] with ROWS rows of one matrix [..., cols] to `sums`. Within the
// matrix 32-bit offsets do: it has fewer than 2^32 words.
template <int BITS, int GROUP, int ROWS, typename T, typename S>
METAL_FUNC void affine_rows(
    const device T* x,
    const device uint* packed,
    const device S* scales,
    const device S* biases,
    const thread uint* rows,
    uint cols,
    uint lane,
    thread float* sums) {
  constexpr uint RUN = affine_run<BITS>();
  const device ushort* words = (const device ushort*)packed;
  const uint row_words = cols / 16 * BITS, row_groups = cols / GROUP;
  float values[RUN];
  for (uint col = lane * RUN; col < cols; col += 32 * RUN) {
    const float sum = affine_load<BITS>(x + col, values);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint group = rows[r] * row_groups + col / GROUP;
      const float dot = affine_dot<BITS>(words + (rows[r] * row_words + col * BITS / 16), values);
      sums[r] += float(scales[group]) * dot + float(biases[group]) * sum;
    }
  }
}
