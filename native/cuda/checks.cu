// Checks of index data on the device: they report a fault and leave the data alone.
#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

enum class Check { Ids, Rows, Targets };

template <Check check>
__global__ void __launch_bounds__(kThreads, 2)
    indexKernel(Operand values, const int32_t* limitSize, StepState state, int input) {
  const int count = values.size(0), limit = *limitSize;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const int value = values.i32()[i];
    const int low = check == Check::Targets ? -1 : check == Check::Rows && i > 0 ? values.i32()[i - 1] + 1 : 0;
    if (value >= low && value < limit) continue;
    state.report(check == Check::Rows ? Fault::Row : check == Check::Ids ? Fault::Id : Fault::Target, input, i, low,
                 limit, value);
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    offsetsKernel(Operand offsets, const int32_t* rowsSize, StepState state, int input) {
  const int last = offsets.size(0) - 1, rows = *rowsSize;
  for (int s = blockIdx.x * kThreads + threadIdx.x; s <= last; s += gridDim.x * kThreads) {
    const int value = offsets.i32()[s], low = s > 0 ? offsets.i32()[s - 1] : 0, high = s > 0 ? rows : 0;
    if (value < low || value > high) {
      state.report(Fault::Offset, input, s, low, high, value);
    } else if (s == last && value != rows) {
      state.report(Fault::OffsetEnd, input, s, 0, rows, value);
    }
  }
}

__global__ void __launch_bounds__(32, 1) rowCountKernel(Operand x, Operand other, StepState state, int input) {
  if (threadIdx.x == 0 && x.size(0) != other.size(0)) {
    state.report(Fault::Rows, input, 0, 0, other.size(0), x.size(0));
  }
}

template <Check check>
void checkIndices(const Launch& launch, int input, const Operand& limitOf, int limitDim) {
  // Different limits are different checks.
  const int kind = static_cast<int>(check) + 4 * (1 + limitOf.dim[limitDim]);
  if (!launch.uncheckedInput(launch.context, input, kind)) return;
  const Operand& values = launch.in[input];
  LAUNCH(indexKernel<check>, launch.blocks(values.bound[0], kThreads), kThreads, 0, launch.stream, values,
         limitOf.sizes + limitOf.dim[limitDim], launch.state, input);
}

}  // namespace

void checkIds(const Launch& launch, int input, const Operand& limitOf, int limitDim) {
  checkIndices<Check::Ids>(launch, input, limitOf, limitDim);
}

void checkRows(const Launch& launch, int input, const Operand& limitOf, int limitDim) {
  checkIndices<Check::Rows>(launch, input, limitOf, limitDim);
}

void checkTargets(const Launch& launch, int input, const Operand& limitOf, int limitDim) {
  checkIndices<Check::Targets>(launch, input, limitOf, limitDim);
}

void checkOffsets(const Launch& launch, int input, const Operand& rowsOf, int rowsDim) {
  if (!launch.uncheckedInput(launch.context, input, 3 + 4 * (1 + rowsOf.dim[rowsDim]))) return;
  const Operand& offsets = launch.in[input];
  if (offsets.bound[0] < 1) {
    fail(ErrorCode::InvalidProgram, "[%s] offsets must hold at least one element, got none", launch.op);
  }
  LAUNCH(offsetsKernel, launch.blocks(offsets.bound[0], kThreads), kThreads, 0, launch.stream, offsets,
         rowsOf.sizes + rowsOf.dim[rowsDim], launch.state, input);
}

void checkRowCount(const Launch& launch, int input, const Operand& other) {
  const Operand& x = launch.in[input];
  if (x.dim[0] == other.dim[0]) return;
  launch.alone();
  LAUNCH(rowCountKernel, 1, 32, 0, launch.stream, x, other, launch.state, input);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
