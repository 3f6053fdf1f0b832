// Attention over variable-length segments, its gradient, and attention against a growing key-value cache.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void attention(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void attentionGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void attentionCached(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
