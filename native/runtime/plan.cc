// Where the temporaries of a program live: byte offsets into one arena, shared by tensors that never live together.
#include "runtime/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/memory.h"

namespace elastiform {

MemoryPlan planMemory(const std::vector<Lifetime>& lifetimes, int64_t limit) {
  constexpr auto kUnit = static_cast<int64_t>(kAlignment);
  MemoryPlan plan;
  plan.offsets.assign(lifetimes.size(), 0);
  std::vector<int> order(lifetimes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return lifetimes[a].bytes > lifetimes[b].bytes; });

  struct Placed {
    int64_t begin, end;
    int first, last;
  };
  std::vector<Placed> placed;  // by offset
  placed.reserve(lifetimes.size());
  for (const int index : order) {
    const Lifetime& wanted = lifetimes[index];
    const int64_t bytes = (wanted.bytes + kUnit - 1) / kUnit * kUnit;
    int64_t best = -1, bestGap = std::numeric_limits<int64_t>::max(), top = 0;
    for (const Placed& other : placed) {
      if (other.last < wanted.first || other.first > wanted.last) continue;
      const int64_t gap = other.begin - top;
      if (gap >= bytes && gap < bestGap) {
        best = top;
        bestGap = gap;
      }
      top = std::max(top, other.end);
    }
    if (best < 0) best = top;
    if (bytes > limit - best) {
      fail(ErrorCode::InvalidProgram, "[Program] the temporaries need more than %lld bytes",
           static_cast<long long>(limit));
    }
    plan.offsets[index] = best;
    plan.bytes = std::max(plan.bytes, best + bytes);
    const Placed entry{best, best + bytes, wanted.first, wanted.last};
    placed.insert(std::upper_bound(placed.begin(), placed.end(), entry,
                                   [](const Placed& a, const Placed& b) { return a.begin < b.begin; }),
                  entry);
  }
  return plan;
}

}  // namespace elastiform
