// Integer codes times x in fixed point, by byte products (AVX-512 VNNI).

#ifndef PANELS_VNNI_H_
#define PANELS_VNNI_H_

#include "lanes.h"

#if defined(__x86_64__)
namespace panels {

// x in fixed point: unit * (d0 + 256 d1 + 65536 d2), all d signed bytes, with
// one unit per group. The bytes of four inputs make a digit word, which
// vpdpbusd multiplies with four codes in each lane.
namespace vnni {
#define TARGET \
  __attribute__((  \
      target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
constexpr int kDigits = 3;
constexpr float kLargest = 8355000;  // below 127 * (1 + 256 + 65536)

// Rows from which float32 is as fast: it decodes codes once for several rows.
constexpr int64_t kTooMany = 4;

// Cache lines of codes to prefetch ahead. Panels of a page's size end before
// the hardware prefetcher starts.
constexpr int64_t kAhead = 64;

// Returns whether `factor` times each table entry is a signed byte; stores it.
inline bool as_bytes(const Problem& p, float factor, int8_t* out) {
  for (int i = 0; i < kLanes; ++i) {
    const float entry = factor * p.table[i];
    if (!(entry >= -128 && entry <= 127)) return false;
    out[i] = int8_t(entry);
    if (float(out[i]) != entry) return false;
  }
  return true;
}

// Whether 4-bit codes are consecutive integers, which need no table.
inline bool counts(const Problem& p) {
  for (int i = 0; i < kLanes; ++i) {
    if (p.table[i] != p.table[0] + float(i)) return false;
  }
  return p.table[0] == float(int8_t(p.table[0]));
}

// The factor that makes entries bytes: 1 for IQ4, 2 for FP4, whose are halves.
inline float factor(const Problem& p) {
  int8_t found[kLanes];
  return p.bits == 8 || counts(p) || as_bytes(p, 1, found) ? 1 : 2;
}

// Supports 8 bits, or 4 whose entries are bytes or halves of bytes, in groups
// of a multiple of 16 (and small enough that their sums do not overflow).
inline bool takes(const Problem& p) {
  if (p.rows >= kTooMany || !p.scale.data) return false;
  if (p.bits == 16 || p.group % 16 || p.group > (1 << 15)) return false;
  int8_t found[kLanes];
  return p.bits == 8 || counts(p) || as_bytes(p, 1, found) ||
         as_bytes(p, 2, found);
}

// Codes are multiplied as unsigned ones; returns what must be added to them.
inline int32_t zero(const Problem& p) {
  return p.bits == 4 && counts(p) ? int32_t(p.table[0]) : -128;
}

// Writes digits, starts (zero times the digits' sums), units and sums of all
// groups; `digits` has padded / 4 words of each digit per row, digits last.
TARGET inline void prepare(const Problem& p, uint32_t* digits, int32_t* starts,
                           float* units, float* sums) {
  const float shrink = 1 / factor(p);
  const int32_t none = zero(p);
  // A 4-bit word yields its even codes first, then its odd ones.
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
    // Smaller values become 0, since their inverse may not be a float; values
    // that are not finite turn the whole group into NaN.
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
      starts[g * kDigits + k] = none * s;
      total = total * 256 + s;
    }
    units[g] = unit * shrink;
    sums[g] = float(total * unit);
  }
}

// ROWS rows of x times one panel. Panels are contiguous in memory, and so are
// their scales: three streams, read in order.
enum class Codes { kCount, kTable, kBytes };

template <Codes CODES, int ROWS>
TARGET void tile(const Problem& p, __m512i table, int64_t row, int64_t panel) {
  constexpr int kBits = CODES == Codes::kBytes ? 8 : 4;
  constexpr int kWords = 8 / kBits;  // digit words per word of codes
  const int64_t words = p.group * kBits / 32, ahead = 1 + kAhead / words;
  const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  const __m512 base = _mm512_set1_ps(256);
  const int64_t stride = p.padded / 4 * kDigits;
  const uint32_t* x = p.digits + row * stride;
  const uint32_t* codes = p.codes + panel * p.words * kLanes;
  __m512 total[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < p.groups; ++g) {
    __m512i part[ROWS][kDigits];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const int32_t* start = p.starts + ((row + r) * p.groups + g) * kDigits;
      UNROLL
      for (int k = 0; k < kDigits; ++k) {
        part[r][k] = _mm512_set1_epi32(start[k]);
      }
    }
    for (int64_t w = 0; w < words; ++w, codes += kLanes) {
      const __m512i word = _mm512_loadu_si512(codes);
      __builtin_prefetch(codes + kAhead * kLanes);
      __m512i plain[kWords];
      if constexpr (CODES == Codes::kBytes) {
        plain[0] = _mm512_xor_si512(word, sign);
      } else {
        plain[0] = _mm512_and_si512(word, low);
        plain[1] = _mm512_and_si512(_mm512_srli_epi32(word, 4), low);
      }
      if constexpr (CODES == Codes::kTable) {
        UNROLL
        for (int h = 0; h < kWords; ++h) {
          plain[h] = _mm512_shuffle_epi8(table, plain[h]);
        }
      }
      UNROLL
      for (int h = 0; h < kWords; ++h, x += kDigits) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
          UNROLL
          for (int k = 0; k < kDigits; ++k) {
            const __m512i digit = _mm512_set1_epi32(int(x[r * stride + k]));
            part[r][k] = _mm512_dpbusd_epi32(part[r][k], plain[h], digit);
          }
        }
      }
    }
    const int64_t at = (panel * p.groups + g) * kLanes;
    const __m512 scale = avx512::V::load(p.scale, at);
    prefetch(p.scale, at + ahead * kLanes);
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      __m512 value = _mm512_cvtepi32_ps(part[r][2]);
      value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(part[r][1]));
      value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(part[r][0]));
      const float unit = p.units[(row + r) * p.groups + g];
      value = _mm512_mul_ps(value, _mm512_set1_ps(unit));
      total[r] = _mm512_fmadd_ps(value, scale, total[r]);
    }
    if (!p.offset.data) continue;
    const __m512 offset = avx512::V::load(p.offset, at);
    prefetch(p.offset, at + ahead * kLanes);
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float sum = p.sums[(row + r) * p.groups + g];
      total[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), total[r]);
    }
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    float values[kLanes];
    _mm512_storeu_ps(values, total[r]);
    put(p, row + r, panel, values);
  }
}

template <Codes CODES>
TARGET void range(const Problem& p, int64_t begin, int64_t end) {
  // The value of each code, plus 128, so that it is an unsigned byte.
  int8_t entries[kLanes] = {};
  if (CODES == Codes::kTable) as_bytes(p, factor(p), entries);
  const void* raw = entries;
  const __m512i table = _mm512_xor_si512(
      _mm512_set1_epi8(-128),
      _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(raw))));
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t row = 0;
    for (; row + 2 <= p.rows; row += 2) tile<CODES, 2>(p, table, row, panel);
    for (; row < p.rows; ++row) tile<CODES, 1>(p, table, row, panel);
  }
}

TARGET inline void run(const Problem& p, int64_t begin, int64_t end) {
  if (p.bits == 8) return range<Codes::kBytes>(p, begin, end);
  if (counts(p)) return range<Codes::kCount>(p, begin, end);
  range<Codes::kTable>(p, begin, end);
}
#undef TARGET
}  // namespace vnni

}  // namespace panels
#endif

#endif  // PANELS_VNNI_H_
