// Checks for the native tests: a failed one is printed and counted, and the test goes on.
#pragma once

#include <cstdio>
#include <string>

#include "core/error.h"

namespace elastiform::test {

// What a test returns that found nothing to test on.
constexpr int kNotRun = -1;

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                 \
    }                                                                             \
  } while (0)

// Runs `body` and checks that it fails with `code` and a message that contains `text`.
template <typename Body>
int expectError(const char* file, int line, ErrorCode code, const std::string& text, const Body& body) {
  try {
    body();
    std::fprintf(stderr, "%s:%d: no error, wanted \"%s\"\n", file, line, text.c_str());
  } catch (const Error& error) {
    if (error.code == code && std::string(error.what()).find(text) != std::string::npos) return 0;
    std::fprintf(stderr, "%s:%d: got \"%s\" (code %d), wanted \"%s\" (code %d)\n", file, line, error.what(),
                 static_cast<int>(error.code), text.c_str(), static_cast<int>(code));
  }
  return 1;
}
#define CHECK_ERROR(code, text, body) failures += expectError(__FILE__, __LINE__, ErrorCode::code, text, [&] { body; })

}  // namespace elastiform::test
