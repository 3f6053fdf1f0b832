// What an op is: its name, its operands by signature, its attributes, and what a kernel is called with.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/tensor.h"

namespace elastiform {

// Signature, e.g. "x:f32[M,K] w:w[N<,K<] bias?:w[N<] rows?:i32[R] -> y:f32[R,N]".
//   name?      optional operand or output: its tensor index may be -1
//   name!      operand the op writes to: must be bound to a state tensor
//   dtype      f32, i32, or w: f32, bf16 or f16 (a weight; arithmetic is f32)
//   [A,B]      dims; the same letter must be the same dim in every operand, constants equal by value
//   A<         the current size of A may be smaller than this operand's: a prefix of a weight is used
//   A|B        the size of A when the operand that introduces it is present, else B (rows?:[R] absent means R = M)
//   +R         an output dim the op produces while running
//   *X         the whole shape, of any rank; the same shape wherever *X appears
//   1          the constant one
// `inplace`: index of an operand whose memory output 0 may take over when it is not read later; the kernel then sees
// the same data pointer in both and must cope.
// `narrow`: groups of f32 operands and outputs that a device may store as bf16, e.g. "x y,pre": a comma joins those
// that are narrow together or not at all, a space parts groups. Arithmetic stays f32.
struct OpDef {
  const char* name;
  const char* signature;
  std::vector<const char*> attributes;  // names, in order; values are doubles
  int inplace = -1;
  const char* narrow = "";
};

// Counted by kernels from the sizes they really ran, per step tag (a tag names a layer and a place).
struct Counters {
  double flops = 0;   // multiply and add count as two
  double rows = 0;    // rows processed by ops that say so (linear_add: one per row that entered the sub-layer)
};

// What a kernel is called with. in/out follow the signature's order.
struct KernelArgs {
  const TensorView* in;
  const TensorView* out;
  const double* attr;
  Counters* counters;                          // of this step's tag
  const std::atomic<bool>* abort;              // hand to parallelFor; long kernels run in chunks
  int64_t* produced;                           // produced[i]: current size of the i-th "+" dim of the signature, to be set
  void* (*scratchAlloc)(void* arena, size_t bytes);  // 64-byte aligned, valid until the kernel returns
  void* scratchArena;

  template <typename T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(scratchAlloc(scratchArena, static_cast<size_t>(count) * sizeof(T)));
  }
};

using Kernel = void (*)(const KernelArgs&);
// Runs `count` neighbouring steps of an op as one: none reads what another of them writes, but for the operand whose memory
// output 0 may take over, which is output 0 of the step before; of ops that have such an operand it is in every step after
// the first.
using KernelOfSteps = void (*)(const KernelArgs* steps, int count);

// Every op the runtime knows, in the order of ops.cc.
const std::vector<OpDef>& opDefs();
// Index into opDefs(), or -1.
int findOp(const std::string& name);

}  // namespace elastiform
