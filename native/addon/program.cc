// JavaScript class Program.
#include "addon/addon.h"
#include "core/memory.h"
#include "cpu/kernels.h"

namespace elastiform::addon {
namespace {

constexpr napi_type_tag kProgramTag{0x656c617374690003, 0x70726f6772616d00};

class ProgramObject : public Napi::ObjectWrap<ProgramObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Program",
                       {InstanceAccessor<&ProgramObject::arenaBytes>("arenaBytes"),
                        InstanceMethod<&ProgramObject::dispose>("dispose")});
  }

  explicit ProgramObject(const Napi::CallbackInfo& call) : ObjectWrap(call) {
    guarded(call.Env(), [&] {
      ProgramSource source;
      const TypedData code = typedArrayArgument(call[0], DType::I32, "[Program] code");
      source.code = static_cast<const int32_t*>(code.data);
      source.codeLength = code.elements;
      const Napi::TypedArray attributes = anyTypedArray(call[1], "[Program] attributes");
      if (attributes.TypedArrayType() != napi_float64_array) {
        fail(ErrorCode::InvalidArgument, "[Program] attributes must be a Float64Array");
      }
      source.attributes = static_cast<const double*>(typedArrayData(attributes));
      source.attributeCount = attributes.ElementLength();
      if (!call[2].IsArray() || !call[3].IsArray()) {
        fail(ErrorCode::InvalidArgument, "[Program] opNames and tensors must be arrays");
      }
      const auto names = call[2].As<Napi::Array>(), tensors = call[3].As<Napi::Array>();
      for (uint32_t i = 0; i < names.Length(); ++i) {
        source.opNames.push_back(stringArgument(names.Get(i), "[Program] an entry of opNames"));
      }
      for (uint32_t i = 0; i < tensors.Length(); ++i) {
        source.tensors.push_back(tensorArgument(tensors.Get(i), "[Program] an entry of tensors"));
      }
      source.narrow = call[4].ToBoolean();
      program_ = buildProgram(source, cpu::findKernel, cpu::findKernelOfSteps);
      external_ = addonData(call.Env()).external;
      ++memoryCounters().programs;
      call.This().As<Napi::Object>().TypeTag(&kProgramTag);
    });
  }

  void Finalize(Napi::BasicEnv env) override { release(env); }

  static std::shared_ptr<const Program> programOf(const Napi::Value& value, const char* what) {
    if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kProgramTag)) {
      fail(ErrorCode::InvalidArgument, "%s must be a Program", what);
    }
    return Unwrap(value.As<Napi::Object>())->alive();
  }

 private:
  const std::shared_ptr<const Program>& alive() const {
    if (!program_) fail(ErrorCode::Disposed, "[Program] used after dispose()");
    return program_;
  }

  void release(Napi::BasicEnv env) {
    if (!program_) return;
    program_.reset();
    --memoryCounters().programs;
    external_->sync(env);
  }

  Napi::Value arenaBytes(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] { return Napi::Number::New(call.Env(), static_cast<double>(alive()->arenaBytes)); });
  }

  Napi::Value dispose(const Napi::CallbackInfo& call) {
    release(call.Env());
    return call.Env().Undefined();
  }

  std::shared_ptr<const Program> program_;
  std::shared_ptr<ExternalMemory> external_;
};

}  // namespace

std::shared_ptr<const Program> programArgument(const Napi::Value& value, const char* what) {
  return ProgramObject::programOf(value, what);
}

void initPrograms(Napi::Env env, Napi::Object exports) {
  const Napi::Function program = ProgramObject::define(env);
  addonData(env).program = Napi::Persistent(program);
  exports.Set("Program", program);
}

}  // namespace elastiform::addon
