// SIMD vectors of each instruction set, and attention compiled for each.

#ifndef ATTENTION_LANES_H_
#define ATTENTION_LANES_H_

#include "../../common/cpu_isa.h"
#include "mask.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace attention {

namespace portable {
#define TARGET
constexpr int64_t kLanes = 4, kRows = 4;
#include "../../common/cpu_vector.inc"
#include "tile.inc"
#include "forward.inc"
#include "backward.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET AVX2
constexpr int64_t kLanes = 8, kRows = 4;
#include "../../common/cpu_vector.inc"
#include "tile.inc"
#include "forward.inc"
#include "backward.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512
constexpr int64_t kLanes = 16, kRows = 8;
#include "../../common/cpu_vector.inc"
#include "tile.inc"
#include "forward.inc"
#include "backward.inc"
#undef TARGET
}  // namespace avx512
#endif

}  // namespace attention

#endif  // ATTENTION_LANES_H_
