// Attention of one new token per row to the row's cache, on CPU.
//
// XLA needs a dozen kernels for this step, each of which reads and writes the
// scores of the whole cache, and some the cache itself; here a row's keys are
// read once, up to its length. Sums and probabilities are float32.
// // Rows with many keys are split into tasks that are combined (Dao et al.
// 2023, "Flash-Decoding"), by their lengths alone: results do not depend on the
// number of threads (their last bits depend on the instruction set).
// // `problem.h` defines the inputs and tasks, `lanes.h` the instruction sets,
// `decode.inc` what a task computes; this file is the XLA FFI interface. GCC 9
// or Clang 10.

#include <memory>
#include <string>

#include "../../common/cpu_tasks.h"
#include "lanes.h"

namespace decoding {

// Returns the kernel called `name`, or for "auto" the fastest that this CPU
// supports; null if it does not support it.
inline Kernel kernel(const std::string& name) {
  switch (isa::chosen(name)) {
#if defined(__x86_64__)
    case isa::Isa::kAvx512: return avx512::run;
    case isa::Isa::kAvx2: return avx2::run;
#endif
    case isa::Isa::kPortable: return portable::run;
    default: return nullptr;
  }
}

// Waking a thread costs about as much as this many multiplications.
constexpr int64_t kWorthWaking = 1 << 17;

// `schedule(task)` runs a task on another thread at some later time; there are
// `threads` of them.
template <class Schedule>
void decode(const Problem& p, Kernel kernel, int64_t threads,
            const Schedule& schedule) {
  const auto job = std::make_shared<Job>(p);
  const int64_t work = job->keys * p.group() * (p.H + p.V);
  const int64_t most = 1 + work / kWorthWaking;
  tasks::share(job->tasks.size(), threads < most ? threads : most,
               [job, kernel](int64_t i) { kernel(job.get(), job->tasks[i]); },
               schedule);
  combine(job.get());
}

}  // namespace decoding

#ifndef DECODING_WITHOUT_FFI
#include "xla/ffi/api/ffi.h"

namespace decoding {
namespace ffi = xla::ffi;

// Axes before the last `count` are rows; `vmap` adds some.
inline int64_t rows(ffi::Span<const int64_t> shape, size_t count) {
  int64_t rows = 1;
  for (size_t i = 0; i + count < shape.size(); ++i) rows *= shape[i];
  return rows;
}

// Checks the shapes of all buffers before reading them.
inline ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                       ffi::AnyBuffer v, ffi::Buffer<ffi::S32> lengths,
                       ffi::Result<ffi::Buffer<ffi::F32>> o,
                       ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale,
                       float softcap, int64_t window, std::string_view isa) {
  const auto bad = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("decoding: ").append(what));
  };
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions();
  if (qs.size() < 3 || ks.size() < 4 || vs.size() < 4) {
    return bad("q, k, v: not [B, N, H], [B, K, S, H], [B, K, S, V]");
  }
  Problem p{};
  p.B = rows(qs, 2), p.N = qs[qs.size() - 2], p.H = qs[qs.size() - 1];
  p.K = ks[ks.size() - 3], p.S = ks[ks.size() - 2], p.V = vs[vs.size() - 1];
  if (rows(ks, 3) != p.B || rows(vs, 3) != p.B || ks[ks.size() - 1] != p.H ||
      vs[vs.size() - 3] != p.K || vs[vs.size() - 2] != p.S || p.K < 1 ||
      p.N % p.K) {
    return bad("k, v: other shapes than q's");
  }
  if (p.H % 16 || p.V % 16 || p.H < 1) return bad("head dims: not whole 16s");
  const auto type = q.element_type();
  p.halves = type == ffi::DataType::BF16;
  if ((!p.halves && type != ffi::DataType::F32) || k.element_type() != type ||
      v.element_type() != type) {
    return bad("q, k, v: not all float32, or all bfloat16");
  }
  if (int64_t(lengths.element_count()) != p.B) return bad("lengths: not [B]");
  if (int64_t(o->element_count()) != p.B * p.N * p.V ||
      int64_t(lse->element_count()) != p.B * p.N) {
    return bad("o, lse: not [B, N, V], [B, N]");
  }
  if (softcap < 0 || window < 0) return bad("softcap, window: below 0");
  p.q = q.untyped_data(), p.k = k.untyped_data(), p.v = v.untyped_data();
  p.lengths = lengths.typed_data();
  p.o = o->typed_data(), p.lse = lse->typed_data();
  p.scale = scale, p.softcap = softcap, p.window = window;
  const Kernel chosen = kernel(std::string(isa));
  if (!chosen) return bad("isa: this CPU has none of that name");
  decode(p, chosen, pool.num_threads() > 1 ? pool.num_threads() : 1,
         [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace decoding

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HeptadDecoding, decoding::call,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Attr<float>("scale")
        .Attr<float>("softcap")
        .Attr<int64_t>("window")
        .Attr<std::string_view>("isa"));
#endif
