// Router: the K experts with the largest logits, their weights, and the shared expert's share.
//
// Shapes    logits [N, E], or [N, E + 1] with SHARED: its last column is the shared expert's gate. chosen uint32 and
//           weights float32 [N, K], share float32 [N, 1] (0 without SHARED). SLOTS = ceil(E / 32), at most 16; K at
//           most 32 and at most E.
// Threads   one simdgroup per token. Lane l owns the logits l, l + 32, ... in registers, and in the end the choice
//           number l. Each of the K rounds takes the largest open logit: two reductions, no barrier.
// Numerics  float32. Logits are ranked as unsigned keys of the same order (-0 and 0 equal, NaN lowest), the lowest
//           index first among equal ones. NORMALIZE: softmax over the chosen; else over all E.
// Traffic   reads each logit once, writes 2K + 1 words a token.
// Divides   nothing has to: lanes behind the last expert hold none.

// Ascending with the number; 0 for NaN, which `route_value` gives back.
METAL_FUNC uint route_key(float value) {
  uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0u;
  }
  if (bits == 0x80000000u) {
    bits = 0u;
  }
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

METAL_FUNC float route_value(uint key) {
  return as_type<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <int SLOTS, bool NORMALIZE, bool SHARED>
METAL_FUNC void route(
    const device float* logits,
    device uint* chosen,
    device float* weights,
    device float* share,
    uint experts,
    uint per_token,
    uint token,
    uint lane) {
  logits += size_t(token) * (experts + (SHARED ? 1 : 0));
  uint keys[SLOTS];
  uint open = 0;  // bit s: slot s holds an expert that is not chosen yet
#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
    const uint expert = slot * 32 + lane;
    keys[slot] = expert < experts ? route_key(logits[expert]) : 0u;
    open |= uint(expert < experts) << slot;
  }
  const uint candidates = open;

  uint largest = 0;
  uint my_expert = 0, my_key = 0;
  for (uint k = 0; k < per_token; k++) {
    uint best = 0, expert = 0xffffffffu;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
      if ((open >> slot & 1) && (expert == 0xffffffffu || keys[slot] > best)) {
        best = keys[slot];
        expert = slot * 32 + lane;
      }
    }
    const uint top = simd_max(best);
    const uint winner = simd_min(best == top ? expert : 0xffffffffu);
    if (winner == expert) {
      open &= ~(1u << (expert / 32));
    }
    if (lane == k) {
      my_expert = winner;
      my_key = top;
    }
    largest = k == 0 ? top : largest;
  }

  const float maximum = route_value(largest);
  const float weight = lane < per_token ? metal::precise::exp(route_value(my_key) - maximum) : 0.0f;
  float part = weight;
  if (!NORMALIZE) {
    part = 0.0f;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
      part += candidates >> slot & 1 ? metal::precise::exp(route_value(keys[slot]) - maximum) : 0.0f;
    }
  }
  const float sum = simd_sum(part);
  if (lane < per_token) {
    chosen[size_t(token) * per_token + lane] = my_expert;
    weights[size_t(token) * per_token + lane] = weight / sum;
  }
  if (lane == 0) {
    share[token] = SHARED ? 1.0f / (1.0f + metal::precise::exp(-logits[experts])) : 0.0f;
  }
}
