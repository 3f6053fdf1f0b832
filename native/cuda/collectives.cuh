// Sums, maxima and scans over warps and blocks, of 64-bit values too, in an order fixed by the number of threads.
#pragma once

#include "device/device.h"

namespace elastiform::ELASTIFORM_DEVICE {

// Shuffles move 32 bits: longer values go as two halves.
template <typename T, typename Move>
DEVICE T movedByHalves(T value, const Move& move) {
  static_assert(sizeof(T) == 8);
  union {
    T whole;
    uint32_t halves[2];
  } u;
  u.whole = value;
  u.halves[0] = move(u.halves[0]);
  u.halves[1] = move(u.halves[1]);
  return u.whole;
}

// The value of another lane; every lane of the warp calls.
template <typename T>
DEVICE T fromLane(T value, int lane) {
  if constexpr (sizeof(T) == 4) {
    return shflIdx(value, lane);
  } else {
    return movedByHalves(value, [=](uint32_t half) { return shflIdx(half, lane); });
  }
}

// The sum over the warp, the same bits in every lane.
template <typename T>
DEVICE T warpTotal(T value) {
  UNROLL
  for (int lanes = 16; lanes > 0; lanes >>= 1) value += fromLane(value, laneId() ^ lanes);
  return value;
}

DEVICE uint32_t warpMax(uint32_t value) {
  UNROLL
  for (int lanes = 16; lanes > 0; lanes >>= 1) value = max(value, shflXor(value, lanes));
  return value;
}

// The sum over this lane and the lanes before it.
template <typename T>
DEVICE T warpScan(T value) {
  const int lane = laneId();
  UNROLL
  for (int lanes = 1; lanes < 32; lanes <<= 1) {
    const T before = fromLane(value, lane >= lanes ? lane - lanes : lane);
    if (lane >= lanes) value += before;
  }
  return value;
}

// The sum over the block, the same bits in every thread. `partial` is shared memory, an element for each warp.
template <typename T>
DEVICE T blockTotal(T value, T* partial) {
  value = warpTotal(value);
  syncThreads();  // the previous total has been read
  if (laneId() == 0) partial[warpId()] = value;
  syncThreads();  // partial is complete
  return warpTotal(laneId() < static_cast<int>(blockDim.x / 32) ? partial[laneId()] : T{});
}

}  // namespace elastiform::ELASTIFORM_DEVICE
