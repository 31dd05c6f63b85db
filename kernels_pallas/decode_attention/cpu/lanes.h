// SIMD vectors of each instruction set, and decoding compiled for each.

#ifndef DECODING_LANES_H_
#define DECODING_LANES_H_

#include <algorithm>

#include "../../common/cpu_isa.h"
#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace decoding {

namespace portable {
#define TARGET
constexpr int64_t kLanes = 4;
#include "../../common/cpu_vector.inc"
INLINE float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#include "decode.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET AVX2
constexpr int64_t kLanes = 8;
#include "../../common/cpu_vector.inc"
TARGET INLINE float sum(F x) {
  __m128 half = _mm256_castps256_ps128((__m256)x);
  half = _mm_add_ps(half, _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#include "decode.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512
constexpr int64_t kLanes = 16;
#include "../../common/cpu_vector.inc"
TARGET INLINE float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
#include "decode.inc"
#undef TARGET
}  // namespace avx512
#endif

}  // namespace decoding

#endif  // DECODING_LANES_H_
