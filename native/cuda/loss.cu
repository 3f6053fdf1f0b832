// Losses over the vocabulary, a few rows at a time: the logits of all rows never exist together.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void distillKl(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void crossEntropy(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
