// The draw of a token: top_k, top_p, min_p, then the argmax of x + noise among what is left; nothing is sorted whole.
//
// Shapes    x [V] float32, the largest value 0, removed rows -inf; noise [K] float32 by rank, or [V] by id; token []
//           int32. Between the launches: lists of K values, largest first, and their ids, one list per block.
//   with top_k = K (2 launches)   sample_top: each block of x to its K largest; sample_draw: merges, cuts, draws.
//   without        (2 launches)   sample_race: each block to its largest x + noise from `floor` on; sample_finish: the
//                                 largest of all. With top_p, 7 launches of sample_nucleus before it find the floor.
// Threads   a simdgroup owns 32 * PER consecutive values of x, a lane every 32nd of them, in registers. A threadgroup
//           of S <= 32 simdgroups is a block; at most 32 blocks, so that one simdgroup merges their lists, a list a
//           lane. sample_draw and sample_finish are one simdgroup.
// Numerics  equals: the lower id first. Sums that decide about top_p are float32, in an order that V alone sets: by
//           rank in sample_draw; by lane, simdgroup and block in sample_nucleus. NaN is never taken; where no value is
//           above -inf the token is 0.
// Traffic   with top_k: reads x once, writes and reads 8 K bytes per block. Without: x once, and noise where a value is
//           kept; with top_p x another 7 times, each with 128 bytes per block that all blocks of the next launch read.
// Divides   nothing has to divide V; V <= 32 * 32 * 32 * PER, K <= 64.

constant uint NOBODY = 0xFFFFFFFF;

struct Candidate {
  float value;
  uint id;
};

// The candidate of all lanes that comes first: the larger value, among equals the lower id.
METAL_FUNC Candidate first_of(Candidate mine) {
  Candidate first;
  first.value = simd_max(mine.value);
  first.id = simd_min(mine.value == first.value ? mine.id : NOBODY);
  return first;
}

METAL_FUNC Candidate nobody() {
  Candidate none;
  none.value = -INFINITY;
  none.id = NOBODY;
  return none;
}

// The K first of the 32 * PER values that a simdgroup holds, v[i] of a lane with the id start + 32 i + lane. Takes them
// out of v. Where fewer are above -inf the list ends with nobody.
template <int K, int PER>
METAL_FUNC void
select_first(thread float* v, uint start, threadgroup float* values, threadgroup uint* ids, uint lane) {
  for (int rank = 0; rank < K; rank++) {
    Candidate mine = nobody();
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (v[i] > mine.value) {
        mine.value = v[i];
        mine.id = start + 32 * i + lane;
      }
    }
    const Candidate first = first_of(mine);
    if (lane == 0) {
      values[rank] = first.value;
      ids[rank] = first.id;
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (start + 32 * i + lane == first.id) {
        v[i] = -INFINITY;
      }
    }
  }
}

// The K first of `lists` <= 32 lists of K, each in order: a lane holds the head of its list.
template <int K>
METAL_FUNC void merge_first(
    const threadgroup float* values,
    const threadgroup uint* ids,
    uint lists,
    threadgroup float* merged_values,
    threadgroup uint* merged_ids,
    uint lane) {
  uint next = lane < lists ? lane * K : 0;
  const uint end = lane < lists ? next + K : 0;
  Candidate mine = nobody();
  bool takes = true;
  for (int rank = 0; rank < K; rank++) {
    if (takes && next < end) {
      mine.value = values[next];
      mine.id = ids[next];
      next++;
    } else if (takes) {
      mine = nobody();
    }
    const Candidate first = first_of(mine);
    takes = mine.id == first.id;
    if (lane == 0) {
      merged_values[rank] = first.value;
      merged_ids[rank] = first.id;
    }
  }
}

// The list of a block from the values of its threads.
template <int K, int PER>
METAL_FUNC void block_first(
    thread float* v,
    uint start,
    device float* values,
    device uint* ids,
    threadgroup float* list_values,
    threadgroup uint* list_ids,
    threadgroup float* merged_values,
    threadgroup uint* merged_ids,
    uint block,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  select_first<K, PER>(v, start, list_values + simdgroup * K, list_ids + simdgroup * K, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) {
    return;
  }
  merge_first<K>(list_values, list_ids, simdgroups, merged_values, merged_ids, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint rank = lane; rank < K; rank += 32) {
    values[block * K + rank] = merged_values[rank];
    ids[block * K + rank] = merged_ids[rank];
  }
}

template <int K, int PER, typename X>
METAL_FUNC void sample_top(
    X x,
    device float* values,
    device uint* ids,
    threadgroup float* list_values,
    threadgroup uint* list_ids,
    threadgroup float* merged_values,
    threadgroup uint* merged_ids,
    uint size,
    uint block,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  const uint start = (block * simdgroups + simdgroup) * 32 * PER;
  float v[PER];
#pragma unroll
  for (uint i = 0; i < PER; i++) {
    const uint id = start + 32 * i + lane;
    v[i] = id < size ? x[id] : -INFINITY;
  }
  block_first<K, PER>(v, start, values, ids, list_values, list_ids, merged_values, merged_ids, block, simdgroups,
      simdgroup, lane);
}

// `limits`: top_p (infinite: off) and the smallest value that min_p leaves.
template <int K, typename V, typename I, typename N, typename L>
METAL_FUNC void sample_draw(
    V values,
    I ids,
    N noise,
    L limits,
    device int* token,
    threadgroup float* list_values,
    threadgroup uint* list_ids,
    threadgroup float* merged_values,
    threadgroup uint* merged_ids,
    uint blocks,
    uint lane) {
  for (uint i = lane; i < blocks * K; i += 32) {
    list_values[i] = values[i];
    list_ids[i] = ids[i];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  merge_first<K>(list_values, list_ids, blocks, merged_values, merged_ids, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* weights = list_values;
  for (uint rank = lane; rank < K; rank += 32) {
    weights[rank] = metal::precise::exp(merged_values[rank]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint rank = 0; rank < K; rank++) {
    total += weights[rank];
  }
  Candidate mine = nobody();
  for (uint rank = lane; rank < K; rank += 32) {
    float before = 0.0f;
    for (uint i = 0; i < rank; i++) {
      before += weights[i];
    }
    const float score = merged_values[rank] + noise[rank];
    if (before < limits[0] * total && merged_values[rank] >= limits[1] && score > mine.value) {
      mine.value = score;
      mine.id = rank;
    }
  }
  const Candidate drawn = first_of(mine);
  if (lane == 0) {
    *token = drawn.id == NOBODY ? 0 : int(merged_ids[drawn.id]);
  }
}

template <int PER, typename X, typename N>
METAL_FUNC void sample_race(
    X x,
    N noise,
    float floor,
    device float* values,
    device uint* ids,
    threadgroup float* list_values,
    threadgroup uint* list_ids,
    threadgroup float* merged_values,
    threadgroup uint* merged_ids,
    uint size,
    uint block,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  const uint start = (block * simdgroups + simdgroup) * 32 * PER;
  float v[PER];
#pragma unroll
  for (uint i = 0; i < PER; i++) {
    const uint id = start + 32 * i + lane;
    const float value = id < size ? x[id] : -INFINITY;
    v[i] = id < size && value >= floor ? value + noise[id] : -INFINITY;
  }
  block_first<1, PER>(v, start, values, ids, list_values, list_ids, merged_values, merged_ids, block, simdgroups,
      simdgroup, lane);
}

template <typename V, typename I>
METAL_FUNC void sample_finish(V values, I ids, device int* token, uint blocks, uint lane) {
  Candidate mine = nobody();
  if (lane < blocks) {
    mine.value = values[lane];
    mine.id = ids[lane];
  }
  const Candidate drawn = first_of(mine);
  if (lane == 0) {
    *token = drawn.id == NOBODY ? 0 : int(drawn.id);
  }
}

// The nucleus without top_k: the bits of |x| order as -x does, and `state` says what is known of those of its smallest
// value: {low end, width as a power of two of the parts that the last launch summed up to, bits of the sum to reach}.
// A launch cuts the interval in 32 parts. `sums` [blocks, 32]: the weights exp(x) from 0 to the end of each part.
struct Search {
  uint low;
  uint shift;
  float target;
};

constant uint WHOLE = 26;  // 32 parts of 2^26: all floats from 0

template <typename S, typename P>
METAL_FUNC Search narrowed(S state, P sums, float top_p, uint blocks, uint lane) {
  float sum = 0.0f;
  for (uint i = 0; i < blocks; i++) {
    sum += sums[i * 32 + lane];
  }
  Search search;
  search.shift = state[1];
  search.target = search.shift == WHOLE ? top_p * simd_shuffle(sum, 31) : as_type<float>(state[2]);
  search.low = state[0] + (simd_min(sum >= search.target ? lane : 31u) << search.shift);
  return search;
}

template <typename S, typename P>
METAL_FUNC float nucleus_floor(S state, P sums, float top_p, uint blocks, uint lane) {
  return -as_type<float>(narrowed(state, sums, top_p, blocks, lane).low);
}

template <bool FIRST, int PER, typename X, typename L, typename S, typename P>
METAL_FUNC void sample_nucleus(
    X x,
    L limits,
    S state,
    P sums,
    device uint* next_state,
    device float* next_sums,
    threadgroup float* partial,
    uint size,
    uint blocks,
    uint block,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  Search search;
  search.low = 0;
  search.shift = WHOLE;
  search.target = 0.0f;
  if (!FIRST) {
    search = narrowed(state, sums, limits[0], blocks, lane);
    search.shift = search.shift > 5 ? search.shift - 5 : 0;
  }
  const uint end = search.low + ((lane + 1) << search.shift) - 1;
  const uint last = search.low + (32u << search.shift) - 1;
  const uint start = (block * simdgroups + simdgroup) * 32 * PER;
  float sum = 0.0f;
  for (uint i = 0; i < PER; i++) {
    const uint id = start + 32 * i + lane;
    const float value = id < size ? x[id] : -INFINITY;
    const uint bits = as_type<uint>(metal::abs(value));
    const float weight = metal::precise::exp(value);
    if (!simd_any(bits <= last && weight > 0.0f)) {
      continue;
    }
    for (ushort j = 0; j < 32; j++) {
      const float other = simd_shuffle(weight, j);
      sum += simd_shuffle(bits, j) <= end ? other : 0.0f;
    }
  }
  partial[simdgroup * 32 + lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) {
    return;
  }
  sum = 0.0f;
  for (uint i = 0; i < simdgroups; i++) {
    sum += partial[i * 32 + lane];
  }
  next_sums[block * 32 + lane] = sum;
  if (block == 0 && lane == 0) {
    next_state[0] = search.low;
    next_state[1] = search.shift;
    next_state[2] = as_type<uint>(search.target);
  }
}
