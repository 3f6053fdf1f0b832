// What the parts of the addon share: per-environment state, error translation and argument checks. No mathematics here.
#pragma once

#include <napi.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/tensor.h"
#include "runtime/program.h"

namespace elastiform::addon {

class EngineState;

// What the garbage collector is told about bytes held outside its heap: tensors, arenas, packed weights.
struct ExternalMemory {
  std::shared_ptr<std::atomic<int64_t>> owned = std::make_shared<std::atomic<int64_t>>(0);
  int64_t reported = 0;
  bool open = true;  // false once the environment is being torn down; objects are finalized after that

  void sync(Napi::BasicEnv env);
};

// State of one JavaScript environment (the main thread or a worker thread).
struct AddonData {
  Napi::FunctionReference mapping, tensor, program, engine;  // constructors
  std::shared_ptr<ExternalMemory> external = std::make_shared<ExternalMemory>();
  std::set<std::shared_ptr<EngineState>> engines;  // the running ones
};
AddonData& addonData(Napi::Env env);

// A JavaScript Error with `.code` set to the name of the code.
Napi::Error makeError(Napi::Env env, const Error& error);

// Runs `body`, translating C++ exceptions to JavaScript ones.
template <typename Body>
auto guarded(Napi::Env env, const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error& error) {
    throw makeError(env, error);
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw makeError(env, Error(ErrorCode::OutOfMemory, "[native] out of memory"));
  } catch (const std::exception& error) {
    throw makeError(env, Error(ErrorCode::Internal, std::string("[native] ") + error.what()));
  }
}

// Argument checks; `what` reads like "[Tensor.slice] elementOffset". Error(InvalidArgument).
int64_t integerArgument(const Napi::Value& value, const char* what, int64_t low, int64_t high);
std::string stringArgument(const Napi::Value& value, const char* what);
std::vector<int64_t> integersArgument(const Napi::Value& value, const char* what, size_t most);
DType dtypeArgument(const Napi::Value& value, const char* what);

// A fresh typed array of the kind that carries `dtype` (bf16 and f16 as Uint16Array) with a copy of `data`.
Napi::Value copyToTypedArray(Napi::Env env, DType dtype, const void* data, size_t elements);
// The elements of a typed array of the kind that carries `dtype`.
struct TypedData {
  const void* data;
  size_t elements;
};
TypedData typedArrayArgument(const Napi::Value& value, DType dtype, const char* what);
Napi::TypedArray anyTypedArray(const Napi::Value& value, const char* what);
void* typedArrayData(const Napi::TypedArray& array);

// Wrapped native objects; Error(InvalidArgument) for anything else, Error(Disposed) after dispose().
std::shared_ptr<Tensor> tensorArgument(const Napi::Value& value, const char* what);
std::shared_ptr<const Program> programArgument(const Napi::Value& value, const char* what);

constexpr int64_t kMaxSafeInteger = (int64_t{1} << 53) - 1;

void initTensors(Napi::Env env, Napi::Object exports);
void initPrograms(Napi::Env env, Napi::Object exports);
void initEngines(Napi::Env env, Napi::Object exports);
// Stops every engine of the environment; what runs is aborted.
void stopEngines(Napi::Env env);

}  // namespace elastiform::addon
