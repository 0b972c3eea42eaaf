// Rows by group label.
#pragma once

#include <cstdint>
#include <vector>

#include "rewardops/rows.h"

namespace rewardops::cpu {

// Groups in the order of their first row, members ascending.
struct GroupIndex {
  GroupIndex(const int64_t* labels, int64_t batch);
  Groups view() const { return {static_cast<int64_t>(offsets.size()) - 1, members.data(), offsets.data()}; }
  int64_t size(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  std::vector<int64_t> members, offsets;
  std::vector<int64_t> group_of;  // per row
};

}  // namespace rewardops::cpu
