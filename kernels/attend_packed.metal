// Attention of few queries over a long cache of codes: attend.metal with another reader of keys and values.
//
// Shapes    as there, but k and v are affine codes uint32 [B, kv, keys, D * BITS / 32] with a scale and a bias in T
//           for GROUP neighbouring columns, [B, kv, keys, D / GROUP]: value = scale * code + bias, a row one string of
//           bits, lowest first. BITS 4 or 8, GROUP = 32 n. The last axes dense, all others with any strides.
// Threads   as there. The 1, 2 or 4 columns that a thread takes of a row at a time are one byte, two or four, and lie
//           in one group; one column of 4 bits is half of a byte, which two threads read.
// Numerics  float32 from the first read, as there. Values are spelled out in registers, one multiply-add for a column
//           of a key and all ROWS rows; scale * sum(code * q) + bias * sum(q) would take a second set of sums.
// Traffic   as there, in codes: with T of 16 bits D * BITS / 8 + 4 * D / GROUP bytes of a key, and as many of a value
//           (D 256, GROUP 64: 272 with 8 bits, 144 with 4, where attend.metal reads 512). Codes are read once per
//           ROWS rows (halves of a byte: twice); a scale and a bias by each lane with columns of their group, from the
//           caches.

#include "attend.metal"

template <uint BITS, uint GROUP, typename T>
struct PackedRows {
  const device uint* words;
  const device T* scales;
  const device T* biases;
  const constant int64_t* word_strides;  // of batch, head, key
  const constant int64_t* scale_strides;
  const constant int64_t* bias_strides;
  uint first;  // column

  METAL_FUNC void skip(size_t batch, size_t head, size_t key, uint column) {
    words += batch * word_strides[0] + head * word_strides[1] + key * word_strides[2];
    scales += batch * scale_strides[0] + head * scale_strides[1] + key * scale_strides[2];
    biases += batch * bias_strides[0] + head * bias_strides[1] + key * bias_strides[2];
    first += column;
  }

  template <uint COUNT>
  METAL_FUNC void read(size_t key, uint column, thread float* values) const {
    typedef metal::conditional_t<COUNT * BITS == 16, ushort, uchar> Short;
    typedef metal::conditional_t<COUNT * BITS == 32, uint, Short> Piece;
    constexpr uint HELD = 8 * sizeof(Piece) / BITS;
    constexpr uint MASK = (1u << BITS) - 1;
    column += first;
    uint codes = ((const device Piece*)(words + key * word_strides[2]))[column / HELD];
    if (HELD > COUNT) {
      codes >>= column % HELD * BITS;
    }
    const float scale = float(scales[key * scale_strides[2] + column / GROUP]);
    const float bias = float(biases[key * bias_strides[2] + column / GROUP]);
#pragma unroll
    for (uint c = 0; c < COUNT; ++c) {
      values[c] = scale * float(codes >> c * BITS & MASK) + bias;
    }
  }
};

template <uint BITS, uint GROUP, typename T>
METAL_FUNC PackedRows<BITS, GROUP, T> packed_rows(
    const device uint* words,
    const device T* scales,
    const device T* biases,
    const constant int64_t* word_strides,
    const constant int64_t* scale_strides,
    const constant int64_t* bias_strides) {
  return {words, scales, biases, word_strides, scale_strides, bias_strides, 0};
}
