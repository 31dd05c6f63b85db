// bfloat16 weights times bfloat16 x: a word is two inputs of each lane, which
// one instruction multiplies by a pair of x and accumulates in float32.

#ifndef PANELS_BFLOAT16_H_
#define PANELS_BFLOAT16_H_

#include "problem.h"

// GCC 10 does not know this CPU feature yet.
#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define PANELS_BFLOAT16
#include <immintrin.h>

namespace panels {
namespace bfloat16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))

inline bool takes(const Problem& p) {
  return p.bits == 16 && p.x_type == Type::kBF16 && p.inputs == p.padded;
}

// `panels::put` for a vector, which GCC would not vectorize.
TARGET inline void put(const Problem& p, int64_t row, int64_t panel, __m512 y) {
  const int64_t first = panel * kLanes, rest = p.outputs - first;
  const __mmask16 some = rest < kLanes ? (1 << rest) - 1 : 0xffff;
  const int64_t at = row * p.outputs + first;
  if (p.y_type == Type::kF32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p.y) + at, some, y);
    return;
  }
  const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  up = _mm512_srli_epi32(_mm512_add_epi32(up, odd), 16);
  up = _mm512_mask_or_epi32(up, nan, high, _mm512_set1_epi32(64));
  _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(p.y) + at, some, up);
}

// ROWS rows of x times PANELS panels, starting at `row` and `panel`.
template <int ROWS, int PANELS>
TARGET void tile(const Problem& p, int64_t row, int64_t panel) {
  const int64_t stride = p.words * kLanes;  // words per panel
  // The hardware prefetcher stops at the end of a page, about the size of a
  // panel: with several panels prefetch the next ones, with one the words that
  // follow.
  const int64_t ahead = PANELS > 1 ? PANELS * stride : 1024;
  const uint16_t* x = p.pairs + row * p.inputs;
  const uint32_t* codes = p.codes + panel * stride;
  __m512 total[PANELS][ROWS];
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) total[q][r] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < p.words; ++w, codes += kLanes, x += 2) {
    __m512bh word[PANELS];
    UNROLL
    for (int q = 0; q < PANELS; ++q) {
      word[q] = (__m512bh)_mm512_loadu_si512(codes + q * stride);
      __builtin_prefetch(codes + q * stride + ahead);
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * p.inputs, sizeof two);
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(two);
      UNROLL
      for (int q = 0; q < PANELS; ++q) {
        total[q][r] = _mm512_dpbf16_ps(total[q][r], word[q], pair);
      }
    }
  }
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) put(p, row + r, panel + q, total[q][r]);
  }
}

constexpr int64_t kFew = 16;

// Rows [first, last) times PANELS panels, whose codes stay in cache.
template <int PANELS>
TARGET void rows(const Problem& p, int64_t first, int64_t last, int64_t panel) {
  int64_t row = first;
  // Up to eight rows read the weights once, in memory order; more rows find the
  // weights in cache.
  for (; p.rows < kFew && row + 8 <= last; row += 8) {
    for (int64_t q = 0; q < PANELS; ++q) tile<8, 1>(p, row, panel + q);
  }
  for (; row + 4 <= last; row += 4) tile<4, PANELS>(p, row, panel);
  for (; row < last; ++row) tile<1, PANELS>(p, row, panel);
}

TARGET inline void run(const Problem& p, int64_t begin, int64_t end) {
  // With more rows, the L2 cache would not hold x for all panels.
  constexpr int64_t kTogether = 128;
  for (int64_t row = 0; row < p.rows; row += kTogether) {
    const int64_t last = row + kTogether < p.rows ? row + kTogether : p.rows;
    int64_t panel = begin;
    for (; panel + 4 <= end; panel += 4) rows<4>(p, row, last, panel);
    for (; panel < end; ++panel) rows<1>(p, row, last, panel);
  }
}
#undef TARGET
}  // namespace bfloat16
}  // namespace panels
#endif

#endif  // PANELS_BFLOAT16_H_
