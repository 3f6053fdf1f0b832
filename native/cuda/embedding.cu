// Embedding look-up and its gradient.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void embedding(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void embeddingGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
