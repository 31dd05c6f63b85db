// Runs every kernel of panels.cc on random products under the sanitizers: each
// buffer is a heap block of its exact size, each helper a thread that starts
// late.
//
// Fails unless results equal those of a double precision sum, bitwise the same
// with 1, 2 and 5 threads. Prints the number of products checked.

#define PANELS_WITHOUT_FFI
#include "panels.cc"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

using namespace panels;

namespace {

std::mt19937 random_bits(0);

int64_t below(int64_t n) { return int64_t(random_bits() % uint32_t(n)); }

float normal() { return std::normal_distribution<float>()(random_bits); }

// Random numbers of a type, as stored.
struct Stored {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Type type;

  Stored(int64_t n, Type type) : type(type) {
    for (int64_t i = 0; i < n; ++i) {
      if (type == Type::kF32) wide.push_back(normal());
      // Finite float16 of any size, subnormals included; moderate bfloat16.
      if (type == Type::kF16) narrow.push_back(random_bits() & 0x8fff);
      if (type == Type::kBF16) narrow.push_back(to_bfloat16(normal()));
    }
  }
  Numbers view() const {
    if (type == Type::kF32) return {wide.data(), type};
    return {narrow.data(), type};
  }
};

double weight(const Problem& p, int64_t i, int64_t o) {
  const int64_t codes = 32 / p.bits, panel = o / kLanes, lane = o % kLanes;
  const int64_t at = (panel * p.words + i / codes) * kLanes + lane;
  const uint32_t code = p.codes[at] >> (p.bits * (i % codes));
  double value = p.bits == 4    ? p.table[code & 15]
                 : p.bits == 8  ? int8_t(code & 255)
                 : p.bits == 16 ? from_bfloat16(uint16_t(code))
                                : from_bits(code);
  const int64_t which = (panel * p.groups + i / p.group) * kLanes + lane;
  if (p.scale.data) value *= number(p.scale, which);
  if (p.offset.data) value += number(p.offset, which);
  return value;
}

template <class Y>
std::vector<Y> product(Problem p, Kernel run, const Numbers& x, int threads) {
  std::vector<Y> y(p.rows * p.outputs);
  std::vector<std::thread> started;
  p.y = y.data();
  multiply(p, run, x, threads, [&](auto task) {
    const auto late = std::chrono::microseconds(below(300));
    started.emplace_back([=] {
      std::this_thread::sleep_for(late);
      task();
    });
  });
  // Some helpers only start now, after the caller has its result.
  const std::vector<Y> returned = y;
  for (auto& thread : started) thread.join();
  return returned;
}

bool whole_entries = false;  // whether entries are bytes or halves of bytes

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

template <class Y>
bool check(Problem p, const Numbers& x) {
  p.x_type = x.type;
  p.y_type = sizeof(Y) == 4 ? Type::kF32 : Type::kBF16;
  for (const char* name : {"portable", "avx2", "avx512", "bfloat16", "vnni"}) {
    const Kernel run = kernel(name, p);
    if (!run) {
      // Otherwise a kernel that rejects supported problems would pass.
      const bool known = p.bits == 8 || (p.bits == 4 && whole_entries);
      const bool fits = known && p.scale.data && p.rows < 4 && !(p.group % 16);
      if (std::string(name) != "vnni" || !fits || !has_vnni()) continue;
      std::printf("vnni: refuses %d bits\n", p.bits);
      return false;
    }
    const std::vector<Y> y = product<Y>(p, run, x, 1);
    for (int threads : {2, 5}) {
      const std::vector<Y> other = product<Y>(p, run, x, threads);
      if (!std::equal(y.begin(), y.end(), other.begin())) {
        std::printf("%s: %d threads give another result\n", name, threads);
        return false;
      }
    }
    for (int64_t at = 0; at < int64_t(y.size()); at += 1 + below(7)) {
      const int64_t r = at / p.outputs, o = at % p.outputs;
      double want = 0, size = 0;
      for (int64_t i = 0; i < p.inputs; ++i) {
        const double term = number(x, r * p.inputs + i) * weight(p, i, o);
        want += term;
        size += std::fabs(term);
      }
      // Terms of a group may cancel: its largest weight bounds what is lost.
      size += 64 * std::sqrt(double(p.inputs));
      const Numbers got = {y.data(), p.y_type};
      const double bound = p.y_type == Type::kF32 ? 2e-6 : 4e-3;
      if (!(std::fabs(number(got, at) - want) <= bound * size)) {
        std::printf("%s, %d bits: %g, expected %g\n", name, p.bits,
                    double(number(got, at)), want);
        return false;
      }
    }
  }
  return true;
}

bool one() {
  Problem p{};
  p.bits = 4 << below(4);
  const bool floats = p.bits > 8;
  const int64_t codes = 32 / p.bits;
  p.group = floats || below(2) ? codes * (1 + below(9)) : 32;
  p.groups = floats ? 1 : 1 + below(6);
  p.padded = p.group * p.groups;
  p.words = p.padded / codes;
  p.inputs = p.padded - below(codes);
  p.outputs = 1 + below(200);
  p.panels = (p.outputs + kLanes - 1) / kLanes;
  p.rows = below(9) ? below(20) : 120 + below(420);
  // Consecutive codes, bytes, halves of bytes, and arbitrary ones.
  const int entries = below(4);
  whole_entries = entries < 3;
  for (int i = 0; i < kLanes; ++i) {
    const float byte = below(256) - 128.0f;
    const float kinds[] = {i - 8.0f, byte, byte / 2, normal()};
    p.table[i] = kinds[entries];
  }
  std::vector<uint32_t> words(p.panels * p.words * kLanes);
  for (auto& word : words) {
    word = uint32_t(random_bits());
    // Neither huge floats nor NaN.
    if (p.bits == 16) word = (word & 0x807f807f) | 0x3f003f00;
    if (p.bits == 32) word = (word & 0x807fffff) | 0x3f000000;
  }
  p.codes = words.data();
  const Type types[] = {Type::kF32, Type::kF16, Type::kBF16};
  const int64_t scales = p.panels * p.groups * kLanes;
  const Stored scale(scales, types[below(3)]), offset(scales, types[below(3)]);
  if (!floats) p.scale = scale.view();
  if (!floats && below(2)) p.offset = offset.view();
  const Stored x(p.rows * p.inputs, below(2) ? Type::kF32 : Type::kBF16);
  return below(2) ? check<float>(p, x.view()) : check<uint16_t>(p, x.view());
}

}  // namespace

int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]);
  for (int i = 0; i < count; ++i) {
    if (!one()) return 1;
  }
  std::printf("%d products\n", count);
  return 0;
}
