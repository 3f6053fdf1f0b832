// Routing: selection of rows, gates, and what routers learn from.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void routeTopk(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void routeThreshold(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void gate(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void gateGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void topkBce(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void topkBceGrad(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void topkCredit(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
