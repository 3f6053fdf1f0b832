// A validated program: dims, tensors and steps as the engine runs them.
//
// The encoding (version 1) is an Int32Array
//   [0x454c4153, 1, nDims, nTensors, nSteps, nTags,
//    nDims    x (kind, value)
//    nTensors x (kind, dtype, rank, d0, d1, d2, d3)       d: index of a dim; -1 past the rank
//    nSteps   x (op, tag, nIn, nOut, nAttr, attrStart, in..., out...)]   op: index into opNames; in/out: tensor or -1
// beside the attributes of all steps, the op names, and the bound tensors in the order their entries appear.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "ops/op.h"
#include "runtime/plan.h"

namespace elastiform {

constexpr int32_t kProgramMagic = 0x454c4153;  // "ELAS"
constexpr int32_t kProgramVersion = 1;
constexpr int kMaxOperands = 16;                         // of one step, inputs or outputs
constexpr int32_t kMaxProgramEntries = 1 << 17;          // dims, tensors, steps or tags
constexpr int64_t kMaxTensorElements = int64_t{1} << 40;

enum class DimKind : int32_t { Const = 0, Set = 1, Produced = 2 };
struct Dim {
  DimKind kind;
  int64_t bound;  // the value of a constant
};

enum class TensorKind : int32_t { Temp = 0, Bound = 1, Feed = 2, Output = 3 };
struct TensorDef {
  TensorKind kind;
  DType dtype;
  int rank;
  std::array<int, kMaxRank> dims;
  int64_t boundBytes = 0;           // size when every dim is at its bound
  int64_t arenaOffset = -1;         // temps
  int slot = -1;                    // index among bound tensors, feeds or outputs
};

struct Step {
  int op;
  Kernel kernel;
  int tag;
  std::vector<int> in, out;  // tensor indices, -1 for absent operands
  std::vector<double> attributes;
  std::vector<int> produced;  // dim indices, in the order of the signature's "+" dims
  KernelOfSteps several = nullptr;
  int count = 1;  // steps from this one on that `several` runs as one
};

struct Program {
  std::vector<Dim> dims;
  std::vector<TensorDef> tensors;
  std::vector<Step> steps;
  int tags = 0;
  int64_t arenaBytes = 0;
  bool narrow = false;  // some temporaries are stored as bf16, which the CPU's kernels do not know
  std::vector<int> feeds, outputs;                 // tensor indices in tensor order
  std::vector<std::shared_ptr<Tensor>> bound;      // in order of appearance
  std::vector<std::vector<int>> tensorsOfDim;      // for produced dims: tensors to resize when the value is known
  struct Use {
    Storage* storage;
    bool written;
  };
  std::vector<Use> writableUses;  // writable storages the program touches, each once
};

// What to call for an op; the CPU kernels outside tests.
using KernelTable = Kernel (*)(const std::string& op);
using KernelOfStepsTable = KernelOfSteps (*)(const std::string& op);

struct ProgramSource {
  const int32_t* code;
  size_t codeLength;
  const double* attributes;
  size_t attributeCount;
  std::vector<std::string> opNames;
  std::vector<std::shared_ptr<Tensor>> tensors;
  bool narrow = false;  // store temporaries as bf16 where all their ops may (OpDef::narrow)
};

// Validates and plans; Error(InvalidProgram) names the step and op that is wrong. `several` gives null for most ops.
std::shared_ptr<const Program> buildProgram(const ProgramSource& source, KernelTable kernels, KernelOfStepsTable several);

}  // namespace elastiform
