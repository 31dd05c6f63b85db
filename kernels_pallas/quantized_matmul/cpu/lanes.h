// Vectors of 16 lanes for each instruction set, and the products over them.

#ifndef PANELS_LANES_H_
#define PANELS_LANES_H_

#include <vector>

#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace panels {

namespace portable {
#define TARGET
struct V {
  static constexpr int kRows = 4, kPanels = 1;  // of accumulators in registers
  static constexpr int kMany = 32;  // rows: see `many.inc`
  using F = float __attribute__((vector_size(64)));
  using U = uint32_t __attribute__((vector_size(64)));
  struct Table { float value[kLanes]; };
  static inline F zero() { return F{}; }
  static inline Table table(const float* t) {
    Table out;
    std::memcpy(out.value, t, sizeof out.value);
    return out;
  }
  static inline U load(const uint32_t* p) {
    U out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static inline F load(const float* p) {
    F out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static inline F load(const Numbers& n, int64_t i) {
    F out;
    for (int k = 0; k < kLanes; ++k) out[k] = number(n, i + k);
    return out;
  }
  static inline F nibble(const U& word, const Table& table) {
    F out;
    for (int k = 0; k < kLanes; ++k) out[k] = table.value[word[k] & 15];
    return out;
  }
  static inline F byte(const U& word) {
    F out;
    for (int k = 0; k < kLanes; ++k) out[k] = float(int8_t(word[k] & 255));
    return out;
  }
  static inline F half(const U& word) {
    const U bits = word << 16;
    F out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  static inline F whole(const U& word) {
    F out;
    std::memcpy(&out, &word, sizeof out);
    return out;
  }
  static inline U next(const U& word, int bits) { return word >> bits; }
  static inline F fma(const F& a, float b, const F& c) { return a * b + c; }
  static inline F fma(const F& a, const F& b, const F& c) { return a * b + c; }
  static inline void store(float* p, const F& a) {
    std::memcpy(p, &a, sizeof a);
  }
};
#include "tile.inc"
#include "many.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANE TARGET static inline __attribute__((always_inline))
struct V {
  static constexpr int kRows = 6, kPanels = 1, kMany = 12;
  struct F { __m256 a, b; };
  struct U { __m256i a, b; };
  struct Table { __m256 low, high; };
  LANE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  LANE Table table(const float* t) {
    return {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)};
  }
  LANE __m256i words(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  LANE U load(const uint32_t* p) { return {words(p), words(p + 8)}; }
  LANE F load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  LANE F load(const Numbers& n, int64_t i) {
    if (n.type == Type::kF32) {
      const float* p = static_cast<const float*>(n.data) + i;
      return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    }
    const __m256i raw = words(static_cast<const uint16_t*>(n.data) + i);
    const __m128i low = _mm256_castsi256_si128(raw);
    const __m128i high = _mm256_extracti128_si256(raw, 1);
    if (n.type == Type::kF16) {
      return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    }
    return half({_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)});
  }
  // The permutation uses three bits; the fourth selects between the halves.
  LANE __m256 look_up(__m256i word, const Table& t) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, word),
                            _mm256_permutevar8x32_ps(t.high, word),
                            _mm256_castsi256_ps(_mm256_slli_epi32(word, 28)));
  }
  LANE F nibble(U w, const Table& t) {
    return {look_up(w.a, t), look_up(w.b, t)};
  }
  LANE __m256 signed_byte(__m256i w) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 24), 24));
  }
  LANE F byte(U w) { return {signed_byte(w.a), signed_byte(w.b)}; }
  LANE F half(U w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
  }
  LANE F whole(U w) {
    return {_mm256_castsi256_ps(w.a), _mm256_castsi256_ps(w.b)};
  }
  LANE U next(U w, int bits) {
    return {_mm256_srli_epi32(w.a, bits), _mm256_srli_epi32(w.b, bits)};
  }
  LANE F fma(F a, float b, F c) {
    const __m256 all = _mm256_set1_ps(b);
    return {_mm256_fmadd_ps(a.a, all, c.a), _mm256_fmadd_ps(a.b, all, c.b)};
  }
  LANE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
  }
  LANE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + 8, a.b);
  }
};
#include "tile.inc"
#include "many.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma,f16c")))
struct V {
  static constexpr int kRows = 12, kPanels = 2, kMany = 128;
  using F = __m512;
  using U = __m512i;
  using Table = __m512;
  LANE F zero() { return _mm512_setzero_ps(); }
  LANE Table table(const float* t) { return _mm512_loadu_ps(t); }
  LANE U load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  LANE F load(const float* p) { return _mm512_loadu_ps(p); }
  LANE F load(const Numbers& n, int64_t i) {
    if (n.type == Type::kF32) {
      return _mm512_loadu_ps(static_cast<const float*>(n.data) + i);
    }
    const void* p = static_cast<const uint16_t*>(n.data) + i;
    const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (n.type == Type::kF16) return _mm512_cvtph_ps(raw);
    return half(_mm512_cvtepu16_epi32(raw));
  }
  LANE F nibble(U w, Table t) { return _mm512_permutexvar_ps(w, t); }
  LANE F byte(U w) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 24), 24));
  }
  LANE F half(U w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  LANE F whole(U w) { return _mm512_castsi512_ps(w); }
  LANE U next(U w, int bits) { return _mm512_srli_epi32(w, bits); }
  LANE F fma(F a, float b, F c) {
    return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c);
  }
  LANE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  LANE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
};
#include "tile.inc"
#include "many.inc"
#undef TARGET
#undef LANE
}  // namespace avx512
#endif

}  // namespace panels

#endif  // PANELS_LANES_H_
