// The inputs of a product, and conversions of their number types.

#ifndef PANELS_PROBLEM_H_
#define PANELS_PROBLEM_H_

#include <cstdint>
#include <cstring>

// Accumulators stay in registers only if loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")

namespace panels {

constexpr int64_t kLanes = 16;

enum class Type { kNone, kF32, kF16, kBF16 };

// Numbers of any of the types; `data` is null if absent.
struct Numbers {
  const void* data = nullptr;
  Type type = Type::kNone;
};

struct Problem {
  int64_t rows, outputs;            // of y
  int64_t inputs;                   // of x, at most `padded`
  int64_t panels, words;            // words: per lane of a panel
  int64_t padded, group, groups;    // padded = group * groups = inputs of W
  int bits;                         // 4, 8, 16 or 32
  const uint32_t* codes;
  Numbers scale, offset;            // without a scale, a weight is its code
  float table[kLanes];              // values of 4-bit codes
  Type x_type;                      // as passed, kF32 or kBF16
  const float* x;                   // [rows, padded], zeros after `inputs`
  const uint16_t* pairs;            // x as passed, if `bfloat16` runs
  const float* sums;                // [rows, groups] of x, or null
  const uint32_t* digits;           // x in fixed point, or null: see `vnni`
  const int32_t* starts;            // [rows, groups, 3]
  const float* units;               // [rows, groups], units of the fixed point
  void* y;                          // [rows, outputs]
  Type y_type;                      // kF32 or kBF16
};

// Prefetches number i; addresses past the end are harmless.
inline void prefetch(const Numbers& numbers, int64_t i) {
  const int64_t size = numbers.type == Type::kF32 ? 4 : 2;
  __builtin_prefetch(static_cast<const char*>(numbers.data) + i * size);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Exact, subnormals, infinities and NaN included.
inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest < 0x400) {  // subnormal: a multiple of 2^-24
    const float magnitude = float(rest) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t exponent = rest >= 0x7c00 ? 0x70000000u : 0x38000000u;
  return from_bits(sign | ((rest << 13) + exponent));
}

inline float from_bfloat16(uint16_t b) { return from_bits(uint32_t(b) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 64;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float number(const Numbers& numbers, int64_t i) {
  switch (numbers.type) {
    case Type::kF32: return static_cast<const float*>(numbers.data)[i];
    case Type::kF16:
      return from_half(static_cast<const uint16_t*>(numbers.data)[i]);
    case Type::kBF16:
      return from_bfloat16(static_cast<const uint16_t*>(numbers.data)[i]);
    case Type::kNone: break;
  }
  return 0;
}

// Writes one row's 16 outputs of a panel; the last panel may be partial.
inline void put(const Problem& p, int64_t row, int64_t panel,
                const float* values) {
  const int64_t first = panel * kLanes;
  const int64_t n = p.outputs - first < kLanes ? p.outputs - first : kLanes;
  const int64_t at = row * p.outputs + first;
  if (p.y_type == Type::kF32) {
    std::memcpy(static_cast<float*>(p.y) + at, values, n * sizeof(float));
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(p.y) + at;
  for (int64_t i = 0; i < n; ++i) y[i] = to_bfloat16(values[i]);
}

// Computes panels [begin, end) for all rows.
using Kernel = void (*)(const Problem&, int64_t begin, int64_t end);

}  // namespace panels

#endif  // PANELS_PROBLEM_H_
