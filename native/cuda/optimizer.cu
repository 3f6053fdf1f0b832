// Gradient accumulation and AdamW over one flat vector of parameters.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void accumulate(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void adamw(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
