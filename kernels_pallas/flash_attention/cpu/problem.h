// The inputs of an attention call, and its division into tasks.

#ifndef ATTENTION_PROBLEM_H_
#define ATTENTION_PROBLEM_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace attention {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int64_t kMostIntervals = 8;

// Arrays are as JAX stores them, the last axis contiguous.
struct Problem {
  int64_t B, T, S;                // batch rows, queries, keys
  int64_t N, K;                   // query heads, key heads
  int64_t H, V;                   // head dim of queries and keys, of values
  float scale;                    // on q.k
  const float *q, *k, *v;         // [B, T, N, H], [B, S, K, H], [B, S, K, V]
  // Query t sees the keys whose coordinate lies in one of its intervals.
  int64_t intervals;
  const int32_t* bounds;          // [1 or B, intervals, 2, T]: lo, hi
  const int32_t* coordinates;     // [1 or B, S], or null: keys' indices
  const int32_t* q_segments;      // [1 or B, T], or null
  const int32_t* k_segments;      // [1 or B, S]; must equal the query's
  bool bounds_of_rows, coordinates_of_rows;     // whether the first axis is B
  bool q_segments_of_rows, k_segments_of_rows;
  // Forward.
  const float* sinks;             // [1 or B, N], or null
  bool sinks_of_rows;
  float* o;                       // [B, T, N, V]
  float* lse;                     // [B, N, T]
  // Backward.
  const float* d_o;               // [B, T, N, V]
  const float* found_lse;         // [B, N, T], +inf where no key is visible
  const float* shift;             // [B, N, T]
  int64_t chunks;                 // number of chunks of keys
  float* dq;                      // [chunks, B, T, N, H]
  float *dk, *dv;                 // shaped as k and v

  int64_t group() const { return N / K; }
  int64_t chunk() const { return (S + chunks - 1) / chunks; }
};

// Computes one of a problem's tasks.
using Kernel = void (*)(const Problem&, int64_t task);

inline int64_t up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace attention

#endif  // ATTENTION_PROBLEM_H_
