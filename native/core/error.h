// The one exception type of the native code: a code that JavaScript turns into an error class, and a message.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

namespace elastiform {

enum class ErrorCode {
  InvalidArgument,  // the caller's value is wrong
  InvalidProgram,   // a program failed validation
  InvalidFile,      // a file is truncated, corrupt or hostile
  InvalidData,      // values met while running are wrong: a token id past the vocabulary, a NaN score
  OutOfMemory,
  Aborted,
  Disposed,
  DeviceUnavailable,  // no such device on this machine, or none that this build can use
  Internal,  // a defect of ours
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code(code) {}
  const ErrorCode code;
};

// printf-style construction keeps messages readable where they are raised.
template <typename... Args>
[[noreturn]] void fail(ErrorCode code, const char* format, Args... args) {
  if constexpr (sizeof...(Args) == 0) {
    throw Error(code, format);
  } else {
    char text[512];
    std::snprintf(text, sizeof text, format, args...);
    throw Error(code, text);
  }
}

}  // namespace elastiform
