// Runs the native tests: `elastiform_tests [runtime|gemm|kernels|device|gpu]...`, all of them without arguments.
#include <cstdio>
#include <cstring>

#include "test/test.h"

// Each prints the checks that fail and returns their number, or kNotRun where there is nothing to test on.
int testRuntime();
int testGemm();
int testKernels();
int testDevice();
int testGpu();

int main(int argc, char** argv) {
  const struct {
    const char* name;
    int (*run)();
  } tests[] = {{"runtime", testRuntime}, {"gemm", testGemm}, {"kernels", testKernels}, {"device", testDevice},
               {"gpu", testGpu}};
  int failures = 0;
  for (const auto& test : tests) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    const int failed = test.run();
    const bool notRun = failed == elastiform::test::kNotRun;
    std::printf("%s: %s\n", test.name, notRun ? "not run" : failed == 0 ? "passed" : "FAILED");
    if (!notRun) failures += failed;
  }
  return failures == 0 ? 0 : 1;
}
