// y = x W on CPU for weights of 4, 8 or 16 bits in panels of 16 outputs.
//
// Decoding a token reads every weight once, so its speed is bytes per second.
// XLA decodes packed weights to memory before it multiplies; here they are
// decoded in registers. A panel holds 16 outputs, one for each lane of a
// vector, and a 32-bit word of a lane holds 8, 4 or 2 consecutive inputs of
// that output, the first in the lowest bits:
//
//   words  uint32 [panels, inputs * bits / 32, 16]
//   scale, offset  [panels, groups, 16], of which each serves `group` inputs
//
// A weight is scale * code + offset. 4-bit codes look their value up in a
// table of 16 floats, 8-bit codes are signed, 16 bits are a bfloat16. Inside a
// group only the codes are multiplied: scale enters once a group, and offset
// times the sum of the group's x, which is computed once.
//
// Where the CPU has VNNI and codes are integers, x becomes fixed point first:
// of a group's largest |x|, 23 bits, as three signed bytes. Products of bytes
// and their sums are exact integers, so this is as exact as float32, and for a
// row alone nearly twice as fast.
//
// Every output is summed in one order, input by input and group by group, by
// one thread, so results do not depend on the number of threads. (The last bits
// depend on the instruction set, and on whether a batch is small enough for
// fixed point.)
//
// The file includes itself once for each instruction set: the part below
// PANELS_BODY is written for a struct `V` of 16 lanes. GCC 9 or Clang 10.

#ifndef PANELS_BODY
#define PANELS_BODY

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Sums live in registers only where loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 8")

namespace panels {

constexpr int64_t kLanes = 16;

enum class Type { kNone, kF32, kF16, kBF16 };

// Numbers of any of the types; `data` is null where there are none.
struct Numbers {
  const void* data = nullptr;
  Type type = Type::kNone;
};

struct Problem {
  int64_t rows, outputs;            // of y
  int64_t inputs;                   // of x, at most `padded`
  int64_t panels, words;            // words: of one lane of a panel
  int64_t padded, group, groups;    // padded = group * groups = inputs of W
  int bits;                         // 4, 8 or 16
  const uint32_t* codes;
  Numbers scale, offset;            // without scale a weight is its code
  float table[kLanes];              // values of 4-bit codes
  const float* x;                   // [rows, padded], zeros after `inputs`
  const float* sums;                // [rows, groups] of x, or null
  const uint32_t* digits;           // x in fixed point, or null: see `vnni`
  const int32_t* starts;            // [rows, groups, 3]
  const float* units;               // [rows, groups], of the fixed point
  void* y;                          // [rows, outputs]
  Type y_type;                      // kF32 or kBF16
};

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

// To nearest, halves to even; NaN stays NaN.
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

namespace portable {
#define TARGET
struct V {
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
  static inline U next(const U& word, int bits) { return word >> bits; }
  static inline F fma(const F& a, float b, const F& c) { return a * b + c; }
  static inline F fma(const F& a, const F& b, const F& c) { return a * b + c; }
  static inline void store(float* p, const F& a) {
    std::memcpy(p, &a, sizeof a);
  }
};
#include "panels.cc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANE TARGET static inline __attribute__((always_inline))
struct V {
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
  // The permutation sees three bits; the fourth chooses between the halves.
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
#include "panels.cc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma,f16c")))
struct V {
  using F = __m512;
  using U = __m512i;
  using Table = __m512;
  LANE F zero() { return _mm512_setzero_ps(); }
  LANE Table table(const float* t) { return _mm512_loadu_ps(t); }
  LANE U load(const uint32_t* p) { return _mm512_loadu_si512(p); }
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
  LANE U next(U w, int bits) { return _mm512_srli_epi32(w, bits); }
  LANE F fma(F a, float b, F c) {
    return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c);
  }
  LANE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  LANE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
};
#include "panels.cc"
#undef TARGET
#undef LANE
}  // namespace avx512

// x in fixed point: unit * (d0 + 256 d1 + 65536 d2), all d signed bytes, the
// unit a group's own. Four inputs' bytes make a digit word, which vpdpbusd
// multiplies with four codes in each lane.
namespace vnni {
#define TARGET \
  __attribute__((  \
      target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
constexpr int kDigits = 3;
constexpr float kLargest = 8355000;  // below 127 * (1 + 256 + 65536)

// Rows from which float32 is faster: it decodes codes once for several rows.
constexpr int64_t kMany = 4;

// 4-bit codes that are consecutive integers, or 8 bits, in groups of 16 (and
// not so many that their sums overflow).
inline bool takes(const Problem& p) {
  if (p.rows >= kMany || !p.scale.data) return false;
  if (p.bits == 16 || p.group % 16 || p.group > (1 << 15)) return false;
  if (p.bits == 8) return true;
  for (int i = 0; i < kLanes; ++i) {
    if (p.table[i] != p.table[0] + float(i)) return false;
  }
  return p.table[0] == float(int8_t(p.table[0]));
}

// Codes are multiplied as unsigned ones; this is what they are less.
inline int32_t zero(const Problem& p) {
  return p.bits == 8 ? -128 : int32_t(p.table[0]);
}

// Writes digits, starts (zero times the digits' sums), units and sums of all
// groups; `digits` has padded / 4 words of each digit a row, digits last.
TARGET inline void prepare(const Problem& p, uint32_t* digits, int32_t* starts,
                           float* units, float* sums) {
  // A 4-bit word gives its even codes first, then its odd ones.
  __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7,  //
                                8, 10, 12, 14, 9, 11, 13, 15);
  if (p.bits == 8) {
    order = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7,  //
                          8, 9, 10, 11, 12, 13, 14, 15);
  }
  for (int64_t g = 0; g < p.rows * p.groups; ++g) {
    const float* x = p.x + g * p.group;
    __m512 top = _mm512_setzero_ps();
    bool finite = true;
    for (int64_t i = 0; i < p.group; i += 16) {
      const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + i));
      const __m512 most = _mm512_set1_ps(3.4028235e38f);
      finite &= _mm512_cmp_ps_mask(size, most, _CMP_LE_OQ) == 0xffff;
      top = _mm512_max_ps(top, size);
    }
    const float largest = _mm512_reduce_max_ps(top);
    // Smaller ones are 0, since their inverse may not be a float; what is not
    // finite makes all it touches NaN.
    const bool tiny = !finite || largest < 1e-30f;
    const __m512 inverse = _mm512_set1_ps(tiny ? 0 : kLargest / largest);
    const float unit = !finite ? from_bits(0x7fc00000)
                               : tiny ? 0 : largest / kLargest;
    __m512i sum[kDigits] = {};
    for (int64_t i = 0; i < p.group; i += 16) {
      __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse);
      if (tiny) scaled = _mm512_setzero_ps();
      __m512i rest = _mm512_cvtps_epi32(scaled);
      for (int k = 0; k < kDigits; ++k) {
        const __m512i digit =
            _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
        sum[k] = _mm512_add_epi32(sum[k], digit);
        uint32_t four[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(four),
                         _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digit), order));
        const int64_t at = (g * p.group + i) / 4;
        for (int j = 0; j < 4; ++j) digits[(at + j) * kDigits + k] = four[j];
      }
    }
    double total = 0;
    for (int k = kDigits; k-- > 0;) {
      const int32_t s = _mm512_reduce_add_epi32(sum[k]);
      starts[g * kDigits + k] = zero(p) * s;
      total = total * 256 + s;
    }
    units[g] = unit;
    sums[g] = float(total * unit);
  }
}

// One row of x times PANELS panels.
template <int BITS, int PANELS>
TARGET void tile(const Problem& p, int64_t row, int64_t panel) {
  constexpr int kWords = 8 / BITS;  // digit words of a word of codes
  const int64_t words = p.group * BITS / 32, stride = p.words * kLanes;
  const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  const __m512 base = _mm512_set1_ps(256);
  const uint32_t* x = p.digits + row * (p.padded / 4) * kDigits;
  const uint32_t* codes = p.codes + panel * stride;
  __m512 total[PANELS];
  UNROLL
  for (int q = 0; q < PANELS; ++q) total[q] = _mm512_setzero_ps();
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t which = row * p.groups + g;
    __m512i part[PANELS][kDigits];
    UNROLL
    for (int q = 0; q < PANELS; ++q) {
      UNROLL
      for (int k = 0; k < kDigits; ++k) {
        part[q][k] = _mm512_set1_epi32(p.starts[which * kDigits + k]);
      }
    }
    for (int64_t w = 0; w < words; ++w, codes += kLanes) {
      UNROLL
      for (int q = 0; q < PANELS; ++q) {
        const __m512i word = _mm512_loadu_si512(codes + q * stride);
        // A panel is about a page: the CPU's own prefetching stops at its end.
        __builtin_prefetch(codes + (q + PANELS) * stride);
        __m512i bytes[kWords];
        if constexpr (BITS == 8) {
          bytes[0] = _mm512_xor_si512(word, sign);
        } else {
          bytes[0] = _mm512_and_si512(word, low);
          bytes[1] = _mm512_and_si512(_mm512_srli_epi32(word, 4), low);
        }
        UNROLL
        for (int h = 0; h < kWords; ++h) {
          UNROLL
          for (int k = 0; k < kDigits; ++k) {
            const __m512i digit = _mm512_set1_epi32(int(x[h * kDigits + k]));
            part[q][k] = _mm512_dpbusd_epi32(part[q][k], bytes[h], digit);
          }
        }
      }
      x += kWords * kDigits;
    }
    const __m512 unit = _mm512_set1_ps(p.units[which]);
    const __m512 sum = _mm512_set1_ps(p.sums[which]);
    UNROLL
    for (int q = 0; q < PANELS; ++q) {
      const int64_t at = ((panel + q) * p.groups + g) * kLanes;
      __m512 value = _mm512_cvtepi32_ps(part[q][2]);
      value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(part[q][1]));
      value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(part[q][0]));
      value = _mm512_mul_ps(value, unit);
      const __m512 scale = avx512::V::load(p.scale, at);
      total[q] = _mm512_fmadd_ps(value, scale, total[q]);
      if (!p.offset.data) continue;
      const __m512 offset = avx512::V::load(p.offset, at);
      total[q] = _mm512_fmadd_ps(offset, sum, total[q]);
    }
  }
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    float values[kLanes];
    _mm512_storeu_ps(values, total[q]);
    put(p, row, panel + q, values);
  }
}

template <int BITS>
TARGET void range(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t panel = begin;
    for (; panel + 4 <= end; panel += 4) tile<BITS, 4>(p, row, panel);
    for (; panel < end; ++panel) tile<BITS, 1>(p, row, panel);
  }
}

TARGET inline void run(const Problem& p, int64_t begin, int64_t end) {
  p.bits == 4 ? range<4>(p, begin, end) : range<8>(p, begin, end);
}
#undef TARGET
}  // namespace vnni
#endif

// Returns the kernel called `name`, "auto" being the fastest that this CPU
// runs; null where it runs none of that name, or not for this problem.
inline Kernel kernel(const std::string& name, const Problem& p) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if ((any || name == "vnni") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && vnni::takes(p)) {
    return vnni::run;
  }
  if ((any || name == "avx512") && __builtin_cpu_supports("avx512f")) {
    return avx512::run;
  }
  if ((any || name == "avx2") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return avx2::run;
  }
#endif
  return any || name == "portable" ? portable::run : nullptr;
}

// What the threads of one product share. Helpers may start after it is done:
// they hold the job, find no chunk left, and touch nothing else.
struct Job {
  Problem problem;
  Kernel kernel;
  int64_t chunk, chunks;  // panels of a chunk, number of chunks
  std::vector<float> x, sums, units;
  std::vector<uint32_t> digits;
  std::vector<int32_t> starts;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    while (true) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= chunks) return;
      const int64_t end = (i + 1) * chunk;
      kernel(problem, i * chunk, end < problem.panels ? end : problem.panels);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Waking a thread takes as long as reading about this many bytes of codes.
constexpr int64_t kWorthWaking = 256 << 10;

// Computes y; `x` is [rows, inputs]. `schedule(task)` runs a task some time on
// another thread, of which there are `threads`.
template <class Schedule>
void multiply(Problem p, Kernel kernel, const Numbers& x, int64_t threads,
              const Schedule& schedule) {
  if (!p.rows || !p.panels) return;
  auto job = std::make_shared<Job>();
  if (x.type == Type::kF32 && p.inputs == p.padded) {
    p.x = static_cast<const float*>(x.data);
  } else {
    job->x.assign(p.rows * p.padded, 0);
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.inputs; ++i) {
        job->x[r * p.padded + i] = number(x, r * p.inputs + i);
      }
    }
    p.x = job->x.data();
  }
#if defined(__x86_64__)
  if (kernel == vnni::run) {
    const int64_t groups = p.rows * p.groups;
    job->digits.resize(p.rows * p.padded / 4 * vnni::kDigits);
    job->starts.resize(groups * vnni::kDigits);
    job->units.resize(groups);
    job->sums.resize(groups);
    p.digits = job->digits.data();
    p.starts = job->starts.data();
    p.units = job->units.data();
    p.sums = job->sums.data();
    vnni::prepare(p, job->digits.data(), job->starts.data(), job->units.data(),
                  job->sums.data());
  }
#endif
  if (p.offset.data && !p.sums) {
    job->sums.assign(p.rows * p.groups, 0);
    for (int64_t g = 0; g < p.rows * p.groups; ++g) {
      float part[4] = {};  // groups are whole words, of 4 inputs at least
      const float* x = p.x + g * p.group;
      for (int64_t i = 0; i < p.group; i += 4) {
        for (int k = 0; k < 4; ++k) part[k] += x[i + k];
      }
      job->sums[g] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    p.sums = job->sums.data();
  }
  const int64_t bytes = p.panels * p.words * kLanes * 4 * (1 + p.rows / 4);
  const int64_t most = 1 + bytes / kWorthWaking;
  const int64_t workers = threads < most ? threads : most;
  // A handful of chunks each, so that a slow one is waited for shortly, in
  // whole fours of panels, which a tile takes at once.
  int64_t chunk = p.panels;
  if (workers > 1) chunk = (p.panels / (4 * workers) + 3) & ~int64_t{3};
  if (chunk < 4) chunk = 4;
  job->problem = p;
  job->kernel = kernel;
  job->chunk = chunk;
  job->chunks = (p.panels + chunk - 1) / chunk;
  for (int64_t i = 1; i < workers; ++i) schedule([job] { job->work(); });
  // Works too, so that it never waits for a helper that has not started.
  job->work();
  while (job->done.load(std::memory_order_acquire) < job->chunks) {
    std::this_thread::yield();
  }
}

}  // namespace panels

#ifndef PANELS_WITHOUT_FFI
#include "xla/ffi/api/ffi.h"

namespace panels {
namespace ffi = xla::ffi;

inline Type type_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return Type::kF32;
    case ffi::DataType::F16: return Type::kF16;
    case ffi::DataType::BF16: return Type::kBF16;
    default: return Type::kNone;
  }
}

inline Numbers numbers(const ffi::AnyBuffer& buffer) {
  if (!buffer.element_count()) return {};
  return {buffer.untyped_data(), type_of(buffer.element_type())};
}

// Checks every buffer's shape before one byte is read.
inline ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x,
                       ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scale,
                       ffi::AnyBuffer offset, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Span<const float> table, int64_t bits,
                       int64_t group, std::string_view isa) {
  const auto bad = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("quantized_matmul: ")
                                           .append(what));
  };
  const auto xs = x.dimensions(), ws = codes.dimensions(), ys = y->dimensions();
  if (bits != 4 && bits != 8 && bits != 16) return bad("bits: not 4, 8 or 16");
  if (xs.size() != 2 || ys.size() != 2) return bad("x and y: not matrices");
  if (ws.size() != 3 || ws[2] != kLanes) return bad("codes: not [P, W, 16]");
  Problem p{};
  p.rows = xs[0], p.inputs = xs[1], p.outputs = ys[1];
  p.panels = ws[0], p.words = ws[1], p.bits = static_cast<int>(bits);
  p.padded = p.words * (32 / bits), p.group = group;
  if (ys[0] != p.rows) return bad("y: another number of rows than x");
  if (p.inputs > p.padded) return bad("x: more inputs than the codes have");
  if (p.outputs > p.panels * kLanes || p.outputs <= (p.panels - 1) * kLanes) {
    return bad("y: another number of outputs than the panels have");
  }
  if (group < 1 || group % (32 / bits) || p.padded % group) {
    return bad("group: not whole words, or not a divisor of the inputs");
  }
  p.groups = p.padded / group;
  p.codes = codes.typed_data();
  p.scale = numbers(scale), p.offset = numbers(offset);
  for (const ffi::AnyBuffer* part : {&scale, &offset}) {
    if (!part->element_count()) continue;
    const auto s = part->dimensions();
    if (s.size() != 3 || s[0] != p.panels || s[1] != p.groups ||
        s[2] != kLanes) {
      return bad("scale, offset: not [P, groups, 16]");
    }
    if (numbers(*part).type == Type::kNone) {
      return bad("scale, offset: no floats");
    }
  }
  if (p.offset.data && !p.scale.data) return bad("offset: without a scale");
  if (!p.scale.data && p.groups != 1) return bad("group: without a scale");
  if (bits == 4) {
    if (table.size() != kLanes) return bad("codebook: not 16 values");
    std::memcpy(p.table, table.begin(), sizeof p.table);
  }
  const Numbers in = {x.untyped_data(), type_of(x.element_type())};
  p.y = y->untyped_data(), p.y_type = type_of(y->element_type());
  if (in.type != Type::kF32 && in.type != Type::kBF16) return bad("x: type");
  if (p.y_type != Type::kF32 && p.y_type != Type::kBF16) return bad("y: type");
  const Kernel chosen = kernel(std::string(isa), p);
  if (!chosen) return bad("isa: this CPU has none of that name for this W");
  multiply(p, chosen, in, pool.num_threads() > 1 ? pool.num_threads() : 1,
           [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace panels

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HeptadPanels, panels::call,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::AnyBuffer>()
        .Attr<xla::ffi::Span<const float>>("codebook")
        .Attr<int64_t>("bits")
        .Attr<int64_t>("group")
        .Attr<std::string_view>("isa"));
#endif

#else  // PANELS_BODY: for one instruction set's `V`, inside its namespace

// ROWS rows of x times PANELS panels, from `row` and `panel` on.
template <int BITS, int ROWS, int PANELS>
TARGET void tile(const Problem& p, int64_t row, int64_t panel) {
  constexpr int kCodes = 32 / BITS;  // of a word
  const V::Table table = V::table(p.table);
  const int64_t words = p.group / kCodes;  // of a group
  const float* x[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) x[r] = p.x + (row + r) * p.padded;
  const uint32_t* codes[PANELS];
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    codes[q] = p.codes + (panel + q) * p.words * kLanes;
  }
  V::F total[PANELS][ROWS];
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) total[q][r] = V::zero();
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    V::F part[PANELS][ROWS];
    UNROLL
    for (int q = 0; q < PANELS; ++q) {
      UNROLL
      for (int r = 0; r < ROWS; ++r) part[q][r] = V::zero();
    }
    for (int64_t w = 0; w < words; ++w) {
      UNROLL
      for (int q = 0; q < PANELS; ++q) {
        V::U word = V::load(codes[q]);
        // A panel is about a page: the CPU's own prefetching stops at its end.
        __builtin_prefetch(codes[q] + PANELS * p.words * kLanes);
        codes[q] += kLanes;
        UNROLL
        for (int j = 0; j < kCodes; ++j) {
          const V::F value = BITS == 4   ? V::nibble(word, table)
                             : BITS == 8 ? V::byte(word)
                                         : V::half(word);
          word = V::next(word, BITS);
          UNROLL
          for (int r = 0; r < ROWS; ++r) {
            part[q][r] = V::fma(value, x[r][j], part[q][r]);
          }
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) x[r] += kCodes;
    }
    UNROLL
    for (int q = 0; q < PANELS; ++q) {
      if (!p.scale.data) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) total[q][r] = part[q][r];
        continue;
      }
      const int64_t at = ((panel + q) * p.groups + g) * kLanes;
      const V::F scale = V::load(p.scale, at);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        total[q][r] = V::fma(part[q][r], scale, total[q][r]);
      }
      if (!p.offset.data) continue;
      const V::F offset = V::load(p.offset, at);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const float sum = p.sums[(row + r) * p.groups + g];
        total[q][r] = V::fma(offset, sum, total[q][r]);
      }
    }
  }
  UNROLL
  for (int q = 0; q < PANELS; ++q) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float values[kLanes];
      V::store(values, total[q][r]);
      put(p, row + r, panel + q, values);
    }
  }
}

// All rows times PANELS panels. Few rows take several panels at once, so that
// enough sums are in flight.
template <int BITS, int PANELS>
TARGET void rows(const Problem& p, int64_t panel) {
  int64_t row = 0;
  if constexpr (PANELS == 1) {
    for (; row + 8 <= p.rows; row += 8) tile<BITS, 8, 1>(p, row, panel);
    for (; row + 4 <= p.rows; row += 4) tile<BITS, 4, 1>(p, row, panel);
  }
  for (; row + 2 <= p.rows; row += 2) tile<BITS, 2, PANELS>(p, row, panel);
  for (; row < p.rows; ++row) tile<BITS, 1, PANELS>(p, row, panel);
}

template <int BITS>
TARGET void range(const Problem& p, int64_t begin, int64_t end) {
  int64_t panel = begin;
  if (p.rows < 4) {
    for (; panel + 4 <= end; panel += 4) rows<BITS, 4>(p, panel);
  }
  for (; panel < end; ++panel) rows<BITS, 1>(p, panel);
}

TARGET inline void run(const Problem& p, int64_t begin, int64_t end) {
  if (p.bits == 4) range<4>(p, begin, end);
  if (p.bits == 8) range<8>(p, begin, end);
  if (p.bits == 16) range<16>(p, begin, end);
}

#endif
