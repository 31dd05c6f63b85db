// bfloat16 weights times bfloat16 x: a word is two inputs of each lane, which
// one instruction multiplies by a pair of x and adds in float32.

#ifndef PANELS_BFLOAT16_H_
#define PANELS_BFLOAT16_H_

#include "problem.h"

// GCC 10 has no name for the CPU's feature yet.
#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define PANELS_BFLOAT16
#include <immintrin.h>

namespace panels {
namespace bfloat16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))

inline bool takes(const Problem& p) {
  return p.bits == 16 && p.x_type == Type::kBF16 && p.inputs == p.padded;
}

// ROWS rows of x times PANELS panels, from `row` and `panel` on.
template <int ROWS, int PANELS>
TARGET void tile(const Problem& p, int64_t row, int64_t panel) {
  const int64_t stride = p.words * kLanes;  // of a panel's codes
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
      // A panel is about a page: the CPU's own prefetching stops at its end.
      __builtin_prefetch(codes + (q + PANELS) * stride);
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
    for (int r = 0; r < ROWS; ++r) {
      float values[kLanes];
      _mm512_storeu_ps(values, total[q][r]);
      put(p, row + r, panel + q, values);
    }
  }
}

constexpr int64_t kFew = 16;

// Rows [first, last) times PANELS panels, whose codes stay in cache.
template <int PANELS>
TARGET void rows(const Problem& p, int64_t first, int64_t last, int64_t panel) {
  static_assert(PANELS == 1 || PANELS % 2 == 0, "pairs of panels");
  int64_t row = first;
  // Eight rows meet the weights once, while these come from memory; more of
  // them find the weights in cache.
  for (; p.rows < kFew && row + 8 <= last; row += 8) {
    for (int64_t q = 0; q < PANELS; q += 2) {
      tile<8, PANELS < 2 ? 1 : 2>(p, row, panel + q);
    }
  }
  for (; row + 4 <= last; row += 4) tile<4, PANELS>(p, row, panel);
  for (; row < last; ++row) tile<1, PANELS>(p, row, panel);
}

TARGET inline void run(const Problem& p, int64_t begin, int64_t end) {
  // Of more rows the second level of cache would not hold x for all panels.
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
