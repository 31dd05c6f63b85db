// Vectors of each instruction set, and attention over them.

#ifndef ATTENTION_LANES_H_
#define ATTENTION_LANES_H_

#include "cpu_mask.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

// Sums live in registers only where loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

namespace attention {

namespace portable {
#define TARGET
constexpr int64_t kLanes = 4, kRows = 4;
#include "../cpu_vector.inc"
#include "cpu_tile.inc"
#include "cpu_forward.inc"
#include "cpu_backward.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int64_t kLanes = 8, kRows = 4;
#include "../cpu_vector.inc"
#include "cpu_tile.inc"
#include "cpu_forward.inc"
#include "cpu_backward.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
constexpr int64_t kLanes = 16, kRows = 8;
#include "../cpu_vector.inc"
#include "cpu_tile.inc"
#include "cpu_forward.inc"
#include "cpu_backward.inc"
#undef TARGET
}  // namespace avx512
#endif

}  // namespace attention

#endif  // ATTENTION_LANES_H_
