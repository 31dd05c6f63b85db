// Instruction sets that attention and decoding are compiled for, and which of
// them a CPU runs.

#ifndef KERNELS_CPU_ISA_H_
#define KERNELS_CPU_ISA_H_

#include <string>

// Sums live in registers only where loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

// What `chosen` looks for.
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))

namespace isa {

enum class Isa { kNone, kPortable, kAvx2, kAvx512 };

// Returns the set called `name`, "auto" being the best that this CPU has; kNone
// where it has none of that name.
inline Isa chosen(const std::string& name) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if ((any || name == "avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if ((any || name == "avx2") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return Isa::kAvx2;
  }
#endif
  return any || name == "portable" ? Isa::kPortable : Isa::kNone;
}

}  // namespace isa

#endif  // KERNELS_CPU_ISA_H_
