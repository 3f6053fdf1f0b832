// How the native tests and benchmarks hand a tensor to a kernel.
#pragma once

#include "core/tensor.h"

namespace elastiform::test {

// A whole tensor as a kernel sees it.
inline TensorView viewOf(Tensor& t) {
  TensorView v;
  v.data = t.data();
  v.dtype = t.dtype;
  v.rank = t.rank;
  v.shape = t.shape;
  v.strides = t.strides;
  v.tensor = &t;
  return v;
}

}  // namespace elastiform::test
