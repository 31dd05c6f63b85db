// Runs every kernel of attention.cc on random problems under the sanitizers:
// each buffer is a heap block of its exact size, each helper a thread that
// starts late.
//
// Fails unless results equal those of double precision, bitwise the same with
// 1, 2 and 5 threads, and tile classes equal those by counting pairs. Prints
// the number of problems checked.

#define ATTENTION_WITHOUT_FFI
#include "attention.cc"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace attention;

namespace {

std::mt19937 random_bits(0);

int64_t below(int64_t n) { return int64_t(random_bits() % uint32_t(n)); }

std::vector<float> normals(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(random_bits);
  return out;
}

struct Results {
  std::vector<float> o, lse, dq, dk, dv;
  bool operator==(const Results& r) const {
    return o == r.o && lse == r.lse && dq == r.dq && dk == r.dk && dv == r.dv;
  }
};

void run(const Problem& p, Kernel kernel, int64_t count, int threads) {
  std::vector<std::thread> started;
  tasks::share(count, threads, [p, kernel](int64_t i) { kernel(p, i); },
               [&](auto task) {
                 const auto late = std::chrono::microseconds(below(300));
                 started.emplace_back([=] {
                   std::this_thread::sleep_for(late);
                   task();
                 });
               });
  for (auto& thread : started) thread.join();
}

// The other inputs of a backward pass follow from the forward pass.
Results results(Problem p, const Kernels& kernels, int threads) {
  Results r;
  r.o.resize(p.B * p.T * p.N * p.V), r.lse.resize(p.B * p.N * p.T);
  p.o = r.o.data(), p.lse = r.lse.data();
  run(p, kernels.forward, kernels.forward_tasks(p), threads);
  std::vector<float> lse = r.lse, shift(lse.size());
  for (int64_t i = 0; i < int64_t(lse.size()); ++i) {
    const int64_t b = i / (p.N * p.T), n = i / p.T % p.N, t = i % p.T;
    const int64_t at = ((b * p.T + t) * p.N + n) * p.V;
    for (int64_t h = 0; h < p.V; ++h) shift[i] += p.d_o[at + h] * r.o[at + h];
    if (lse[i] == -kInfinity) lse[i] = kInfinity;
  }
  r.dq.resize(p.chunks * p.B * p.T * p.N * p.H);
  r.dk.resize(p.B * p.S * p.K * p.H), r.dv.resize(p.B * p.S * p.K * p.V);
  p.found_lse = lse.data(), p.shift = shift.data();
  p.dq = r.dq.data(), p.dk = r.dk.data(), p.dv = r.dv.data();
  run(p, kernels.backward, kernels.backward_tasks(p), threads);
  return r;
}

bool sees(const Problem& p, int64_t b, int64_t t, int64_t s) {
  const Seen seen(p, b);
  bool some = false;
  for (int64_t n = 0; n < p.intervals; ++n) {
    const int32_t c = seen.coordinate(s);
    some |= c >= seen.bounds[2 * n * p.T + t] &&
            c < seen.bounds[(2 * n + 1) * p.T + t];
  }
  if (seen.q_segments) {
    some &= seen.q_segments[t] >= 0 && seen.q_segments[t] == seen.k_segments[s];
  }
  return some;
}

bool close(const char* what, double got, double want, double size) {
  if (std::fabs(got - want) <= 3e-6 * size) return true;
  std::printf("%s: %g, expected %g\n", what, got, want);
  return false;
}

// One query head of one row, in double precision, a query at a time.
struct Head {
  const Problem& p;
  int64_t b, n, k;
  std::vector<double> dk, dv;

  Head(const Problem& p, int64_t b, int64_t n)
      : p(p), b(b), n(n), k(n / p.group()), dk(p.S * p.H), dv(p.S * p.V) {}

  int64_t query(int64_t t) const { return (b * p.T + t) * p.N + n; }
  int64_t key(int64_t s) const { return (b * p.S + s) * p.K + k; }

  // The probabilities of all keys, and the log-sum-exp.
  std::vector<double> probabilities(int64_t t, double* lse) const {
    std::vector<double> w(p.S, -INFINITY);
    double most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < p.S; ++s) {
      if (!sees(p, b, t, s)) continue;
      w[s] = 0;
      for (int64_t h = 0; h < p.H; ++h) {
        w[s] += double(p.q[query(t) * p.H + h]) * p.k[key(s) * p.H + h];
      }
      w[s] *= p.scale, most = std::max(most, w[s]);
    }
    double sink = -INFINITY;
    if (p.sinks) sink = p.sinks[p.sinks_of_rows ? b * p.N + n : n];
    most = std::max(most, sink);
    const bool some = most > -INFINITY;
    for (double& x : w) sum += x = some ? std::exp(x - most) : 0;
    if (some) sum += std::exp(sink - most);
    for (double& x : w) x = some ? x / sum : 0;
    *lse = some ? most + std::log(sum) : -INFINITY;
    return w;
  }

  // Returns whether a query's results are correct; adds to the keys' gradients.
  bool right(const Results& r, int64_t t) {
    double lse, shift = 0;
    const std::vector<double> w = probabilities(t, &lse);
    const float got = r.lse[(b * p.N + n) * p.T + t];
    if (!(got == lse) && !close("lse", got, lse, 10 + std::fabs(lse))) {
      return false;
    }
    const float* d_o = p.d_o + query(t) * p.V;
    for (int64_t h = 0; h < p.V; ++h) {
      double o = 0;
      for (int64_t s = 0; s < p.S; ++s) o += w[s] * p.v[key(s) * p.V + h];
      if (!close("o", r.o[query(t) * p.V + h], o, 4 * size())) return false;
      shift += o * d_o[h];
    }
    std::vector<double> dq(p.H);
    for (int64_t s = 0; s < p.S; ++s) {
      double dp = 0;
      for (int64_t h = 0; h < p.V; ++h) {
        dp += double(d_o[h]) * p.v[key(s) * p.V + h];
        dv[s * p.V + h] += w[s] * d_o[h];
      }
      const double ds = w[s] * (dp - shift) * p.scale;
      for (int64_t h = 0; h < p.H; ++h) {
        dq[h] += ds * p.k[key(s) * p.H + h];
        dk[s * p.H + h] += ds * p.q[query(t) * p.H + h];
      }
    }
    for (int64_t h = 0; h < p.H; ++h) {
      double sum = 0;
      for (int64_t c = 0; c < p.chunks; ++c) {
        sum += r.dq[(c * p.B * p.T * p.N + query(t)) * p.H + h];
      }
      if (!close("dq", sum, dq[h], 40 * size() * size())) return false;
    }
    return true;
  }

  // Returns whether the keys' gradients are, if they have only one query head.
  bool keys_right(const Results& r) const {
    if (p.group() > 1) return true;  // sums over heads are tested in Python
    for (int64_t s = 0; s < p.S; ++s) {
      const float *k = &r.dk[key(s) * p.H], *v = &r.dv[key(s) * p.V];
      const double size = 80 * this->size() * this->size();
      for (int64_t h = 0; h < p.H; ++h) {
        if (!close("dk", k[h], dk[s * p.H + h], size)) return false;
      }
      for (int64_t h = 0; h < p.V; ++h) {
        if (!close("dv", v[h], dv[s * p.V + h], size)) return false;
      }
    }
    return true;
  }

  // Large logits have larger errors, and so have results computed from them.
  double size() const { return p.scale > 1 ? 20 : 1; }
};

bool right(const Problem& p, const Results& r, int64_t b, int64_t n) {
  Head head(p, b, n);
  for (int64_t t = 0; t < p.T; ++t) {
    if (!head.right(r, t)) return false;
  }
  return head.keys_right(r);
}

// Tiles with a pair are not empty, and tiles that lack one are not full; for
// masks by index with one interval, no tile without a pair is visited.
bool classified(const Problem& p, int64_t b, int64_t bq, int64_t bk) {
  const Seen seen(p, b);
  for (int64_t t = 0; t < p.T; t += bq) {
    const int64_t rows = least(bq, p.T - t);
    const Queries queries(p, seen, t, t + rows);
    for (int64_t s = 0; s < p.S; s += bk) {
      const int64_t keys = least(bk, p.S - s);
      int64_t pairs = 0;
      for (int64_t i = 0; i < rows * keys; ++i) {
        pairs += sees(p, b, t + i / keys, s + i % keys);
      }
      const Class kind =
          queries.of(Keys(seen, s, s + keys), seen.q_segments != nullptr);
      const bool exact = p.intervals == 1 && !seen.coordinates &&
                         !seen.q_segments;
      if ((kind == Class::kEmpty && pairs) ||
          (kind == Class::kFull && pairs < rows * keys) ||
          (exact && kind != Class::kEmpty && !pairs)) {
        std::printf("a tile of %d pairs is of class %d\n", int(pairs),
                    int(kind));
        return false;
      }
    }
  }
  return true;
}

// A random problem, and the arrays it points to.
struct Drawn {
  Problem p{};
  std::vector<float> q, k, v, d_o, sinks;
  std::vector<int32_t> bounds, coordinates, ours, theirs;

  Drawn() {
    p.B = 1 + below(2), p.T = 1 + below(90), p.S = 1 + below(300);
    p.K = 1 + below(2), p.N = p.K * (1 + below(3));
    p.H = 1 + below(40), p.V = 1 + below(40);
    // Sometimes whole rows of logits are below -88.
    p.scale = (below(6) ? 1 : 60) / std::sqrt(float(p.H));
    const int64_t most = 1 + below(3), each = (p.S + most - 1) / most;
    p.chunks = (p.S + each - 1) / each;
    q = normals(p.B * p.T * p.N * p.H), k = normals(p.B * p.S * p.K * p.H);
    v = normals(p.B * p.S * p.K * p.V), d_o = normals(p.B * p.T * p.N * p.V);
    if (p.scale > 1) {
      for (float& x : q) x = std::fabs(x);
      for (float& x : k) x = -std::fabs(x);
    }
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.d_o = d_o.data();
    p.sinks_of_rows = below(2);
    sinks = normals((p.sinks_of_rows ? p.B : 1) * p.N);
    if (below(2)) p.sinks = sinks.data();
    if (!below(3)) sinks[below(int64_t(sinks.size()))] = -INFINITY;
    draw_bounds();
    draw_keys();
  }

  int64_t rows(bool of_rows) const { return of_rows ? p.B : 1; }

  // Windows that move with the queries, as in masks; some are empty. Or
  // everything is visible: few tiles would be full otherwise.
  void draw_bounds() {
    const bool full = !below(3);
    p.intervals = full ? 1 : 1 + below(2), p.bounds_of_rows = below(2);
    bounds.resize(rows(p.bounds_of_rows) * p.intervals * 2 * p.T);
    const int64_t width = 1 + below(p.S);
    for (int64_t i = 0; i < int64_t(bounds.size()); i += 2 * p.T) {
      const int64_t n = i / p.T / 2 % p.intervals, from = n * p.S / 2;
      const int64_t to = (n + 1) * p.S / p.intervals;
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t lo = from + t * (to - from) / p.T / 2;
        bounds[i + t] = full ? 0 : int32_t(least(lo, to));
        const int64_t hi = below(20) ? least(lo + width, to) : 0;
        bounds[i + p.T + t] = int32_t(full ? p.S : hi);
      }
    }
    p.bounds = bounds.data();
  }

  // Coordinates or indices, segments or none.
  void draw_keys() {
    p.coordinates_of_rows = below(2);
    coordinates.resize(rows(p.coordinates_of_rows) * p.S);
    for (auto& c : coordinates) c = below(9) ? int32_t(below(p.S)) : -1;
    if (below(2)) p.coordinates = coordinates.data();
    p.q_segments_of_rows = below(2), p.k_segments_of_rows = below(2);
    ours.resize(rows(p.q_segments_of_rows) * p.T);
    theirs.resize(rows(p.k_segments_of_rows) * p.S);
    const int64_t segments = 1 + below(3);
    for (int64_t i = 0; i < int64_t(ours.size()); ++i) {
      ours[i] = int32_t(i % p.T * segments / p.T) - (below(9) ? 0 : 1);
    }
    for (int64_t i = 0; i < int64_t(theirs.size()); ++i) {
      theirs[i] = below(9) ? int32_t(i % p.S * segments / p.S) : -2;
    }
    if (below(2)) p.q_segments = ours.data(), p.k_segments = theirs.data();
  }
};

bool one() {
  const Drawn drawn;
  const Problem& p = drawn.p;
  for (int64_t b = 0; b < p.B; ++b) {
    if (!classified(p, b, 1 + below(40), 1 + below(60))) return false;
  }
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const Kernels chosen = kernels(name);
    if (!chosen.forward) continue;
    const Results r = results(p, chosen, 1);
    for (int threads : {2, 5}) {
      if (results(p, chosen, threads) == r) continue;
      std::printf("%s: %d threads give another result\n", name, threads);
      return false;
    }
    if (!right(p, r, below(p.B), below(p.N))) {
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
  std::printf("%d problems\n", count);
  return 0;
}
