// Runs every kernel of decode.cc on random decoding steps under the sanitizers:
// each buffer is a heap block of its exact size, each helper a thread that
// starts late.
//
// Fails unless results equal those of double precision, bitwise the same with
// 1, 2 and 5 threads and with more unused slots, and unless a large step uses
// all available threads. Prints the number of steps checked.

#define DECODING_WITHOUT_FFI
#include "decode.cc"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace decoding;

namespace {

std::mt19937 random_bits(0);

int64_t below(int64_t n) { return int64_t(random_bits() % uint32_t(n)); }

// Normal numbers, in the problem's dtype.
struct Stored {
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Stored(int64_t n, bool halves, float size = 1) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      float x = size * normal(random_bits);
      std::memcpy(&bits, &x, sizeof bits);
      if (halves) half.push_back(uint16_t(bits >> 16));
      if (!halves) wide.push_back(x);
    }
  }

  const void* data() const {
    return half.empty() ? static_cast<const void*>(wide.data()) : half.data();
  }

  double at(int64_t i) const {
    if (half.empty()) return wide[i];
    const uint32_t bits = uint32_t(half[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // Rows of `width` with `more` unused slots, which hold NaN.
  Stored roomier(int64_t width, int64_t more) const {
    Stored out(0, false);
    const size_t count = half.empty() ? wide.size() : half.size();
    for (size_t i = 0; i < count; ++i) {
      if (half.empty()) out.wide.push_back(wide[i]);
      if (!half.empty()) out.half.push_back(half[i]);
      if ((i + 1) % width) continue;
      if (half.empty()) out.wide.insert(out.wide.end(), more, NAN);
      if (!half.empty()) out.half.insert(out.half.end(), more, 0x7fff);
    }
    return out;
  }
};

struct Results {
  std::vector<float> o, lse;
  bool operator==(const Results& r) const { return o == r.o && lse == r.lse; }
};

int64_t helpers = 0;  // the most of any step

Results results(Problem p, Kernel kernel, int threads) {
  Results r;
  r.o.resize(p.B * p.N * p.V), r.lse.resize(p.B * p.N);
  p.o = r.o.data(), p.lse = r.lse.data();
  std::vector<std::thread> started;
  decode(p, kernel, threads, [&](auto task) {
    const auto late = std::chrono::microseconds(below(300));
    started.emplace_back([=] {
      std::this_thread::sleep_for(late);
      task();
    });
  });
  for (auto& thread : started) thread.join();
  const Job job(p);
  const int64_t most = 1 + job.keys * p.group() * (p.H + p.V) / kWorthWaking;
  const int64_t others =
      std::min<int64_t>({threads, most, int64_t(job.tasks.size())}) - 1;
  if (int64_t(started.size()) != others) {
    std::printf("%d helpers, expected %d\n", int(started.size()), int(others));
    std::exit(1);
  }
  helpers += others;
  return r;
}

bool close(const char* what, double got, double want, double size) {
  if (got == want || std::fabs(got - want) <= 2e-6 * size) return true;
  std::printf("%s: %g, expected %g\n", what, got, want);
  return false;
}

// Returns whether a head's result is correct.
bool right(const Problem& p, const Stored& q, const Stored& k, const Stored& v,
           const Results& r, int64_t b, int64_t n) {
  const int64_t query = b * p.N + n, row = b * p.K + n / p.group();
  int64_t length = std::min<int64_t>(std::max(p.lengths[b], 0), p.S);
  const int64_t low = p.window ? std::max<int64_t>(length - p.window, 0) : 0;
  std::vector<double> w;
  double most = -INFINITY, sum = 0;
  for (int64_t s = low; s < length; ++s) {
    double x = 0;
    for (int64_t h = 0; h < p.H; ++h) {
      x += q.at(query * p.H + h) * k.at((row * p.S + s) * p.H + h);
    }
    x *= p.scale;
    if (p.softcap) x = p.softcap * std::tanh(x / p.softcap);
    w.push_back(x), most = std::max(most, x);
  }
  for (double& x : w) sum += x = std::exp(x - most);
  const double lse = w.empty() ? -INFINITY : most + std::log(sum);
  // Logits are rounded relative to their size, a soft cap to its own.
  const double size = 1 + std::fabs(lse) + p.softcap;
  if (!close("lse", r.lse[query], lse, size)) return false;
  for (int64_t h = 0; h < p.V; ++h) {
    double o = 0;
    for (size_t j = 0; j < w.size(); ++j) {
      o += w[j] / sum * v.at((row * p.S + low + j) * p.V + h);
    }
    if (!close("o", r.o[query * p.V + h], o, size)) return false;
  }
  return true;
}

bool one() {
  Problem p{};
  p.B = 1 + below(4), p.K = 1 + below(3), p.N = p.K * (1 + below(9));
  p.S = 1 + (below(3) ? below(200) : below(1700));
  p.H = 16 * (1 + below(9)), p.V = 16 * (1 + below(9));
  p.halves = below(2), p.scale = 1 / std::sqrt(float(p.H));
  if (!below(3)) p.softcap = 0.5f + below(30);
  if (!below(3)) p.window = 1 + below(p.S + 9);
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < p.B; ++b) {
    // Sometimes none, fewer, or more than the slots.
    lengths.push_back(below(6) ? 1 + below(p.S) : below(p.S + 18) - 9);
    if (!below(6)) lengths[b] = p.S + below(9);
  }
  p.lengths = lengths.data();
  // Sometimes large logits, which only a soft cap bounds.
  const float large = p.softcap ? 3000 : 40;
  const Stored q(p.B * p.N * p.H, p.halves, below(6) ? 1 : large);
  const Stored k(p.B * p.K * p.S * p.H, p.halves);
  const Stored v(p.B * p.K * p.S * p.V, p.halves);
  p.q = q.data(), p.k = k.data(), p.v = v.data();
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const Kernel chosen = kernel(name);
    if (!chosen) continue;
    const Results r = results(p, chosen, 1);
    bool same = true;
    for (int threads : {2, 5}) same &= results(p, chosen, threads) == r;
    Problem wide = p;
    const int64_t more = 1 + below(40);
    const Stored k_wide = k.roomier(p.S * p.H, more * p.H);
    const Stored v_wide = v.roomier(p.S * p.V, more * p.V);
    std::vector<int32_t> within = lengths;
    for (auto& n : within) {
      n = std::min<int32_t>(n, int32_t(p.S));
    }
    wide.S += more, wide.k = k_wide.data(), wide.v = v_wide.data();
    wide.lengths = within.data();
    same &= results(wide, chosen, 1) == r;
    if (!same) {
      std::printf("%s: threads or room change the result\n", name);
      return false;
    }
    if (!right(p, q, k, v, r, below(p.B), below(p.N))) {
      std::printf("by %s\n", name);
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]);
  for (int i = 0; i < count; ++i) {
    if (!one()) return 1;
  }
  if (!helpers) return 1;
  std::printf("%d steps\n", count);
  return 0;
}
