// JavaScript class Engine: jobs go to a native thread, results come back through one thread-safe function.
#include "runtime/engine.h"

#include <algorithm>
#include <iterator>
#include <unordered_map>

#include "addon/addon.h"

namespace elastiform::addon {

// What an engine is to one environment. Shared by the JavaScript object, the thread-safe function and the cleanup hook;
// all but `done` runs on the JavaScript thread.
class EngineState : public std::enable_shared_from_this<EngineState> {
 public:
  static std::shared_ptr<EngineState> start(Napi::Env env, DeviceKind kind) {
    auto device = makeDevice(kind, addonData(env).external->owned);
    auto state = std::make_shared<EngineState>();
    state->env_ = env;
    auto* owner = new std::shared_ptr<EngineState>(state);  // until the thread-safe function is finalized
    napi_value name = Napi::String::New(env, "elastiform engine");
    const napi_status status = napi_create_threadsafe_function(
        env, nullptr, nullptr, name, 0, 1, owner,
        [](napi_env, void* data, void*) { delete static_cast<std::shared_ptr<EngineState>*>(data); }, state.get(),
        deliver, &state->callback_);
    if (status != napi_ok) {
      delete owner;
      fail(ErrorCode::Internal, "[Engine] napi_create_threadsafe_function failed with status %d", status);
    }
    napi_unref_threadsafe_function(env, state->callback_);
    state->engine_ = std::make_unique<Engine>(
        [callback = state->callback_](std::shared_ptr<Job> job) {
          auto* carried = new std::shared_ptr<Job>(std::move(job));
          if (napi_call_threadsafe_function(callback, carried, napi_tsfn_nonblocking) != napi_ok) delete carried;
        },
        std::move(device));
    // After the thread-safe function: hooks run last in, first out, and its own would close it under the thread.
    napi_add_env_cleanup_hook(env, onTeardown, state.get());
    addonData(env).engines.insert(state);
    return state;
  }

  // `owner`, the JavaScript object of the engine, stays alive while runs are pending.
  Napi::Value run(Napi::Object owner, std::shared_ptr<Job> job) {
    if (!engine_) fail(ErrorCode::Disposed, "[Engine] used after dispose()");
    const Napi::Env env = env_;
    napi_deferred deferred;
    napi_value promise;
    if (napi_create_promise(env, &deferred, &promise) != napi_ok) throw Napi::Error::New(env);
    engine_->submit(job);
    pending_.emplace(job.get(), Pending{deferred, ++runs_, job});
    if (pending_.size() == 1) {
      napi_ref_threadsafe_function(env, callback_);
      owner_ = Napi::Persistent(owner);
    }
    Napi::Object handle = Napi::Object::New(env);
    handle.Set("promise", Napi::Value(env, promise));
    handle.Set("id", static_cast<double>(runs_));
    return handle;
  }

  // A number and not a function that is made for every run: most are never aborted.
  void abort(double id) {
    for (const auto& [_, run] : pending_) {
      if (static_cast<double>(run.id) != id) continue;
      if (const auto job = run.job.lock()) engine_->abort(job);
      return;
    }
  }

  // Aborts what runs and joins the thread. `settle`: JavaScript goes on, so pending promises must reject.
  void stop(bool settle) {
    if (!engine_) return;
    const auto self = shared_from_this();
    engine_->stop();
    engine_.reset();
    napi_remove_env_cleanup_hook(env_, onTeardown, this);
    addonData(env_).engines.erase(self);
    const auto pending = std::move(pending_);
    pending_.clear();
    owner_.Reset();
    napi_release_threadsafe_function(callback_, napi_tsfn_release);
    if (!settle) return;
    const Napi::HandleScope scope(env_);
    for (const auto& [_, run] : pending) {
      const Error error(ErrorCode::Disposed, "[Engine] disposed while a run was pending");
      napi_reject_deferred(env_, run.deferred, makeError(env_, error).Value());
    }
    addonData(env_).external->sync(env_);
  }

 private:
  static void onTeardown(void* data) { static_cast<EngineState*>(data)->stop(false); }

  // Runs on the JavaScript thread; without an environment when that is being torn down.
  static void deliver(napi_env env, napi_value, void* context, void* data) {
    const std::unique_ptr<std::shared_ptr<Job>> job(static_cast<std::shared_ptr<Job>*>(data));
    if (!env) return;
    const auto state = static_cast<EngineState*>(context)->shared_from_this();
    const auto found = state->pending_.find(job->get());
    if (found == state->pending_.end()) return;  // rejected by stop()
    const napi_deferred deferred = found->second.deferred;
    state->pending_.erase(found);
    if (state->pending_.empty()) {
      napi_unref_threadsafe_function(env, state->callback_);
      state->owner_.Reset();
    }
    // Where the environment can run no more JavaScript every call fails, and there is nobody left to tell.
    try {
      const Napi::HandleScope scope(env);
      addonData(env).external->sync(env);
      try {
        if ((*job)->error) throw makeError(env, *(*job)->error);
        napi_resolve_deferred(env, deferred, result(env, **job));
      } catch (const Napi::Error& error) {
        napi_reject_deferred(env, deferred, error.Value());
      }
    } catch (const std::exception&) {
    }
  }

  static Napi::Value result(Napi::Env env, const Job& job) {
    const Program& program = *job.program;
    Napi::Array outputs = Napi::Array::New(env, program.outputs.size());
    for (size_t i = 0; i < program.outputs.size(); ++i) {
      const int tensor = program.outputs[i];
      outputs.Set(static_cast<uint32_t>(i),
                  copyToTypedArray(env, program.tensors[tensor].dtype, job.outputs[i].data(),
                                   static_cast<size_t>(job.elements(tensor))));
    }
    Napi::Int32Array dims = Napi::Int32Array::New(env, job.dims.size());
    for (size_t i = 0; i < job.dims.size(); ++i) dims[i] = static_cast<int32_t>(job.dims[i]);
    Napi::Float64Array counters = Napi::Float64Array::New(env, job.counters.size() * 2);
    for (size_t i = 0; i < job.counters.size(); ++i) {
      counters[2 * i] = job.counters[i].flops;
      counters[2 * i + 1] = job.counters[i].rows;
    }
    Napi::Object object = Napi::Object::New(env);
    object.Set("outputs", outputs);
    object.Set("dims", dims);
    object.Set("counters", counters);
    object.Set("ms", job.milliseconds);
    object.Set("hostMs", job.hostMilliseconds);
    object.Set("deviceMs", job.deviceMilliseconds);
    return object;
  }

  Napi::Env env_{nullptr};
  napi_threadsafe_function callback_ = nullptr;
  std::unique_ptr<Engine> engine_;
  struct Pending {
    napi_deferred deferred;
    uint64_t id;
    std::weak_ptr<Job> job;
  };
  std::unordered_map<Job*, Pending> pending_;
  uint64_t runs_ = 0;
  Napi::ObjectReference owner_;
};

namespace {

class EngineObject : public Napi::ObjectWrap<EngineObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Engine",
                       {InstanceMethod<&EngineObject::run>("run"), InstanceMethod<&EngineObject::abort>("abort"),
                        InstanceMethod<&EngineObject::dispose>("dispose")});
  }

  explicit EngineObject(const Napi::CallbackInfo& call) : ObjectWrap(call) {
    guarded(call.Env(), [&] {
      const std::string name = stringArgument(call[0], "[Engine] device");
      const auto found = std::find(std::begin(kDeviceNames), std::end(kDeviceNames), name);
      if (found == std::end(kDeviceNames)) {
        fail(ErrorCode::InvalidArgument, "[Engine] device must be cpu, cuda or simt, got %s", name.c_str());
      }
      state_ = EngineState::start(call.Env(), static_cast<DeviceKind>(found - std::begin(kDeviceNames)));
    });
  }

  // A forgotten engine ends with its object.
  ~EngineObject() override {
    if (state_) state_->stop(false);
  }

 private:
  Napi::Value run(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      auto program = programArgument(call[0], "[Engine.run] program");
      const TypedData dims = typedArrayArgument(call[1], DType::I32, "[Engine.run] dims");
      if (!call[2].IsArray()) fail(ErrorCode::InvalidArgument, "[Engine.run] feeds must be an array");
      const auto feeds = call[2].As<Napi::Array>();
      if (feeds.Length() != program->feeds.size()) {
        fail(ErrorCode::InvalidArgument, "[Engine.run] %zu feeds wanted, got %u", program->feeds.size(),
             feeds.Length());
      }
      auto job = std::make_shared<Job>(program, static_cast<const int32_t*>(dims.data), dims.elements);
      for (uint32_t i = 0; i < feeds.Length(); ++i) {
        const DType dtype = program->tensors[program->feeds[i]].dtype;
        const std::string what = "[Engine.run] feed " + std::to_string(i);
        const TypedData feed = typedArrayArgument(feeds.Get(i), dtype, what.c_str());
        job->setFeed(i, dtype, feed.data, feed.elements);
      }
      return state_->run(call.This().As<Napi::Object>(), std::move(job));
    });
  }

  Napi::Value abort(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      if (!call[0].IsNumber()) fail(ErrorCode::InvalidArgument, "[Engine.abort] id must be a number");
      state_->abort(call[0].As<Napi::Number>().DoubleValue());
      return call.Env().Undefined();
    });
  }

  Napi::Value dispose(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      state_->stop(true);
      return call.Env().Undefined();
    });
  }

  std::shared_ptr<EngineState> state_;
};

}  // namespace

void stopEngines(Napi::Env env) {
  const auto engines = addonData(env).engines;
  for (const auto& engine : engines) engine->stop(false);
}

void initEngines(Napi::Env env, Napi::Object exports) {
  const Napi::Function engine = EngineObject::define(env);
  addonData(env).engine = Napi::Persistent(engine);
  exports.Set("Engine", engine);
}

}  // namespace elastiform::addon
