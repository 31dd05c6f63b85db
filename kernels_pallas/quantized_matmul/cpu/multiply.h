// Choice of the kernel, and the division of a product over threads.

#ifndef PANELS_MULTIPLY_H_
#define PANELS_MULTIPLY_H_

#include <memory>
#include <string>
#include <vector>

#include "../../common/cpu_tasks.h"
#include "bfloat16.h"
#include "lanes.h"
#include "vnni.h"

namespace panels {

// Returns the kernel called `name`, or for "auto" the fastest that this CPU
// supports; null if the CPU or the problem is not supported.
inline Kernel kernel(const std::string& name, const Problem& p) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if ((any || name == "vnni") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && vnni::takes(p)) {
    return vnni::run;
  }
#if defined(PANELS_BFLOAT16)
  if ((any || name == "bfloat16") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512bw") && bfloat16::takes(p)) {
    return bfloat16::run;
  }
#endif
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

// The data shared by the chunks of one product.
struct Job {
  Problem problem;
  Kernel kernel;
  int64_t chunk, chunks;  // panels per chunk, number of chunks
  std::vector<float> x, sums, units;
  std::vector<uint32_t> digits;
  std::vector<int32_t> starts;

  void multiply(int64_t i) const {
    const int64_t end = (i + 1) * chunk;
    kernel(problem, i * chunk, end < problem.panels ? end : problem.panels);
  }
};

// Waking a thread costs about as much as reading this many bytes of codes.
constexpr int64_t kWorthWaking = 64 << 10;

inline bool takes_pairs(Kernel kernel) {
#if defined(PANELS_BFLOAT16)
  return kernel == bfloat16::run;
#else
  return false;
#endif
}

// Whether a kernel treats this problem as one of many rows, see `many.inc`.
inline bool decodes_ahead(Kernel kernel, const Problem& p) {
#if defined(__x86_64__)
  if (kernel == avx512::run) return avx512::is_many(p);
  if (kernel == avx2::run) return avx2::is_many(p);
#endif
  return kernel == portable::run && portable::is_many(p);
}

// Computes y; `x` is [rows, inputs]. `schedule(task)` runs a task on another
// thread at some later time; there are `threads` of them.
template <class Schedule>
void multiply(Problem p, Kernel kernel, const Numbers& x, int64_t threads,
              const Schedule& schedule) {
  if (!p.rows || !p.panels) return;
  const bool ahead = decodes_ahead(kernel, p);
  auto job = std::make_shared<Job>();
  if (takes_pairs(kernel)) {
    p.pairs = static_cast<const uint16_t*>(x.data);
  } else if (x.type == Type::kF32 && p.inputs == p.padded) {
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
  if (p.offset.data && !p.sums && !ahead) {
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
  // A few chunks per thread, so that a slow one delays little, in multiples of
  // four panels, which a tile processes at once; more chunks, in multiples of
  // two, if weights are dequantized ahead for many rows, which makes each of
  // them long.
  const int64_t each = ahead ? 16 : 4, whole = ahead ? 2 : 4;
  int64_t chunk = p.panels;
  if (workers > 1) chunk = p.panels / (each * workers) + whole - 1;
  chunk -= chunk % whole;
  if (chunk < whole) chunk = whole;
  job->problem = p;
  job->kernel = kernel;
  job->chunk = chunk;
  job->chunks = (p.panels + chunk - 1) / chunk;
  tasks::share(job->chunks, workers, [job](int64_t i) { job->multiply(i); },
               schedule);
}

}  // namespace panels

#endif  // PANELS_MULTIPLY_H_
