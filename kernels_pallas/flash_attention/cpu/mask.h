// Classes of tiles: no pair visible, some pairs, or all pairs.

#ifndef ATTENTION_MASK_H_
#define ATTENTION_MASK_H_

#include "problem.h"

namespace attention {

enum class Class { kEmpty, kPartial, kFull };

// The mask arrays of one batch row.
struct Seen {
  const int32_t* bounds;
  const int32_t* coordinates;
  const int32_t* q_segments;
  const int32_t* k_segments;

  Seen(const Problem& p, int64_t b)
      : bounds(p.bounds + (p.bounds_of_rows ? b * p.intervals * 2 * p.T : 0)),
        coordinates(p.coordinates),
        q_segments(p.q_segments),
        k_segments(p.k_segments) {
    if (coordinates && p.coordinates_of_rows) coordinates += b * p.S;
    if (q_segments && p.q_segments_of_rows) q_segments += b * p.T;
    if (k_segments && p.k_segments_of_rows) k_segments += b * p.S;
  }

  int32_t coordinate(int64_t s) const {
    return coordinates ? coordinates[s] : int32_t(s);
  }
  // Padding may contain anything, even NaN.
  bool is_padding(int64_t s) const {
    return (coordinates && coordinates[s] < 0) ||
           (k_segments && k_segments[s] < 0);
  }
};

// The extreme coordinates and segments of a range of keys.
struct Keys {
  int32_t first, last;  // coordinates, without padding
  int32_t least_segment, most_segment;
  bool padded;

  Keys(const Seen& seen, int64_t begin, int64_t end)
      : first(std::numeric_limits<int32_t>::max()), last(-1),
        least_segment(first), most_segment(-1), padded(false) {
    if (!seen.coordinates && !seen.k_segments) {
      first = int32_t(begin), last = int32_t(end - 1);
      return;
    }
    for (int64_t s = begin; s < end; ++s) {
      if (seen.is_padding(s)) {
        padded = true;
        continue;
      }
      const int32_t c = seen.coordinate(s);
      first = c < first ? c : first, last = c > last ? c : last;
      if (!seen.k_segments) continue;
      const int32_t g = seen.k_segments[s];
      least_segment = g < least_segment ? g : least_segment;
      most_segment = g > most_segment ? g : most_segment;
    }
  }
};

// The extreme interval bounds and segments of a range of queries.
struct Queries {
  struct Interval {
    int32_t first, last_lo, least_hi, end;  // over all lo, over all hi
  };
  Interval intervals[kMostIntervals];
  int32_t least_segment, most_segment;
  int64_t count;

  Queries(const Problem& p, const Seen& seen, int64_t begin, int64_t end)
      : least_segment(std::numeric_limits<int32_t>::max()), most_segment(-1),
        count(p.intervals) {
    for (int64_t n = 0; n < count; ++n) {
      const int32_t* lo = seen.bounds + 2 * n * p.T;
      const int32_t* hi = lo + p.T;
      Interval i = {std::numeric_limits<int32_t>::max(), 0,
                    std::numeric_limits<int32_t>::max(), 0};
      for (int64_t t = begin; t < end; ++t) {
        i.last_lo = lo[t] > i.last_lo ? lo[t] : i.last_lo;
        i.least_hi = hi[t] < i.least_hi ? hi[t] : i.least_hi;
        if (hi[t] <= lo[t]) continue;
        i.first = lo[t] < i.first ? lo[t] : i.first;
        i.end = hi[t] > i.end ? hi[t] : i.end;
      }
      intervals[n] = i;
    }
    if (!seen.q_segments) return;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t g = seen.q_segments[t];
      least_segment = g < least_segment ? g : least_segment;
      most_segment = g > most_segment ? g : most_segment;
    }
  }

  // Exact for one interval of indices; otherwise kPartial may be any class.
  Class of(const Keys& keys, bool segments) const {
    bool some = false, all = !keys.padded && all_see(keys.first, keys.last);
    for (int64_t n = 0; n < count; ++n) {
      some |= keys.last >= intervals[n].first && keys.first < intervals[n].end;
    }
    if (segments) {
      some &= least_segment <= keys.most_segment &&
              keys.least_segment <= most_segment;
      all &= least_segment == most_segment && least_segment >= 0 &&
             keys.least_segment == keys.most_segment &&
             keys.least_segment == least_segment;
    }
    return !some ? Class::kEmpty : all ? Class::kFull : Class::kPartial;
  }

  // Whether every query is known to see all keys of its segment with
  // coordinates from `first` to `last`.
  bool all_see(int32_t first, int32_t last) const {
    bool all = false;
    for (int64_t n = 0; n < count; ++n) {
      all |= first >= intervals[n].last_lo && last < intervals[n].least_hi;
    }
    return all;
  }

  // Narrows [begin, end) to keys that some query may see, if keys are indices.
  void narrow(int64_t* begin, int64_t* end) const {
    int64_t first = *end, last = *begin;
    for (int64_t n = 0; n < count; ++n) {
      first = least(first, intervals[n].first);
      last = most(last, intervals[n].end);
    }
    *begin = most(*begin, first), *end = most(*begin, least(*end, last));
  }
};

}  // namespace attention

#endif  // ATTENTION_MASK_H_
