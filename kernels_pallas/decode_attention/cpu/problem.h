// The inputs of a decoding step, and its division into tasks.

#ifndef DECODING_PROBLEM_H_
#define DECODING_PROBLEM_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace decoding {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int64_t kKeys = 512;  // per task; 2 KB of scores for one query

// Arrays are as JAX stores them, the last axis contiguous. Elements are
// float32, or the bits of bfloat16.
struct Problem {
  int64_t B, S;            // rows, capacity of a row in keys
  int64_t N, K;            // query heads, key heads
  int64_t H, V;            // head dims of keys, of values: multiples of 16
  int64_t window;          // most keys that a query sees, 0 for all
  float scale, softcap;    // on q.k; c of c tanh(x / c), 0 for none
  bool halves;             // whether q, k, v are bfloat16
  const void *q, *k, *v;   // [B, N, H], [B, K, S, H], [B, K, S, V]
  const int32_t* lengths;  // [B]; the query is at the last of these positions
  float* o;                // [B, N, V]
  float* lse;              // [B, N], natural

  int64_t group() const { return N / K; }
};

// Keys [begin, end) of one key head of a row, for its queries. The only task of
// a row and head (`part` is below 0) writes results; others write partial
// results for `combine`: per query the output, maximum and sum.
struct Task {
  int64_t row, head, begin, end, part;
};

// Tasks depend on shapes and lengths alone, and so does the order of all sums.
struct Job {
  Problem problem;
  std::vector<Task> tasks;
  std::vector<float> parts;  // [parts, group, V + 2]
  int64_t keys = 0;          // over all tasks

  explicit Job(const Problem& p) : problem(p) {
    int64_t count = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      int64_t length = p.lengths[b] < p.S ? p.lengths[b] : p.S;
      if (length < 0) length = 0;
      int64_t low = 0;
      if (p.window && length > p.window) low = length - p.window;
      const bool one = length - low <= kKeys;
      for (int64_t h = 0; h < p.K; ++h) {
        int64_t begin = low;
        do {
          const int64_t end = length - begin < kKeys ? length : begin + kKeys;
          tasks.push_back({b, h, begin, end, one ? -1 : count++});
          begin = end;
        } while (begin < length);
      }
      keys += p.K * (length - low);
    }
    parts.resize(count * p.group() * (p.V + 2));
  }

  float* part(int64_t i) {
    return parts.data() + i * problem.group() * (problem.V + 2);
  }
};

// Writes the normalised output and log-sum-exp of one query head.
inline void finish(const Problem& p, int64_t row, int64_t n, float largest,
                   float sum, const float* total) {
  const int64_t at = row * p.N + n;
  const float factor = sum == 0 ? 0 : 1 / sum;
  for (int64_t i = 0; i < p.V; ++i) p.o[at * p.V + i] = total[i] * factor;
  p.lse[at] = sum == 0 ? -kInfinity : (largest + std::log2(sum)) * kLn2;
}

// Combines the results of rows that are split over several tasks.
inline void combine(Job* job) {
  const Problem& p = job->problem;
  const int64_t G = p.group(), width = p.V + 2;
  std::vector<float> total(p.V);
  for (size_t first = 0, after; first < job->tasks.size(); first = after) {
    const Task& task = job->tasks[first];
    for (after = first + 1; after < job->tasks.size(); ++after) {
      const Task& other = job->tasks[after];
      if (other.row != task.row || other.head != task.head) break;
    }
    if (task.part < 0) continue;
    for (int64_t g = 0; g < G; ++g) {
      const float* parts = job->part(task.part) + g * width;
      const int64_t count = after - first;
      float m = -kInfinity, sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float other = parts[i * G * width + p.V];
        m = other > m ? other : m;
      }
      const float shift = m == -kInfinity ? 0 : m;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const float* from = parts + i * G * width;
        const float factor = std::exp2(from[p.V] - shift);
        sum += from[p.V + 1] * factor;
        for (int64_t v = 0; v < p.V; ++v) total[v] += from[v] * factor;
      }
      finish(p, task.row, task.head * G + g, m, sum, total.data());
    }
  }
}

using Kernel = void (*)(Job*, const Task&);

}  // namespace decoding

#endif  // DECODING_PROBLEM_H_
