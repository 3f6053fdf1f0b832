// The operations behind emulated.h: data movement of warps and tensor cores as the PTX ISA (8.x, sections on mma,
// wgmma, mbarrier, cp.async and cp.async.bulk.tensor) lays it out. Sums are in float; the hardware's last bits differ.
#include "device/emulated.h"

#include <cstring>

namespace elastiform::simt {

void* sharedMemory(size_t bytes) {
  const Block& block = *current->block;
  if (bytes > block.sharedBytes) {
    report("the kernel's shared memory has %zu bytes, the launch gave %zu", bytes, block.sharedBytes);
  }
  return block.shared;
}

// ---- Warps

namespace {

struct ShuffleOperand {
  uint32_t value, result;
  int source;
};
struct VoteOperand {
  uint32_t value, result;
};

template <typename Operand>
Operand& operand(void* const* operands, int lane) {
  return *static_cast<Operand*>(operands[lane]);
}

void requireFullWarp(const char* name, uint32_t mask) {
  if (mask != ~0u) report("%s needs all 32 lanes, mask %08x", name, mask);
}

}  // namespace

uint32_t shuffle(const char* name, uint32_t mask, uint32_t value, int source, const Site& site) {
  if ((mask >> source & 1) == 0) report("%s reads lane %d, outside the mask %08x", name, source, mask);
  ShuffleOperand own{value, 0, source};
  meet(
      name, mask,
      [](void* const* operands, uint32_t mask) {
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
          ShuffleOperand& o = operand<ShuffleOperand>(operands, lowestBit(lanes));
          o.result = operand<ShuffleOperand>(operands, o.source).value;
        }
      },
      &own, site);
  return own.result;
}

uint32_t ballot(bool predicate, uint32_t mask, Site site) {
  VoteOperand own{predicate, 0};
  meet(
      "ballot", mask,
      [](void* const* operands, uint32_t mask) {
        uint32_t votes = 0;
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
          votes |= operand<VoteOperand>(operands, lowestBit(lanes)).value << lowestBit(lanes);
        }
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
          operand<VoteOperand>(operands, lowestBit(lanes)).result = votes;
        }
      },
      &own, site);
  return own.result;
}

uint32_t matchAny(uint32_t value, uint32_t mask, Site site) {
  VoteOperand own{value, 0};
  meet(
      "matchAny", mask,
      [](void* const* operands, uint32_t mask) {
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
          VoteOperand& o = operand<VoteOperand>(operands, lowestBit(lanes));
          for (uint32_t others = mask; others; others &= others - 1) {
            if (operand<VoteOperand>(operands, lowestBit(others)).value == o.value) o.result |= others & -others;
          }
        }
      },
      &own, site);
  return own.result;
}

// ---- Matrices of 8x8 16-bit elements

namespace {

struct MatrixOperand {
  uint32_t* registers;
  unsigned char* row;
  int count;
};

// Lane l holds elements 2*(l%4) and +1 of row l/4, of column l/4 when transposed; lanes 8*m to 8*m+7 address the rows
// of matrix m.
template <bool load, bool transposed>
void moveMatricesOp(void* const* operands, uint32_t mask) {
  const char* name = load ? "ldmatrix" : "stmatrix";
  requireFullWarp(name, mask);
  Statistics& statistics = current->block->statistics;
  const int count = operand<MatrixOperand>(operands, 0).count;
  for (int m = 0; m < count; ++m) {
    uint16_t* rows[8];
    uint32_t offsets[8];
    for (int r = 0; r < 8; ++r) {
      unsigned char* row = operand<MatrixOperand>(operands, m * 8 + r).row;
      offsets[r] = checkShared(row, 16, 16, name);
      rows[r] = reinterpret_cast<uint16_t*>(row);
    }
    if (current->block->countsConflicts()) statistics.bankConflicts += bankConflicts(offsets, 8, 16);
    ++statistics.ldmatrix;
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t& pair = operand<MatrixOperand>(operands, lane).registers[m];
      const int major = lane / 4, minor = lane % 4 * 2;
      uint16_t& low = transposed ? rows[minor][major] : rows[major][minor];
      uint16_t& high = transposed ? rows[minor + 1][major] : rows[major][minor + 1];
      if (load) {
        pair = low | static_cast<uint32_t>(high) << 16;
      } else {
        low = static_cast<uint16_t>(pair);
        high = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

}  // namespace

void moveMatrices(const char* name, bool load, bool transposed, int count, uint32_t* registers, const void* row,
                  const Site& site) {
  MatrixOperand own{registers, static_cast<unsigned char*>(const_cast<void*>(row)), count};
  const WarpOp op = load ? (transposed ? &moveMatricesOp<true, true> : &moveMatricesOp<true, false>)
                         : (transposed ? &moveMatricesOp<false, true> : &moveMatricesOp<false, false>);
  meet(name, ~0u, op, &own, site);
}

// ---- mma.sync

namespace {

struct MmaOperand {
  float* d;
  const uint32_t *a, *b;
};

// d += a b for a 16x8 tile; lane l holds d[l/4][2*(l%4)], its right neighbour, and the same two of row l/4 + 8.
template <int K>
void multiply(void* const* operands, const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = operand<MmaOperand>(operands, lane).d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      operand<MmaOperand>(operands, lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  ++current->block->statistics.mma;
}

void mmaBf16Op(void* const* operands, uint32_t mask) {
  requireFullWarp("mmaBf16", mask);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperand& o = operand<MmaOperand>(operands, lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {  // registers: top left, bottom left, top right, bottom right quarter of a
      float* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
      to[0] = lowBf16(o.a[i]);
      to[1] = highBf16(o.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = lowBf16(o.b[i]);
      b[pair + i * 8 + 1][group] = highBf16(o.b[i]);
    }
  }
  multiply(operands, a, b);
}

float tf32(uint32_t bits) { return asFloat(bits & 0xffffe000u); }

void mmaTf32Op(void* const* operands, uint32_t mask) {
  requireFullWarp("mmaTf32", mask);
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperand& o = operand<MmaOperand>(operands, lane);
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * 4] = tf32(o.a[i]);
    for (int i = 0; i < 2; ++i) b[k + i * 4][group] = tf32(o.b[i]);
  }
  multiply(operands, a, b);
}

}  // namespace

void mmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaOperand own{d, a, b};
  meet("mmaBf16", ~0u, mmaBf16Op, &own, site);
}

void mmaTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaOperand own{d, a, b};
  meet("mmaTf32", ~0u, mmaTf32Op, &own, site);
}

// ---- cp.async

namespace {

void land(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

}  // namespace

void cpAsync(void* shared, const void* global, uint32_t bytes, bool predicate) {
  checkShared(shared, bytes, bytes, "cpAsync");
  if (predicate) checkGlobal(global, bytes, "cpAsync");
  std::memset(shared, kPoison, bytes);
  current->copies.items.push_back(
      {static_cast<unsigned char*>(shared), predicate ? static_cast<const unsigned char*>(global) : nullptr, bytes});
  ++current->block->statistics.cpAsync;
}

void finishCopies(int pending) { current->copies.finish(pending, land); }

// ---- mbarriers

namespace {

struct MbarrierState {
  uint64_t phase : 1;
  uint64_t expected : 20;  // arrivals of a phase
  uint64_t pending : 20;   // arrivals that the current phase still waits for
  int64_t bytes : 21;      // expected and not yet arrived; below zero when data came before it was announced
  uint64_t tag : 2;        // kLive; poison is 3, an invalidated barrier 0
};
constexpr uint64_t kLive = 1;
static_assert(sizeof(MbarrierState) == sizeof(Mbarrier));

MbarrierState stateOf(const Mbarrier& barrier, const char* what) {
  checkShared(&barrier, 8, 8, what);
  const MbarrierState state = std::bit_cast<MbarrierState>(barrier.state);
  if (state.tag != kLive) report("%s: the mbarrier is not initialised", what);
  return state;
}

// Stores the state; a phase without pending arrivals and bytes ends, and those that wait look again.
void update(Mbarrier& barrier, MbarrierState state) {
  Block& block = ownerOf(&barrier, "mbarrier");
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
    std::erase_if(block.barrierWaiters, [&](const BarrierWaiter& waiter) {
      if (waiter.barrier != &barrier) return false;
      block.wake(waiter.thread);
      return true;
    });
  }
  barrier.state = std::bit_cast<uint64_t>(state);
}

void arriveAt(Mbarrier& barrier, const char* what) {
  MbarrierState state = stateOf(barrier, what);
  if (state.pending == 0) report("%s: more arrivals at the mbarrier than its count of %d", what, int(state.expected));
  --state.pending;
  update(barrier, state);
}

// What lies at p's place in the shared memory of block `rank` of the cluster.
template <typename T>
T* inBlock(T* p, int rank, const char* what) {
  const Block& block = *current->block;
  if (rank < 0 || rank >= static_cast<int>(block.clusterBlocks)) {
    report("%s: block %d of a cluster of %u", what, rank, block.clusterBlocks);
  }
  const Block& other = block.cluster[rank];
  if (other.live == 0) report("%s: block %d of the cluster has exited", what, rank);
  return reinterpret_cast<T*>(other.shared + checkShared(p, 1, 1, what));
}

}  // namespace

void mbarrierInit(Mbarrier& barrier, int count) {
  checkShared(&barrier, 8, 8, "mbarrierInit");
  if (count < 1 || count >= 1 << 20) report("mbarrierInit: count %d is not 1 to 2^20-1", count);
  if (std::bit_cast<MbarrierState>(barrier.state).tag == kLive) report("mbarrierInit: the mbarrier is in use");
  const uint64_t arrivals = static_cast<uint64_t>(count);
  barrier.state = std::bit_cast<uint64_t>(MbarrierState{0, arrivals, arrivals, 0, kLive});
}

void mbarrierInvalidate(Mbarrier& barrier) {
  stateOf(barrier, "mbarrierInvalidate");
  barrier.state = 0;
}

void mbarrierArrive(Mbarrier& barrier) { arriveAt(barrier, "mbarrierArrive"); }

void mbarrierArriveAt(Mbarrier& barrier, int rank) {
  arriveAt(*inBlock(&barrier, rank, "mbarrierArriveAt"), "mbarrierArriveAt");
}

void mbarrierExpectTx(Mbarrier& barrier, uint32_t bytes) {
  MbarrierState state = stateOf(barrier, "mbarrierExpectTx");
  state.bytes += bytes;
  update(barrier, state);
}

void mbarrierArriveExpectTx(Mbarrier& barrier, uint32_t bytes) {
  MbarrierState state = stateOf(barrier, "mbarrierArriveExpectTx");
  state.bytes += bytes;
  barrier.state = std::bit_cast<uint64_t>(state);
  arriveAt(barrier, "mbarrierArriveExpectTx");
}

void mbarrierWait(Mbarrier& barrier, uint32_t parity, Site site) {
  while (stateOf(barrier, "mbarrierWait").phase == (parity & 1)) {
    current->block->barrierWaiters.push_back({&barrier, current->linear});
    waitUntilWoken("mbarrierWait", site);
  }
  std::erase(current->block->landed, &barrier);
}

void cpAsyncArrive(Mbarrier& barrier) {
  stateOf(barrier, "cpAsyncArrive");
  Job& job = current->block->jobs.emplace_back();
  job.copies.swap(current->copies.items);
  job.barrier = &barrier;
  current->copies.clear();
}

// ---- TMA

namespace {

TensorMapFields fieldsOf(const TensorMap& map, const char* what) {
  TensorMapFields fields;
  std::memcpy(&fields, &map, sizeof fields);
  if (fields.magic != kTensorMapMagic) report("%s: not a tensor map of encodeTensorMap", what);
  return fields;
}

uint32_t bytesOf(const TensorMapFields& map) { return map.boxColumns * map.boxRows * map.elementBytes; }

Tile tileOf(const TensorMap& map, const void* shared, int column, int row, const char* what) {
  Tile tile{fieldsOf(map, what), static_cast<unsigned char*>(const_cast<void*>(shared)), column, row};
  // The swizzle is a function of the address: a tile that starts within the 1024-byte pattern would be cut wrongly.
  checkShared(shared, bytesOf(tile.map), tile.map.swizzled ? 1024 : 128, what);
  return tile;
}

// Moves a box between the matrix and shared memory, element by element at the matrix's edges.
void moveTile(const Tile& tile, bool load) {
  const TensorMapFields& map = tile.map;
  unsigned char* base = ownerOf(tile.shared, "TMA").shared;
  const uint32_t rowBytes = map.boxColumns * map.elementBytes;
  const int64_t chunkColumns = 16 / map.elementBytes;
  for (uint32_t r = 0; r < map.boxRows; ++r) {
    const int64_t row = int64_t{tile.y} + r;
    const bool rowInside = row >= 0 && row < static_cast<int64_t>(map.rows);
    for (uint32_t byte = 0; byte < rowBytes; byte += 16) {
      size_t offset = static_cast<size_t>(tile.shared - base) + r * rowBytes + byte;
      if (map.swizzled) offset ^= (offset >> 7 & 7) << 4;
      unsigned char* shared = base + offset;
      const int64_t column = tile.x + static_cast<int64_t>(byte / map.elementBytes);
      if (load) std::memset(shared, 0, 16);
      if (!rowInside) continue;
      const int64_t first = std::max<int64_t>(0, -column);
      const int64_t last = std::min(chunkColumns, static_cast<int64_t>(map.columns) - column);
      if (first >= last) continue;
      unsigned char* global = map.base + row * map.rowBytes + (column + first) * map.elementBytes;
      unsigned char* local = shared + first * map.elementBytes;
      const size_t bytes = static_cast<size_t>(last - first) * map.elementBytes;
      std::memcpy(load ? local : global, load ? global : local, bytes);
    }
  }
}

}  // namespace

namespace {

void queueLoad(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row, const char* what) {
  stateOf(barrier, what);
  Job& job = ownerOf(&barrier, what).jobs.emplace_back();
  job.tile = tileOf(map, shared, column, row, what);
  job.tileBytes = bytesOf(job.tile.map);
  job.barrier = &barrier;
  std::memset(shared, kPoison, job.tileBytes);
}

}  // namespace

void tmaLoad2d(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row) {
  queueLoad(shared, map, barrier, column, row, "tmaLoad2d");
  current->block->statistics.tmaBytes += bytesOf(fieldsOf(map, "tmaLoad2d"));
}

void tmaLoad2dMulticast(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row, uint16_t ranks) {
  const char* what = "tmaLoad2dMulticast";
  for (int rank = 0; rank < 16; ++rank) {
    if (ranks >> rank & 1) {
      queueLoad(inBlock(shared, rank, what), map, *inBlock(&barrier, rank, what), column, row, what);
    }
  }
  current->block->statistics.tmaBytes += bytesOf(fieldsOf(map, what));
}

void tmaStore2d(const TensorMap& map, const void* shared, int column, int row) {
  current->stores.items.push_back(tileOf(map, shared, column, row, "tmaStore2d"));
  current->block->statistics.tmaBytes += bytesOf(current->stores.items.back().map);
}

// The data leaves shared memory when it is waited for, so that overwriting it earlier shows.
void finishStores(int pending) {
  current->stores.finish(pending, [](const Tile& tile) { moveTile(tile, false); });
}

void Block::finishJob() {
  const size_t i = schedule.order == Order::Fair ? 0 : random(static_cast<uint32_t>(jobs.size()));
  const Job& job = jobs[i];
  Mbarrier& barrier = *job.barrier;
  const uint32_t bytes = job.tileBytes;
  for (const Copy& copy : job.copies) land(copy);
  if (bytes > 0) moveTile(job.tile, true);
  jobs.erase(jobs.begin() + i);
  if (std::find(landed.begin(), landed.end(), &barrier) == landed.end()) landed.push_back(&barrier);
  if (bytes == 0) {
    arriveAt(barrier, "cp.async arrival");
    return;
  }
  MbarrierState state = stateOf(barrier, "TMA completion");
  state.bytes -= bytes;
  update(barrier, state);
}

// ---- wgmma

namespace {

// Matrix descriptor: 14 bits each of start address, leading and stride byte offset in units of 16 bytes, at bits 0, 16
// and 32; bits 62-63 hold the swizzle, 1 is 128 bytes.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint32_t field(uint64_t descriptor, int bit) {
  return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
}

// 16 bytes of an operand, `offset` from the descriptor's start before swizzling.
const uint16_t* chunk(uint64_t descriptor, uint32_t offset) {
  const Block& block = *current->block;
  if (descriptor >> 62 != 1)
    report("wgmma: descriptor %016llx has no 128-byte swizzle", (unsigned long long)descriptor);
  uint32_t address = field(descriptor, 0) + offset;
  address ^= (address >> 7 & 7) << 4;
  if (address + 16 > block.sharedBytes) report("wgmma: operand at shared offset %u, past the end", address);
  return reinterpret_cast<const uint16_t*>(block.shared + address);
}

struct WgmmaOperand {
  int n;
  Major majorB;
  float* d;
  const uint32_t* fragment;
  uint64_t a, b;
  bool accumulate;
};

// Where a lane's accumulator i lies in the 16 x n slice of its warp.
int valueIndex(int lane, int i, int n) { return (lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The accumulators that lane 0 keeps at d: of a chain in flight, or taken over from the registers now.
size_t accumulatorsOf(Warp& warp, void* const* operands, int n) {
  const float* d = operand<WgmmaOperand>(operands, 0).d;
  size_t slot = warp.accumulators.size();
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    if (warp.accumulators[i].pending == 0) {
      slot = i;
    } else if (warp.accumulators[i].registers[0] == d) {
      return i;
    }
  }
  if (slot == warp.accumulators.size()) warp.accumulators.emplace_back();
  Accumulators& chain = warp.accumulators[slot];
  chain.n = n;
  chain.pending = 0;
  chain.values.resize(16 * n);
  for (int lane = 0; lane < 32; ++lane) {
    float* registers = operand<WgmmaOperand>(operands, lane).d;
    chain.registers[lane] = registers;
    for (int i = 0; i < n / 2; ++i) chain.values[valueIndex(lane, i, n)] = registers[i];
    std::memset(registers, kPoison, n / 2 * sizeof(float));
  }
  return slot;
}

void issueWgmmaOp(void* const* operands, uint32_t mask) {
  requireFullWarp("wgmma", mask);
  Block& block = *current->block;
  Warp& warp = block.warps[current->warp];
  const WgmmaOperand& first = operand<WgmmaOperand>(operands, 0);
  if (static_cast<size_t>(current->warp | 3) >= block.warps.size()) report("wgmma needs a warpgroup of four warps");
  if (!warp.fenced) report("wgmma without wgmmaFence since its registers were last free");
  for (int lane = 1; lane < 32; ++lane) {
    const WgmmaOperand& o = operand<WgmmaOperand>(operands, lane);
    if (o.a != first.a || o.b != first.b || o.accumulate != first.accumulate) {
      report("wgmma: descriptors or flags differ within the warp");
    }
  }
  // No reference into the queue is kept: accumulatorsOf and the queue may both grow.
  const size_t slot = accumulatorsOf(warp, operands, first.n);
  Wgmma& issued = warp.wgmma.items.emplace_back();
  issued.accumulators = slot;
  issued.a = first.a;
  issued.b = first.b;
  issued.aInRegisters = first.fragment != nullptr;
  issued.bTransposed = first.majorB == Major::MN;
  issued.accumulate = first.accumulate;
  if (first.fragment) {
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(issued.fragments[lane], operand<WgmmaOperand>(operands, lane).fragment, sizeof issued.fragments[0]);
    }
  }
  ++warp.accumulators[slot].pending;
}

// This warp's 16 rows of the 64 x n x 16 product.
void execute(Warp& warp, const Wgmma& wgmma) {
  Accumulators& chain = warp.accumulators[wgmma.accumulators];
  const int n = chain.n, firstRow = current->warp % 4 * 16;
  float a[16][16], b[16][256];
  if (wgmma.aInRegisters) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float* to = &a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
        to[0] = lowBf16(wgmma.fragments[lane][i]);
        to[1] = highBf16(wgmma.fragments[lane][i]);
      }
    }
  } else {
    for (int m = 0; m < 16; ++m) {
      const uint32_t row = firstRow + m;
      for (int k = 0; k < 16; k += 8) {
        const uint16_t* from = chunk(wgmma.a, row / 8 * field(wgmma.a, 32) + row % 8 * 128 + k * 2);
        for (int i = 0; i < 8; ++i) a[m][k + i] = bf16ToFloat(from[i]);
      }
    }
  }
  if (wgmma.bTransposed) {
    // 64 columns to a row of 128 bytes: the leading offset leads to the next 64 columns, the stride to the next 8 rows.
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < n; col += 8) {
        const uint32_t offset = col / 64 * field(wgmma.b, 16) + k / 8 * field(wgmma.b, 32) + k % 8 * 128 + col % 64 * 2;
        const uint16_t* from = chunk(wgmma.b, offset);
        for (int i = 0; i < 8; ++i) b[k][col + i] = bf16ToFloat(from[i]);
      }
    }
  } else {
    for (int col = 0; col < n; ++col) {
      for (int k = 0; k < 16; k += 8) {
        const uint16_t* from = chunk(wgmma.b, col / 8 * field(wgmma.b, 32) + col % 8 * 128 + k * 2);
        for (int i = 0; i < 8; ++i) b[k + i][col] = bf16ToFloat(from[i]);
      }
    }
  }
  if (!wgmma.accumulate) std::fill(chain.values.begin(), chain.values.end(), 0.f);
  for (int m = 0; m < 16; ++m) {
    float* d = chain.values.data() + m * n;
    for (int k = 0; k < 16; ++k) {
      const float scale = a[m][k];
      for (int col = 0; col < n; ++col) d[col] += scale * b[k][col];
    }
  }
  ++current->block->statistics.wgmma;
  if (--chain.pending > 0) return;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < n / 2; ++i) chain.registers[lane][i] = chain.values[valueIndex(lane, i, n)];
  }
}

struct WaitOperand {
  int pending;
};

void finishWgmmaOp(void* const* operands, uint32_t) {
  Warp& warp = current->block->warps[current->warp];
  warp.fenced = false;
  warp.wgmma.finish(operand<WaitOperand>(operands, 0).pending, [&](const Wgmma& wgmma) { execute(warp, wgmma); });
}

}  // namespace

uint64_t wgmmaDescriptor(const void* tile, int leadingBytes, int strideBytes) {
  const uint32_t start = checkShared(tile, 16, 16, "wgmma descriptor");
  return kSwizzle128 | uint64_t{static_cast<uint32_t>(strideBytes) >> 4} << 32 |
         uint64_t{static_cast<uint32_t>(leadingBytes) >> 4} << 16 | start >> 4;
}

void issueWgmma(int n, Major majorB, float* d, const uint32_t* fragment, uint64_t a, uint64_t b, bool accumulate,
                const Site& site) {
  WgmmaOperand own{n, majorB, d, fragment, a, b, accumulate};
  meet("wgmma", ~0u, issueWgmmaOp, &own, site);
}

void wgmmaFence(Site site) {
  meet(
      "wgmmaFence", ~0u, [](void* const*, uint32_t) { current->block->warps[current->warp].fenced = true; }, nullptr,
      site);
}

void wgmmaCommit(Site site) {
  meet(
      "wgmmaCommit", ~0u, [](void* const*, uint32_t) { current->block->warps[current->warp].wgmma.commit(); }, nullptr,
      site);
}

void finishWgmma(int pending, const Site& site) {
  WaitOperand own{pending};
  meet("wgmmaWait", ~0u, finishWgmmaOp, &own, site);
}

}  // namespace elastiform::simt
