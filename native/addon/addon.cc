// The addon's entry point: module functions, error translation, argument checks.
#include "addon/addon.h"

#include <cmath>
#include <cstring>

#include "core/memory.h"
#include "core/pool.h"
#include "cpu/gemm/gemm.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "runtime/device.h"
#include "ops/op.h"

namespace elastiform::addon {

AddonData& addonData(Napi::Env env) { return *env.GetInstanceData<AddonData>(); }

void ExternalMemory::sync(Napi::BasicEnv env) {
  if (!open) return;
  const int64_t now = owned->load() + cpu::packedBytesTotal();
  if (now == reported) return;
  Napi::MemoryManagement::AdjustExternalMemory(env, now - reported);
  reported = now;
}

namespace {

const char* codeName(ErrorCode code) {
  switch (code) {
    case ErrorCode::InvalidArgument: return "InvalidArgument";
    case ErrorCode::InvalidProgram: return "InvalidProgram";
    case ErrorCode::InvalidFile: return "InvalidFile";
    case ErrorCode::InvalidData: return "InvalidData";
    case ErrorCode::OutOfMemory: return "OutOfMemory";
    case ErrorCode::Aborted: return "Aborted";
    case ErrorCode::Disposed: return "Disposed";
    case ErrorCode::DeviceUnavailable: return "DeviceUnavailable";
    case ErrorCode::Internal: return "Internal";
  }
  return "Internal";
}

[[noreturn]] void reject(const char* what, const std::string& wanted) {
  throw Error(ErrorCode::InvalidArgument, std::string(what) + " must be " + wanted);
}

}  // namespace

Napi::Error makeError(Napi::Env env, const Error& error) {
  Napi::Error result = Napi::Error::New(env, error.what());
  result.Set("code", Napi::String::New(env, codeName(error.code)));
  return result;
}

int64_t integerArgument(const Napi::Value& value, const char* what, int64_t low, int64_t high) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) || number != std::floor(number)) {
    reject(what, "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]" +
                     (value.IsNumber() ? ", got " + std::string(value.ToString()) : ""));
  }
  return static_cast<int64_t>(number);
}

std::string stringArgument(const Napi::Value& value, const char* what) {
  if (!value.IsString()) reject(what, "a string");
  return value.As<Napi::String>();
}

std::vector<int64_t> integersArgument(const Napi::Value& value, const char* what, size_t most) {
  if (!value.IsArray()) reject(what, "an array of integers");
  const auto array = value.As<Napi::Array>();
  if (array.Length() > most) reject(what, "an array of at most " + std::to_string(most) + " integers");
  std::vector<int64_t> result;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const std::string element = std::string(what) + "[" + std::to_string(i) + "]";
    result.push_back(integerArgument(array.Get(i), element.c_str(), 0, kMaxSafeInteger));
  }
  return result;
}

DType dtypeArgument(const Napi::Value& value, const char* what) {
  if (value.IsString()) {
    const std::string name = value.As<Napi::String>();
    for (int32_t i = 0; i < kDTypeCount; ++i) {
      if (name == dtypeName(static_cast<DType>(i))) return static_cast<DType>(i);
    }
  }
  reject(what, "'f32', 'bf16', 'f16' or 'i32'");
}

Napi::TypedArray anyTypedArray(const Napi::Value& value, const char* what) {
  if (!value.IsTypedArray()) reject(what, "a typed array");
  return value.As<Napi::TypedArray>();
}

void* typedArrayData(const Napi::TypedArray& array) {
  void* data = nullptr;  // asked for here, not of array.ArrayBuffer(): the memory may be a SharedArrayBuffer
  napi_get_typedarray_info(array.Env(), array, nullptr, nullptr, &data, nullptr, nullptr);
  return data;
}

TypedData typedArrayArgument(const Napi::Value& value, DType dtype, const char* what) {
  const bool f32 = dtype == DType::F32, i32 = dtype == DType::I32;
  const napi_typedarray_type wanted = f32 ? napi_float32_array : i32 ? napi_int32_array : napi_uint16_array;
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != wanted) {
    reject(what, f32 ? "a Float32Array" : i32 ? "an Int32Array" : "a Uint16Array");
  }
  const auto array = value.As<Napi::TypedArray>();
  return {typedArrayData(array), array.ElementLength()};
}

Napi::Value copyToTypedArray(Napi::Env env, DType dtype, const void* data, size_t elements) {
  const size_t bytes = elements * dtypeSize(dtype);
  Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, bytes);
  if (bytes > 0) std::memcpy(buffer.Data(), data, bytes);
  switch (dtype) {
    case DType::I32: return Napi::Int32Array::New(env, elements, buffer, 0);
    case DType::BF16:
    case DType::F16: return Napi::Uint16Array::New(env, elements, buffer, 0);
    default: return Napi::Float32Array::New(env, elements, buffer, 0);
  }
}

namespace {

Napi::Value info(const Napi::CallbackInfo& call) {
  const Napi::Env env = call.Env();
  Napi::Object devices = Napi::Object::New(env);
  for (const DeviceInfo& device : deviceInfos()) {
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("available", device.available);
    entry.Set("description", device.description);
    devices.Set(kDeviceNames[static_cast<int>(device.kind)], entry);
  }
  Napi::Array isas = Napi::Array::New(env);
  for (int i = 0; i <= static_cast<int>(cpu::isaAvailable()); ++i) {
    isas.Set(static_cast<uint32_t>(i), cpu::isaName(static_cast<cpu::Isa>(i)));
  }
  Napi::Object result = Napi::Object::New(env);
  result.Set("version", ELASTIFORM_VERSION);
  result.Set("isa", cpu::isaName());
  result.Set("isaAvailable", isas);
  result.Set("threads", threadCount());
  result.Set("hardwareThreads", hardwareThreads());
  result.Set("devices", devices);
  return result;
}

Napi::Value setThreads(const Napi::CallbackInfo& call) {
  return guarded(call.Env(), [&] {
    setThreadCount(static_cast<int>(integerArgument(call[0], "[setThreads] threads", 1, kMaxThreads)));
    return call.Env().Undefined();
  });
}

Napi::Value opNames(const Napi::CallbackInfo& call) {
  Napi::Array result = Napi::Array::New(call.Env());
  for (const OpDef& def : opDefs()) result.Set(result.Length(), def.name);
  return result;
}

Napi::Value opSignatures(const Napi::CallbackInfo& call) {
  Napi::Array result = Napi::Array::New(call.Env());
  for (const OpDef& def : opDefs()) result.Set(result.Length(), def.signature);
  return result;
}

Napi::Value opAttributes(const Napi::CallbackInfo& call) {
  Napi::Array result = Napi::Array::New(call.Env());
  for (const OpDef& def : opDefs()) {
    Napi::Array names = Napi::Array::New(call.Env());
    for (const char* name : def.attributes) names.Set(names.Length(), name);
    result.Set(result.Length(), names);
  }
  return result;
}

Napi::Value memory(const Napi::CallbackInfo& call) {
  const MemoryCounters& counters = memoryCounters();
  Napi::Object result = Napi::Object::New(call.Env());
  result.Set("mappedBytes", static_cast<double>(counters.mappedBytes));
  result.Set("heapBytes", static_cast<double>(counters.heapBytes));
  result.Set("packedBytes", static_cast<double>(cpu::packedBytesTotal()));
  result.Set("arenaBytes", static_cast<double>(counters.arenaBytes));
  result.Set("deviceBytes", static_cast<double>(counters.deviceBytes));
  result.Set("tensors", static_cast<double>(counters.tensors));
  result.Set("programs", static_cast<double>(counters.programs));
  return result;
}

Napi::Value work(const Napi::CallbackInfo& call) {
  const EmulatedWork work = emulatedWork();
  Napi::Object result = Napi::Object::New(call.Env());
  result.Set("launches", static_cast<double>(work.launches));
  result.Set("prefetches", static_cast<double>(work.prefetches));
  result.Set("uploads", static_cast<double>(work.uploads));
  result.Set("uploadedBytes", static_cast<double>(work.uploadedBytes));
  result.Set("downloads", static_cast<double>(work.downloads));
  result.Set("depth", static_cast<double>(work.depth));
  return result;
}

Napi::Value stopAll(const Napi::CallbackInfo& call) {
  stopEngines(call.Env());
  return call.Env().Undefined();
}

}  // namespace

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData;
  env.SetInstanceData(data);
  env.AddCleanupHook([external = data->external] { external->open = false; });
  exports.Set("info", Napi::Function::New(env, info, "info"));
  exports.Set("setThreads", Napi::Function::New(env, setThreads, "setThreads"));
  exports.Set("opNames", Napi::Function::New(env, opNames, "opNames"));
  exports.Set("opSignatures", Napi::Function::New(env, opSignatures, "opSignatures"));
  exports.Set("opAttributes", Napi::Function::New(env, opAttributes, "opAttributes"));
  exports.Set("memory", Napi::Function::New(env, memory, "memory"));
  exports.Set("emulatedWork", Napi::Function::New(env, work, "emulatedWork"));
  exports.Set("stopEngines", Napi::Function::New(env, stopAll, "stopEngines"));
  initTensors(env, exports);
  initPrograms(env, exports);
  initEngines(env, exports);
  return exports;
}

}  // namespace elastiform::addon

static Napi::Object initModule(Napi::Env env, Napi::Object exports) { return elastiform::addon::init(env, exports); }
NODE_API_MODULE(elastiform, initModule)
