// Exact attention on CPU, forward and backward, in float32.
//
// XLA computes attention with separate matmul calls, between which scores pass
// through memory; here a tile's scores stay in the L1 and L2 caches. The
// algorithm is flash attention (Dao 2023, arXiv:2307.08691): the forward pass
// saves the log-sum-exp, from which the backward pass recomputes probabilities.
// // Each task sums in a fixed order, and tasks depend on shapes alone, so
// results do not depend on the number of threads (their last bits depend on the
// instruction set).
// // `problem.h` defines the inputs, `mask.h` the tiles to visit, `lanes.h` the
// instruction sets, `tile.inc` the operations inside a tile, `forward.inc` and
// `backward.inc` the tasks; this file is the XLA FFI interface. GCC 9 or Clang
// 10.

#include <string>

#include "../../common/cpu_tasks.h"
#include "lanes.h"

namespace attention {

struct Kernels {
  Kernel forward, backward;
  int64_t (*forward_tasks)(const Problem&);
  int64_t (*backward_tasks)(const Problem&);
};

// Returns the kernels called `name`, or for "auto" the fastest that this CPU
// supports; nulls if it does not support them.
inline Kernels kernels(const std::string& name) {
  switch (isa::chosen(name)) {
#if defined(__x86_64__)
    case isa::Isa::kAvx512:
      return {avx512::forward, avx512::backward, avx512::forward_tasks,
              avx512::backward_tasks};
    case isa::Isa::kAvx2:
      return {avx2::forward, avx2::backward, avx2::forward_tasks,
              avx2::backward_tasks};
#endif
    case isa::Isa::kPortable:
      return {portable::forward, portable::backward, portable::forward_tasks,
              portable::backward_tasks};
    default: return {};
  }
}

}  // namespace attention

#ifndef ATTENTION_WITHOUT_FFI
#include "xla/ffi/api/ffi.h"

namespace attention {
namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

// An error message, or null.
using Complaint = const char*;

template <class Buffer>
bool is(const Buffer& x, std::initializer_list<int64_t> shape) {
  const auto found = x.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

// Gets the data of an array whose first axis may be 1, and which may be empty.
template <class Buffer, class Number>
bool rows(const Buffer& x, int64_t B, std::initializer_list<int64_t> rest,
          const Number** at, bool* of_rows) {
  if (!x.element_count()) return true;
  const auto found = x.dimensions();
  if (!found.size() || (found[0] != 1 && found[0] != B)) return false;
  if (!std::equal(found.begin() + 1, found.end(), rest.begin(), rest.end())) {
    return false;
  }
  *at = x.typed_data(), *of_rows = found[0] > 1;
  return true;
}

// Fills in what both passes share; reads only shapes.
inline Complaint fill(Problem* p, const Floats& q, const Floats& k,
                      const Floats& v, const Integers& bounds,
                      const Integers& coordinates, const Integers& q_segments,
                      const Integers& k_segments, float scale) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions();
  if (qs.size() != 4 || ks.size() != 4 || vs.size() != 4) {
    return "q, k, v: not of four axes";
  }
  p->B = qs[0], p->T = qs[1], p->N = qs[2], p->H = qs[3];
  p->S = ks[1], p->K = ks[2], p->V = vs[3];
  if (!is(k, {p->B, p->S, p->K, p->H}) || !is(v, {p->B, p->S, p->K, p->V}) ||
      p->K < 1 || p->N % p->K) {
    return "k, v: other shapes than q's";
  }
  const auto bs = bounds.dimensions();
  p->intervals = bs.size() == 4 ? bs[1] : 0;
  if (p->intervals < 1 || p->intervals > kMostIntervals ||
      !rows(bounds, p->B, {p->intervals, 2, p->T}, &p->bounds,
            &p->bounds_of_rows)) {
    return "bounds: not [B or 1, 1 to 8, 2, T]";
  }
  if (!rows(coordinates, p->B, {p->S}, &p->coordinates,
            &p->coordinates_of_rows)) {
    return "coordinates: not [B or 1, S]";
  }
  if (!rows(q_segments, p->B, {p->T}, &p->q_segments, &p->q_segments_of_rows) ||
      !rows(k_segments, p->B, {p->S}, &p->k_segments, &p->k_segments_of_rows) ||
      !p->q_segments != !p->k_segments) {
    return "segments: not [B or 1, T] and [B or 1, S]";
  }
  p->q = q.typed_data(), p->k = k.typed_data(), p->v = v.typed_data();
  p->scale = scale;
  return nullptr;
}

inline ffi::Error bad(Complaint what) {
  return ffi::Error::InvalidArgument(std::string("attention: ").append(what));
}

inline void run(const Problem& p, Kernel kernel, int64_t count,
                ffi::ThreadPool pool) {
  tasks::share(count, most(pool.num_threads(), 1),
               [p, kernel](int64_t i) { kernel(p, i); },
               [&](auto task) { pool.Schedule(std::move(task)); });
}

inline ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v,
                          Integers bounds, Integers coordinates,
                          Integers q_segments, Integers k_segments,
                          Floats sinks, ffi::Result<Floats> o,
                          ffi::Result<Floats> lse, float scale,
                          std::string_view isa) {
  Problem p{};
  if (Complaint what = fill(&p, q, k, v, bounds, coordinates, q_segments,
                            k_segments, scale)) {
    return bad(what);
  }
  if (!rows(sinks, p.B, {p.N}, &p.sinks, &p.sinks_of_rows)) {
    return bad("sinks: not [B or 1, N]");
  }
  if (!is(*o, {p.B, p.T, p.N, p.V})) return bad("o: not [B, T, N, V]");
  if (!is(*lse, {p.B, p.N, p.T})) return bad("lse: not [B, N, T]");
  p.o = o->typed_data(), p.lse = lse->typed_data();
  const Kernels chosen = kernels(std::string(isa));
  if (!chosen.forward) return bad("isa: this CPU has none of that name");
  run(p, chosen.forward, chosen.forward_tasks(p), pool);
  return ffi::Error::Success();
}

inline ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v,
                           Integers bounds, Integers coordinates,
                           Integers q_segments, Integers k_segments,
                           Floats d_o, Floats lse, Floats shift,
                           ffi::Result<Floats> dq, ffi::Result<Floats> dk,
                           ffi::Result<Floats> dv, float scale,
                           std::string_view isa) {
  Problem p{};
  if (Complaint what = fill(&p, q, k, v, bounds, coordinates, q_segments,
                            k_segments, scale)) {
    return bad(what);
  }
  if (!is(d_o, {p.B, p.T, p.N, p.V})) return bad("do: not [B, T, N, V]");
  if (!is(lse, {p.B, p.N, p.T})) return bad("lse: not [B, N, T]");
  if (!is(shift, {p.B, p.N, p.T})) return bad("shift: not [B, N, T]");
  const auto dims = dq->dimensions();
  p.chunks = dims.size() ? dims[0] : 0;
  if (p.chunks < 1 || !is(*dq, {p.chunks, p.B, p.T, p.N, p.H})) {
    return bad("dq: not [chunks, B, T, N, H]");
  }
  // Every chunk must have keys.
  if ((p.chunks - 1) * p.chunk() >= p.S) return bad("dq: too many chunks");
  if (!is(*dk, {p.B, p.S, p.K, p.H})) return bad("dk: another shape than k");
  if (!is(*dv, {p.B, p.S, p.K, p.V})) return bad("dv: another shape than v");
  p.d_o = d_o.typed_data(), p.found_lse = lse.typed_data();
  p.shift = shift.typed_data();
  p.dq = dq->typed_data(), p.dk = dk->typed_data(), p.dv = dv->typed_data();
  const Kernels chosen = kernels(std::string(isa));
  if (!chosen.backward) return bad("isa: this CPU has none of that name");
  run(p, chosen.backward, chosen.backward_tasks(p), pool);
  return ffi::Error::Success();
}

// The common arguments of both passes: q, k, v, the mask, and one more array.
inline auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Floats>();
}

}  // namespace attention

XLA_FFI_DEFINE_HANDLER_SYMBOL(HeptadAttention, attention::forward,
                              attention::binding()
                                  .Ret<attention::Floats>()
                                  .Ret<attention::Floats>()
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(HeptadAttentionGradients, attention::backward,
                              attention::binding()
                                  .Arg<attention::Floats>()
                                  .Arg<attention::Floats>()
                                  .Ret<attention::Floats>()
                                  .Ret<attention::Floats>()
                                  .Ret<attention::Floats>()
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("isa"));
#endif
