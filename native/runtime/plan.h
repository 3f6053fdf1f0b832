// Where the temporaries of a program live: byte offsets into one arena, shared by tensors that never live together.
#pragma once

#include <cstdint>
#include <vector>

namespace elastiform {

// Memory needed from step `first` to step `last`, both included.
struct Lifetime {
  int64_t bytes;
  int first, last;
};

struct MemoryPlan {
  std::vector<int64_t> offsets;  // multiples of kAlignment, in the order of the lifetimes
  int64_t bytes = 0;             // the whole arena
};

// Greedy by size, best fit: the largest first, each into the smallest gap between those alive at the same time.
// Sizes are rounded up to kAlignment; Error(InvalidProgram) when the arena would pass `limit` bytes.
MemoryPlan planMemory(const std::vector<Lifetime>& lifetimes, int64_t limit);

}  // namespace elastiform
