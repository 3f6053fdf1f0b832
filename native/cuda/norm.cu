// RMSNorm and LayerNorm over all rows or selected ones, and their gradients.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void rmsNorm(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void rmsNormGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void layerNorm(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void layerNormGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
