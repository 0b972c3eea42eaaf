#include "groups.h"

#include <unordered_map>

namespace rewardops::cpu {

GroupIndex::GroupIndex(const int64_t* labels, int64_t batch) : members(batch), offsets(1, 0), group_of(batch) {
  std::unordered_map<int64_t, int64_t> seen;
  seen.reserve(batch);
  std::vector<int64_t> sizes;
  for (int64_t b = 0; b < batch; ++b) {
    const auto [entry, fresh] = seen.try_emplace(labels[b], static_cast<int64_t>(sizes.size()));
    if (fresh) sizes.push_back(0);
    group_of[b] = entry->second;
    ++sizes[entry->second];
  }
  for (const int64_t size : sizes) offsets.push_back(offsets.back() + size);
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t b = 0; b < batch; ++b) members[next[group_of[b]]++] = b;
}

}  // namespace rewardops::cpu
