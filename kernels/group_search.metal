// Search of scale and bias for groups of affine quantized weights; codes packed as MLX reads them.
//
// Shapes    weights [rows, cols] in T; importance [cols] float32, below 4, and in every group somewhere at least 1;
//           moves [count, 2] float32, at most 32; words uint32 [rows, cols * bits / 32];
//           scales, biases [rows, cols / group] in S.
// Threads   one simdgroup per group of 32, 64 or 128 weights; lane l owns the weights l, l + 32, ... and keeps them in
//           registers through all candidates. A lane's values are the same in every lane where they say nothing of a
//           single weight: scale, bias, error.
// Numerics  the bits of src/moelocal/ops/group_search.py on every backend. So: weights times a power of two, such that
//           the largest is in [2, 4), and nothing in between is subnormal (GPUs flush these to zero); a weight below
//           2^-24 then, or one that is NaN or infinite, counts as 0; sums halve (x[j] + x[j + half], to the last);
//           no product is fused with a sum, see `product`; divisions are IEEE's, as in Metal's safe math mode.
// Traffic   reads the weights once, and from cache 4 bytes of importance per weight and `moves` once per group; writes
//           `bits` bits per weight and one scale and bias per group.
// Divides   group divides cols; 32 divides group.

// a * b, rounded. The exclusive-or with a zero that no compiler knows keeps the product out of a fused multiply-add.
METAL_FUNC float product(float a, float b, uint zero) {
  return as_type<float>(as_type<uint>(a * b) ^ zero);
}

METAL_FUNC float largest(float) { return 0x1.fffffep127f; }
METAL_FUNC float largest(bfloat) { return 0x1.fep127f; }
METAL_FUNC float largest(half) { return 65504.0f; }

// x as its group can store it: S holds x * up.
template <typename S>
METAL_FUNC float stored(float x, float up, float down) {
  const float bound = largest(S(0.0f));
  const float kept = metal::abs(x) < 0x1p-24f ? 0.0f : metal::clamp(x, -64.0f, 64.0f);
  return float(S(metal::clamp(kept * up, -bound, bound))) * down;
}

template <int N>
METAL_FUNC float total(thread float* x) {
#pragma unroll
  for (int half_way = N / 2; half_way > 0; half_way /= 2) {
#pragma unroll
    for (int j = 0; j < half_way; j++) {
      x[j] += x[j + half_way];
    }
  }
  float sum = x[0];
  for (ushort distance = 16; distance > 0; distance /= 2) {
    sum += simd_shuffle_xor(sum, distance);
  }
  return sum;
}

template <typename T, typename S, int bits, int N>
struct GroupSearch {
  float w[N];
  float importance[N];
  float code[N];
  float up, down;
  float weight_sum, first_moment;
  float best, best_scale, best_bias;
  uint zero;

  // The nearest codes.
  METAL_FUNC void encode(float scale, float bias) {
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
#pragma unroll
    for (int j = 0; j < N; j++) {
      code[j] = metal::clamp(metal::rint((w[j] - bias) * inverse), 0.0f, float((1 << bits) - 1));
    }
  }

  // Encode, and keep scale and bias if the weighted squared error is less than any before.
  METAL_FUNC void place(float scale, float bias) {
    encode(scale, bias);
    float squares[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float error = (w[j] - bias) - product(code[j], scale, zero);
      squares[j] = product(error * error, importance[j], zero);
    }
    const float sum = total<N>(squares);
    if (sum < best) {
      best = sum;
      best_scale = scale;
      best_bias = bias;
    }
  }

  // Weighted least squares for the codes in place, counted from the middle code; then the bias for the stored scale.
  METAL_FUNC void refit(thread float& scale, thread float& bias) {
    constexpr float middle = 1 << (bits - 1);
    float c[N], cc[N], cw[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float centred = code[j] - middle;
      c[j] = product(importance[j], centred, zero);
      cc[j] = product(c[j], centred, zero);
      cw[j] = product(c[j], w[j], zero);
    }
    const float sum_c = total<N>(c), sum_cc = total<N>(cc), sum_cw = total<N>(cw);
    const float spread = product(weight_sum, sum_cc, zero) - product(sum_c, sum_c, zero);
    const float slope = product(weight_sum, sum_cw, zero) - product(sum_c, first_moment, zero);
    scale = spread > 0.0f ? stored<S>(slope / spread, up, down) : scale;
    bias = stored<S>((first_moment - product(scale, sum_c, zero)) / weight_sum - scale * middle, up, down);
  }

  METAL_FUNC void try_from(float scale, float bias) {
    place(scale, bias);
    for (int i = 0; i < 2; i++) {
      refit(scale, bias);
      place(scale, bias);
    }
  }

  METAL_FUNC void load(const device T* weights, const device float* importances, uint lane) {
    uint top = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float x = float(weights[lane + 32 * j]);
      const uint magnitude = as_type<uint>(x) & 0x7fffffff;
      w[j] = magnitude < 0x7f800000 ? x : 0.0f;
      top = metal::max(top, magnitude < 0x7f800000 ? magnitude : 0);
      importance[j] = importances[lane + 32 * j];
    }
    top = simd_max(top) >> 23;
    const bool nothing = top < 27;  // below 2^-100
    top = nothing ? 127 : top;
    up = as_type<float>((top - 1) << 23);
    down = as_type<float>((255 - top) << 23);
    float sum[N], moment[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float x = w[j] * down;
      w[j] = nothing || metal::abs(x) < 0x1p-24f ? 0.0f : x;
      sum[j] = importance[j];
      moment[j] = product(importance[j], w[j], zero);
    }
    weight_sum = total<N>(sum);
    first_moment = total<N>(moment);
  }

  // Scale and bias by the rule of mx.quantize (MLX's CPU backend), for which a step is at least 1e-7.
  METAL_FUNC void min_max(float least, thread float& scale, thread float& bias) {
    float low = w[0], high = w[0];
#pragma unroll
    for (int j = 1; j < N; j++) {
      low = metal::min(low, w[j]);
      high = metal::max(high, w[j]);
    }
    low = simd_min(low);
    high = simd_max(high);
    const float step = metal::max((high - low) / float((1 << bits) - 1), least);
    const bool from_low = metal::abs(low) > metal::abs(high);
    const float edge = from_low ? low : high;
    scale = from_low ? step : -step;
    const float code_of_zero = metal::rint(edge / scale);
    scale = stored<S>(code_of_zero == 0.0f ? scale : edge / code_of_zero, up, down);
    bias = stored<S>(code_of_zero == 0.0f ? 0.0f : edge, up, down);
  }

  METAL_FUNC void search(const device float* moves, uint count, uint lane) {
    float scale, bias;
    best = INFINITY;
    min_max(1e-7f * down, scale, bias);
    place(scale, bias);
    min_max(0x1p-24f, scale, bias);
    try_from(scale, bias);
    const float own_shift = lane < count ? moves[2 * lane] : 0.0f;
    const float own_factor = lane < count ? moves[2 * lane + 1] : 0.0f;
    for (ushort i = 0; i < count; i++) {
      const float shift = simd_shuffle(own_shift, i), factor = simd_shuffle(own_factor, i);
      scale = stored<S>(best_scale * factor, up, down);
      bias = stored<S>(best_bias + product(best_scale, shift, zero), up, down);
      try_from(scale, bias);
    }
    encode(best_scale, best_bias);
  }

  // 32 codes are `bits` words; lane l's lie at bit l * bits.
  METAL_FUNC void write(device uint* words, uint lane) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      const uint own = uint(code[j]);
      uint own_word = 0;
      for (int k = 0; k < bits; k++) {
        const int shift = int(lane) * bits - 32 * k;
        const bool outside = shift <= -bits || shift >= 32;
        const uint word = simd_or(outside ? 0 : shift < 0 ? own >> uint(-shift) : own << uint(shift));
        own_word = int(lane) == k ? word : own_word;
      }
      if (lane < bits) {
        words[j * bits + lane] = own_word;
      }
    }
  }
};

template <typename T, typename S, int bits, int group>
METAL_FUNC void group_search(
    const device T* weights,
    const device float* importance,
    const device float* moves,
    uint zero,
    device uint* words,
    device S* scales,
    device S* biases,
    uint cols,
    uint count,
    uint index,
    uint lane) {
  GroupSearch<T, S, bits, group / 32> search;
  search.zero = zero;
  search.load(weights + size_t(index) * group, importance + index % (cols / group) * group, lane);
  search.search(moves, count, lane);
  search.write(words + size_t(index) * (group / 32 * bits), lane);
  if (lane == 0) {
    scales[index] = S(search.best_scale * search.up);
    biases[index] = S(search.best_bias * search.up);
  }
}
