// Tests of the device layer: complete kernels under every schedule of the emulation.
#include "device/device.h"

#include <cstdio>
#include <string>
#include <vector>

#include "core/error.h"
#include "test/device_examples.h"
#include "test/test.h"

using namespace elastiform;

namespace {

int failures = 0;

void expectPassed(const std::vector<CaseResult>& results, const char* where) {
  CHECK(!results.empty());
  for (const CaseResult& r : results) {
    if (r.passed()) continue;
    std::fprintf(stderr, "%s: %s: error %g (at most %g) %s\n", where, r.name.c_str(), r.error, r.tolerance,
                 r.note.c_str());
    ++failures;
  }
}

#ifdef ELASTIFORM_WITH_SIMT
const char* const kSchedules[] = {"fair", "sprint:1", "sprint:2", "sprint:3", "sprint:4", "random:5"};

void testExamples() {
  for (const char* schedule : kSchedules) {
    simt::setSchedule(simt::parseSchedule(schedule));
    expectPassed(simt::runExamples(), schedule);
  }
  simt::setSchedule({});
}
#endif

}  // namespace

int testDevice() {
#ifdef ELASTIFORM_WITH_SIMT
  testExamples();
#endif
  return failures;
}
