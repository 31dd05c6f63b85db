// y = x W on CPU for weights of 4, 8, 16 or 32 bits in panels of 16 outputs.
//
// Decoding a token reads every weight once, so its speed is memory bandwidth.
// XLA would dequantize packed weights to memory first; here they are decoded in
// registers. A panel holds 16 outputs, one per lane of a vector, and a 32-bit
// word of a lane holds 8, 4, 2 or 1 consecutive inputs of that output, the
// first in the lowest bits:
//
//   words  uint32 [panels, inputs * bits / 32, 16]
//   scale, offset  [panels, groups, 16], one per `group` inputs
// // A weight is scale * code + offset. 4-bit codes index a table of 16 floats,
// 8-bit codes are signed, 16 bits are a bfloat16 and 32 a float32, neither of
// which has a scale. Inside a group only the codes are multiplied: the scale is
// applied once per group, and the offset to the sum of the group's x, which is
// computed once.
// // If the CPU has VNNI and codes are integers, x is first converted to fixed
// point: 23 bits relative to the group's largest |x|, as three signed bytes.
// Products of bytes and their sums are exact integers, so this is as accurate
// as float32, and for a single row nearly twice as fast.
//
// If the CPU multiplies pairs of bfloat16 (AVX-512 BF16) and both sides are
// bfloat16, it does, accumulating in float32; subnormal products count as 0.
// // Every output is summed in a fixed order, input by input and group by
// group, by one thread, so results do not depend on the number of threads. (The
// last bits depend on the instruction set, and on whether a batch is small
// enough for fixed point, or large enough for dequantizing weights ahead.)
// // `problem.h` defines the inputs, `lanes.h` the vectors of each instruction
// set, `tile.inc` the product with them, `many.inc` that for many rows,
// `vnni.h` that in fixed point, `bfloat16.h` that of bfloat16 pairs,
// `multiply.h` the threading; this file is the XLA FFI interface. GCC 9 or
// Clang 10.

#include "multiply.h"

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

// Checks the shapes of all buffers before reading them.
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
  if (bits != 4 && bits != 8 && bits != 16 && bits != 32) {
    return bad("bits: not 4, 8, 16 or 32");
  }
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
  p.x_type = in.type;
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
