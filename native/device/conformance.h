// Every wrapper of device.h on random operands against plain host code: what the emulation passes, a GPU must pass too.
#pragma once

#include <string>
#include <vector>

namespace elastiform {

struct CaseResult {
  std::string name;
  double error = 0, tolerance = 0;  // 0 and 0 for cases that must be exact
  std::string note = {};            // why a case failed otherwise, or was skipped

  bool passed() const { return note.empty() && error <= tolerance; }
};

namespace simt {
std::vector<CaseResult> runConformance();
}
namespace cuda {
std::vector<CaseResult> runConformance();  // on the calling thread's device; leaves out what it is too old for
}

}  // namespace elastiform
