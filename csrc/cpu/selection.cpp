#include "selection.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "groups.h"
#include "parallel.h"

namespace rewardops::cpu {
namespace {

// An integer key in the order of the numbers: NaN is the largest; 0 and -0 are equal.
inline uint32_t sort_key(float x) {
  x += 0.0f;
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  if (x != x) return ~uint32_t{0};
  return u >> 31 ? ~u : u | 0x80000000u;
}
inline uint64_t sort_key(double x) {
  x += 0.0;
  uint64_t u;
  std::memcpy(&u, &x, sizeof(u));
  if (x != x) return ~uint64_t{0};
  return u >> 63 ? ~u : u | 0x8000000000000000u;
}

constexpr int kDigit = 11;
constexpr int64_t kBins = int64_t{1} << kDigit;
constexpr int64_t kPiece = 1 << 15;

// Tokens [begin, end) of one row.
struct Piece {
  int64_t row, begin, end;
};

// A radix select over the pieces of one scope: a histogram of the first digit of all keys, then of each further digit
// of the keys that match the digits selected so far, then one pass that writes. Each share of the pieces has its own
// counts.
template <typename T>
class Scope {
  using Key = decltype(sort_key(T{}));
  static constexpr int kBits = 8 * sizeof(Key);

 public:
  Scope(const LargestArgs<T>& a, const int64_t* rows, int64_t count, int threads) : a_(a), threads_(threads) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = a.rows.size(rows[k]);
      for (int64_t t = 0; t < n; t += kPiece) pieces_.push_back({rows[k], t, std::min(n, t + kPiece)});
    }
    shares_ = std::min<int64_t>(threads, static_cast<int64_t>(pieces_.size()));
    counts_.resize(shares_ * kBins);
    keys_.resize(shares_);
  }

  void run(int64_t wanted) {
    if (wanted <= 0) return write_nothing();
    int shift = kBits - kDigit;
    count_first(shift);
    Key least = take(kDigit, &wanted);
    collect(shift, least);
    while (shift > 0) {
      const int digit = std::min(kDigit, shift);
      shift -= digit;
      count_next(shift, digit);
      const Key bin = take(digit, &wanted);
      for (auto& keys : keys_)
        keys.erase(std::remove_if(keys.begin(), keys.end(),
                                  [&](Key key) { return (key >> shift & ((Key{1} << digit) - 1)) != bin; }),
                   keys.end());
      least = least << digit | bin;
    }
    write(least, wanted);
  }

 private:
  template <typename F>
  void each_share(F f) const {
    parallel_for(shares_, 1, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) f(s);
    });
  }
  // f(values, mask or null, output, tokens) for every piece of a share.
  template <typename F>
  void each_piece(int64_t share, F f) const {
    const int64_t n = static_cast<int64_t>(pieces_.size());
    for (int64_t p = n * share / shares_; p < n * (share + 1) / shares_; ++p) {
      const Piece& piece = pieces_[p];
      const uint8_t* mask = a_.mask.row(a_.rows, piece.row);
      f(a_.values.row(a_.rows, piece.row) + piece.begin, mask ? mask + piece.begin : nullptr,
        a_.out.row(a_.rows, piece.row) + piece.begin, piece.end - piece.begin);
    }
  }

  // No branches, which would be mispredicted: masked tokens are counted in a separate bin, which is dropped.
  void count_first(int shift) {
    each_share([&](int64_t share) {
      std::vector<int64_t> counts(kBins + 1, 0);
      each_piece(share, [&](const T* x, const uint8_t* mask, uint8_t*, int64_t n) {
        for (int64_t t = 0; t < n; ++t) ++counts[!mask || mask[t] ? sort_key(x[t]) >> shift : Key{kBins}];
      });
      std::copy(counts.begin(), counts.end() - 1, counts_.begin() + share * kBins);
    });
  }

  void collect(int shift, Key bin) {
    each_share([&](int64_t share) {
      std::vector<Key>& keys = keys_[share];
      keys.resize(counts_[share * kBins + static_cast<int64_t>(bin)] + 1);
      Key* at = keys.data();
      each_piece(share, [&](const T* x, const uint8_t* mask, uint8_t*, int64_t n) {
        for (int64_t t = 0; t < n; ++t) {
          const Key key = sort_key(x[t]);
          *at = key;
          at += (!mask || mask[t]) && key >> shift == bin;
        }
      });
      keys.pop_back();
    });
  }

  void count_next(int shift, int digit) {
    each_share([&](int64_t share) {
      int64_t* counts = counts_.data() + share * kBins;
      std::fill(counts, counts + kBins, 0);
      for (const Key key : keys_[share]) ++counts[key >> shift & ((Key{1} << digit) - 1)];
    });
  }

  // The largest digit such that enough keys have it or a larger one; `wanted` becomes the number of keys to select
  // among those that have it.
  Key take(int digit, int64_t* wanted) const {
    for (int64_t bin = (int64_t{1} << digit) - 1;; --bin) {
      int64_t count = 0;
      for (int64_t s = 0; s < shares_; ++s) count += counts_[s * kBins + bin];
      if (count >= *wanted || bin == 0) return static_cast<Key>(bin);
      *wanted -= count;
    }
  }

  // The remaining keys are equal to the least: the earliest `wanted` of them are selected.
  void write(Key least, int64_t wanted) const {
    std::vector<int64_t> before(shares_ + 1, 0);
    for (int64_t s = 0; s < shares_; ++s) before[s + 1] = before[s] + static_cast<int64_t>(keys_[s].size());
    each_share([&](int64_t share) {
      int64_t room = wanted - before[share];
      if (before[share + 1] <= wanted || room <= 0) {  // all of them, or none
        const Key from = room <= 0 ? least + 1 : least;
        const bool any = room > 0 || from != 0;
        each_piece(share, [&](const T* x, const uint8_t* mask, uint8_t* out, int64_t n) {
          for (int64_t t = 0; t < n; ++t) out[t] = (!mask || mask[t]) & any & (sort_key(x[t]) >= from);
        });
        return;
      }
      each_piece(share, [&](const T* x, const uint8_t* mask, uint8_t* out, int64_t n) {
        for (int64_t t = 0; t < n; ++t) {
          const Key key = sort_key(x[t]);
          const bool valid = !mask || mask[t];
          out[t] = valid && (key > least || (key == least && room > 0));
          room -= valid && key == least;
        }
      });
    });
  }

  void write_nothing() const {
    for (int64_t s = 0; s < shares_; ++s)
      each_piece(s, [](const T*, const uint8_t*, uint8_t* out, int64_t n) { std::memset(out, 0, n); });
  }

  const LargestArgs<T>& a_;
  const int threads_;
  int64_t shares_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> counts_;         // [shares, kBins]
  std::vector<std::vector<Key>> keys_;  // per share, the keys that match the digits selected so far
};

}  // namespace

template <typename T>
void largest(const LargestArgs<T>& a, int threads) {
  const GroupIndex index(a.scopes, a.rows.batch);
  const Groups scopes = index.view();
  const auto run = [&](int64_t s, int team) {
    const int64_t* rows = scopes.members + scopes.offsets[s];
    Scope<T>(a, rows, index.size(s), team).run(a.wanted[a.scopes[rows[0]]]);
  };
  if (scopes.count >= 2 * threads)
    parallel_for(scopes.count, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) run(s, 1);
    });
  else
    for (int64_t s = 0; s < scopes.count; ++s) run(s, threads);
}

template void largest<float>(const LargestArgs<float>&, int);
template void largest<double>(const LargestArgs<double>&, int);

}  // namespace rewardops::cpu
