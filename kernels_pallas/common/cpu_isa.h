// Instruction sets that the attention and decoding kernels are compiled for,
// and the choice of one that this CPU supports.

#ifndef KERNELS_CPU_ISA_H_
#define KERNELS_CPU_ISA_H_

#include <string>

// Accumulators stay in registers only if loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

// The features that `chosen` checks for.
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))

namespace isa {

enum class Isa { kNone, kPortable, kAvx2, kAvx512 };

// Returns the instruction set called `name`, or for "auto" the best that this
// CPU supports; kNone if the CPU does not support it.
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
