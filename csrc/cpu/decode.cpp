#include "pop/decode.h"

#include <algorithm>
#include <cstring>

namespace pop::cpu {
namespace {

float widen(float x) { return x; }
float widen(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t{x} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void narrow(float x, float& y) { y = x; }
void narrow(float x, uint16_t& y) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T>
void gather(const Embedding& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t id = p.token_ids[t];
    T* const to = static_cast<T*>(p.y) + t * p.hidden;
    if (id < 0 || id >= p.vocabulary) {
      std::fill_n(to, p.hidden, T{0});
      continue;
    }
    const T* const from = static_cast<const T*>(p.weight) + id * p.weight_stride;
    if (p.scale == 1) {
      std::copy_n(from, p.hidden, to);
    } else {
      for (int64_t i = 0; i < p.hidden; ++i) narrow(widen(from[i]) * p.scale, to[i]);
    }
  }
}

}  // namespace

void embedding(const Embedding& p) { p.dtype == DType::kFloat32 ? gather<float>(p) : gather<uint16_t>(p); }

void rope_gather(const RopeGather& p) {
  float *cos = p.out, *sin = p.out + p.ropes * p.tokens * p.half;
  for (int64_t rope = 0; rope < p.ropes; ++rope) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t i = 0; i < p.half; ++i) {
        const int64_t position = p.positions[(p.axes ? p.axes[i] : 0) * p.tokens + t];
        const bool known = position >= 0 && position < p.table_rows;
        const int64_t at = (rope * p.table_rows + position) * p.half + i;
        *cos++ = known ? p.cos[at] : 0;
        *sin++ = known ? p.sin[at] : 0;
      }
    }
  }
}

void decode_advance(const DecodeAdvance& p) {
  if (p.step && p.sequences) ++*p.step;
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t index = p.seqlens_k[s], column = index / p.block_size;
    const bool present = index > 0, room = present && column < p.columns;
    if (present) p.seqlens_k[s] = static_cast<int32_t>(index + 1);
    p.positions[s] = present ? index + p.shifts[s] : 0;
    p.slot_mapping[s] =
        room ? int64_t{p.block_tables[s * p.block_table_stride + column]} * p.block_size + index % p.block_size : -1;
  }
}

}  // namespace pop::cpu
