// Complete small kernels in the styles that the op library uses, run against references in double on either device.
#pragma once

#include <vector>

#include "device/conformance.h"

namespace elastiform {
namespace simt {
std::vector<CaseResult> runExamples();
}
namespace cuda {
std::vector<CaseResult> runExamples();
}
}  // namespace elastiform
