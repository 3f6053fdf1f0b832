// Ops on selected rows, and sums in a fixed order.
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

void gatherRows(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void gatherIds(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void scatterAdd(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void sumRows(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }
void dot(const Launch& launch) { fail(ErrorCode::Internal, "[%s] has no CUDA kernel", launch.op); }

}  // namespace elastiform::ELASTIFORM_DEVICE
