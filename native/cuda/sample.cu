// Sampling of the next token.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void sample(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
