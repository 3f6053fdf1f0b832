// Rotary positions.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void rope(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
