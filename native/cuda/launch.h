// What an op's CUDA code is called with: operands whose sizes the device knows, and where faults, counters and produced
// sizes go.
//
// An op is emitted once per program: its function launches kernels on a stream that is being recorded, and the recording
// is replayed for every run, whatever the current sizes. So nothing here depends on a current size: grids come from
// bounds, kernels read sizes from the device, loop over what there is, and no host code waits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "device/device.h"
#include "ops/attributes.h"
#include "ops/op.h"

namespace elastiform::ELASTIFORM_DEVICE {

// An operand, or an output, as kernels get it, by value. Contiguous but for the stride of weights.
struct Operand {
  void* data = nullptr;           // device memory; null where an optional operand is absent
  const int32_t* sizes = nullptr; // the device's table of the current values of the program's dims
  int32_t dim[kMaxRank] = {};     // indices into it
  int64_t bound[kMaxRank] = {};   // the largest values they take; for the host's choice of grids
  int64_t stride = 0;             // elements between rows of a matrix: a weight may be wider than the prefix in use
  int32_t rank = 0;
  DType dtype = DType::F32;

  DEVICE int size(int i) const { return sizes[dim[i]]; }
  DEVICE int64_t elements() const {
    int64_t n = 1;
    UNROLL  // constant indices: the operand stays in the kernel's parameters
    for (int i = 0; i < kMaxRank; ++i) n *= i < rank ? size(i) : 1;
    return n;
  }
  DEVICE float* f32() const { return static_cast<float*>(data); }
  DEVICE int32_t* i32() const { return static_cast<int32_t*>(data); }

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
  int64_t boundElements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= bound[i];
    return n;
  }
};

// What is wrong with data. faultMessage() in kernels.cu has the words.
enum class Fault : int32_t {
  None,
  Id,          // not in [low, high)
  Row,         // not in [low, high): ascending, unique
  Offset,      // not in [low, high]
  OffsetEnd,   // not the number of rows `high`
  Segment,     // row not in the segment it is put in, [low, high)
  Length,      // cache length not in [low, high]
  Target,      // not in [low, high)
  NotFinite,   // value is NaN or infinite where it must not be
  Range,       // value not in its range
  NaN,         // value is NaN
  NotPositive, // value is not above 0
  Below,       // value not in [low, high)
  NoMaximum,   // a row holds NaN, or its largest value is infinite
  Whole,       // value is negative or has a fraction
  Segments,    // not one value for each of `high` segments
  Room,        // more rows than their dim's bound `high` are selected
  Rows,        // not `high` rows
  Slot,        // another segment's, too
  Copy,        // a page that is copied to twice, or from, too
  Page,        // of row `low` of slot `index`: not in [0, high)
  NoKeys,      // a segment has queries and no keys
};

// The first fault of a run; the data type of all values is double, which holds every index exactly.
struct FaultRecord {
  int32_t claimed = 0;
  Fault fault = Fault::None;
  int32_t step = 0, operand = 0;  // operand: input of the op
  double index = 0, low = 0, high = 0, got = 0;
};

// The device's side of one step of a run.
struct StepState {
  FaultRecord* record = nullptr;
  Counters* counters = nullptr;  // of the step's tag
  int32_t step = 0;

  // After a fault nothing computes: indices cannot be believed any more.
  DEVICE bool faulted() const { return *const_cast<volatile int32_t*>(&record->claimed) != 0; }
  DEVICE void report(Fault fault, int operand, double index, double low, double high, double got) const {
    if (atomicCas(&record->claimed, 0, 1) != 0) return;
    record->fault = fault;
    record->step = step;
    record->operand = operand;
    record->index = index;
    record->low = low;
    record->high = high;
    record->got = got;
  }
  // To be called by one thread of one kernel of the op.
  DEVICE void count(double flops, double rows) const {
    counters->flops += flops;
    counters->rows += rows;
  }
};

// The host's side: what an op's function gets. in/out follow the signature's order.
struct Launch {
  const char* op;
  const Operand* in;
  const Operand* out;
  const double* attr;
  StepState state;
  int32_t* const* produced;  // where the i-th "+" dim of the signature gets its value, in device memory
  uint32_t* ticket;          // 0 when a kernel begins, and when it has ended: for the blocks of one to learn which is last.
                             // One for all steps: only those that produce a size, which run beside no other, may use it
  Stream stream;
  int multiprocessors;
  bool hopper;  // the device has wgmma and TMA
  // Device memory until the end of the op, sized by bounds, aligned to 256 bytes. An op that asks for it runs alone.
  void* (*scratchAlloc)(void* context, size_t bytes);
  // Whether an input has not been checked for what `kind` stands for and the op must do so. Said once: the data of an
  // operand does not change until another step writes it. An op that is told so runs alone.
  bool (*uncheckedInput)(void* context, int input, int kind);
  void (*runAlone)(void* context);
  void* context;

  // To be called by an op whose kernels may report a fault without having asked uncheckedInput or for scratch memory, or
  // producing a size: it then runs beside no other step, so that of two faults the first step's is reported.
  void alone() const { runAlone(context); }

  template <typename T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(scratchAlloc(context, static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)));
  }

  // Blocks for `items` of which a block does `perBlock` at a time: enough to fill the device, the rest by looping.
  unsigned blocks(int64_t items, int64_t perBlock) const {
    const int64_t wanted = (items + perBlock - 1) / perBlock;
    return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, int64_t{8} * multiprocessors));
  }

  int64_t intAttribute(int i, const char* name, int64_t low, int64_t high) const {
    return checkedInteger(op, name, attr[i], low, high);
  }
  double finiteAttribute(int i, const char* name) const {
    return checkedFinite(op, name, attr[i]);
  }
};

using Emitter = void (*)(const Launch&);

// Launch checks that report a Fault and leave data alone, once per operand and program (checks.cu). `input` counts the
// op's inputs. They must come before the kernels that use the data, which begin with `if (state.faulted()) return;`.
void checkIds(const Launch& launch, int input, const Operand& limitOf, int limitDim);   // in [0, limit)
void checkRows(const Launch& launch, int input, const Operand& limitOf, int limitDim);  // ascending, unique, in [0, limit)
void checkTargets(const Launch& launch, int input, const Operand& limitOf, int limitDim);  // in [-1, limit)
// 0 first, never falling, the size of dim `rowsDim` of `rowsOf` last.
void checkOffsets(const Launch& launch, int input, const Operand& rowsOf, int rowsDim);
// As many rows as `other` has: Error(InvalidProgram), as sizes are the program's.
void checkRowCount(const Launch& launch, int input, const Operand& other);

// Launch y = 0 (f32), and y = x unless they share memory (f32 or bf16); after a fault nothing (elementwise.cu).
void clear(const Launch& launch, const Operand& y);
void copy(const Launch& launch, const Operand& x, const Operand& y);

}  // namespace elastiform::ELASTIFORM_DEVICE
