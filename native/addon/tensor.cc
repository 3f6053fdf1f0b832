// JavaScript classes Mapping and Tensor.
#include <algorithm>
#include <cstring>

#include "addon/addon.h"
#include "core/memory.h"
#include "io/mapping.h"

namespace elastiform::addon {
namespace {

constexpr napi_type_tag kMappingTag{0x656c617374690001, 0x6d617070696e6700};
constexpr napi_type_tag kTensorTag{0x656c617374690002, 0x74656e736f720000};

struct Layout {
  std::vector<int64_t> shape, strides;
  int64_t elements = 1;
  int64_t span = 0;  // elements from the first to one past the last, 0 when there are none
};

// Checks that every index the layout can make stays below 2^46 elements, so that nothing here overflows.
Layout makeLayout(std::vector<int64_t> shape, std::vector<int64_t> strides, const char* what) {
  constexpr int64_t kMost = int64_t{1} << 46;
  Layout layout;
  layout.shape = std::move(shape);
  for (const int64_t extent : layout.shape) {
    if (extent > 0 && layout.elements > kMost / extent) {
      fail(ErrorCode::InvalidArgument, "[%s] the shape holds more than 2^46 elements", what);
    }
    layout.elements *= extent;
  }
  if (strides.empty()) {
    strides.resize(layout.shape.size());
    int64_t stride = 1;
    for (size_t i = strides.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= std::max<int64_t>(layout.shape[i], 1);
    }
  }
  layout.strides = std::move(strides);
  if (layout.elements == 0) return layout;
  layout.span = 1;
  for (size_t i = 0; i < layout.shape.size(); ++i) {
    const int64_t steps = layout.shape[i] - 1;
    if (steps > 0 && layout.strides[i] > (kMost - layout.span) / steps) {
      fail(ErrorCode::InvalidArgument, "[%s] the strides reach past 2^46 elements", what);
    }
    layout.span += steps * layout.strides[i];
  }
  return layout;
}

std::shared_ptr<Tensor> makeTensor(std::shared_ptr<Storage> storage, DType dtype, const Layout& layout,
                                   size_t byteOffset) {
  auto tensor = std::make_shared<Tensor>();
  tensor->storage = std::move(storage);
  tensor->dtype = tensor->packAs = dtype;
  tensor->rank = static_cast<int>(layout.shape.size());
  std::copy(layout.shape.begin(), layout.shape.end(), tensor->shape.begin());
  std::copy(layout.strides.begin(), layout.strides.end(), tensor->strides.begin());
  tensor->byteOffset = byteOffset;
  return tensor;
}

Layout layoutOf(const Tensor& tensor) {
  return makeLayout({tensor.shape.begin(), tensor.shape.begin() + tensor.rank},
                    {tensor.strides.begin(), tensor.strides.begin() + tensor.rank}, "Tensor");
}

int64_t requireContiguous(const Tensor& tensor, const char* what) {
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != stride) {
      fail(ErrorCode::InvalidArgument, "[%s] the tensor must be contiguous", what);
    }
    stride *= tensor.shape[i];
  }
  return stride;
}

class MappingObject : public Napi::ObjectWrap<MappingObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Mapping",
                       {InstanceAccessor<&MappingObject::byteLength>("byteLength"),
                        InstanceMethod<&MappingObject::read>("read"),
                        InstanceMethod<&MappingObject::dispose>("dispose")});
  }

  explicit MappingObject(const Napi::CallbackInfo& call) : ObjectWrap(call) {
    guarded(call.Env(), [&] {
      storage_ = mapFile(stringArgument(call[0], "[Mapping] path"));
      call.This().As<Napi::Object>().TypeTag(&kMappingTag);
    });
  }

  static std::shared_ptr<Storage> storageOf(const Napi::Value& value, const char* what) {
    if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kMappingTag)) {
      fail(ErrorCode::InvalidArgument, "%s must be a Mapping", what);
    }
    return Unwrap(value.As<Napi::Object>())->alive();
  }

 private:
  const std::shared_ptr<Storage>& alive() const {
    if (!storage_) fail(ErrorCode::Disposed, "[Mapping] used after dispose()");
    return storage_;
  }

  Napi::Value byteLength(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] { return Napi::Number::New(call.Env(), static_cast<double>(alive()->bytes)); });
  }

  Napi::Value read(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&]() -> Napi::Value {
      const auto bytes = static_cast<int64_t>(alive()->bytes);
      const int64_t offset = integerArgument(call[0], "[Mapping.read] offset", 0, bytes);
      const int64_t length = integerArgument(call[1], "[Mapping.read] length", 0, bytes - offset);
      Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(call.Env(), static_cast<size_t>(length));
      if (length > 0) std::memcpy(buffer.Data(), storage_->data + offset, static_cast<size_t>(length));
      return Napi::Uint8Array::New(call.Env(), static_cast<size_t>(length), buffer, 0);
    });
  }

  Napi::Value dispose(const Napi::CallbackInfo& call) {
    storage_.reset();
    return call.Env().Undefined();
  }

  std::shared_ptr<Storage> storage_;
};

class TensorObject : public Napi::ObjectWrap<TensorObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Tensor",
                       {StaticMethod<&TensorObject::alloc>("alloc"), StaticMethod<&TensorObject::fromData>("fromData"),
                        StaticMethod<&TensorObject::view>("view"), InstanceAccessor<&TensorObject::dtype>("dtype"),
                        InstanceAccessor<&TensorObject::shape>("shape"),
                        InstanceAccessor<&TensorObject::writable>("writable"),
                        InstanceAccessor<&TensorObject::disposed>("disposed"),
                        InstanceMethod<&TensorObject::slice>("slice"),
                        InstanceMethod<&TensorObject::part>("part"),
                        InstanceMethod<&TensorObject::setPackAs>("setPackAs"),
                        InstanceMethod<&TensorObject::read>("read"),
                        InstanceMethod<&TensorObject::readFloat>("readFloat"),
                        InstanceMethod<&TensorObject::write>("write"),
                        InstanceMethod<&TensorObject::dispose>("dispose")});
  }

  explicit TensorObject(const Napi::CallbackInfo& call) : ObjectWrap(call) {
    guarded(call.Env(), [&] {
      if (!call[0].IsExternal()) {
        fail(ErrorCode::InvalidArgument, "[Tensor] make tensors with alloc, fromData, view or slice");
      }
      tensor_ = *call[0].As<Napi::External<std::shared_ptr<Tensor>>>().Data();
      external_ = addonData(call.Env()).external;
      ++memoryCounters().tensors;
      call.This().As<Napi::Object>().TypeTag(&kTensorTag);
    });
  }

  void Finalize(Napi::BasicEnv env) override { release(env); }

  static std::shared_ptr<Tensor> tensorOf(const Napi::Value& value, const char* what) {
    if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTensorTag)) {
      fail(ErrorCode::InvalidArgument, "%s must be a Tensor", what);
    }
    return Unwrap(value.As<Napi::Object>())->alive();
  }

 private:
  static Napi::Value wrap(Napi::Env env, std::shared_ptr<Tensor> tensor) {
    return addonData(env).tensor.New({Napi::External<std::shared_ptr<Tensor>>::New(env, &tensor)});
  }

  const std::shared_ptr<Tensor>& alive() const {
    if (!tensor_) fail(ErrorCode::Disposed, "[Tensor] used after dispose()");
    return tensor_;
  }

  void release(Napi::BasicEnv env) {
    if (!tensor_) return;
    tensor_.reset();
    --memoryCounters().tensors;
    external_->sync(env);
  }

  static std::shared_ptr<Tensor> allocate(Napi::Env env, const Napi::CallbackInfo& call, bool writable,
                                          const char* what, const char* dtypeWhat, const char* shapeWhat) {
    const DType dtype = dtypeArgument(call[0], dtypeWhat);
    const Layout layout = makeLayout(integersArgument(call[1], shapeWhat, kMaxRank), {}, what);
    auto storage = heapStorage(static_cast<size_t>(layout.elements) * dtypeSize(dtype), writable,
                               addonData(env).external->owned);
    return makeTensor(std::move(storage), dtype, layout, 0);
  }

  static Napi::Value alloc(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      auto tensor = allocate(call.Env(), call, true, "Tensor.alloc", "[Tensor.alloc] dtype", "[Tensor.alloc] shape");
      addonData(call.Env()).external->sync(call.Env());
      return wrap(call.Env(), std::move(tensor));
    });
  }

  static Napi::Value fromData(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      auto tensor = allocate(call.Env(), call, false, "Tensor.fromData", "[Tensor.fromData] dtype",
                             "[Tensor.fromData] shape");
      const TypedData from = typedArrayArgument(call[2], tensor->dtype, "[Tensor.fromData] data");
      copyIn(*tensor, from, "Tensor.fromData");
      addonData(call.Env()).external->sync(call.Env());
      return wrap(call.Env(), std::move(tensor));
    });
  }

  static void copyIn(Tensor& tensor, const TypedData& from, const char* what) {
    const int64_t wanted = layoutOf(tensor).elements;
    if (static_cast<int64_t>(from.elements) != wanted) {
      fail(ErrorCode::InvalidArgument, "[%s] data must hold %lld elements, got %zu", what,
           static_cast<long long>(wanted), from.elements);
    }
    if (wanted > 0) std::memcpy(tensor.data(), from.data, from.elements * dtypeSize(tensor.dtype));
  }

  static Napi::Value view(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      auto storage = MappingObject::storageOf(call[0], "[Tensor.view] mapping");
      const auto bytes = static_cast<int64_t>(storage->bytes);
      const int64_t offset = integerArgument(call[1], "[Tensor.view] byteOffset", 0, bytes);
      const DType dtype = dtypeArgument(call[2], "[Tensor.view] dtype");
      const auto size = static_cast<int64_t>(dtypeSize(dtype));
      const Layout layout =
          makeLayout(integersArgument(call[3], "[Tensor.view] shape", kMaxRank), {}, "Tensor.view");
      if (offset % size != 0) {
        fail(ErrorCode::InvalidArgument, "[Tensor.view] byteOffset must be a multiple of %lld, got %lld",
             static_cast<long long>(size), static_cast<long long>(offset));
      }
      if (layout.elements > (bytes - offset) / size) {
        fail(ErrorCode::InvalidArgument,
             "[Tensor.view] %lld elements of %s from byte %lld on do not fit in the %lld bytes mapped",
             static_cast<long long>(layout.elements), dtypeName(dtype), static_cast<long long>(offset),
             static_cast<long long>(bytes));
      }
      return wrap(call.Env(), makeTensor(std::move(storage), dtype, layout, static_cast<size_t>(offset)));
    });
  }

  Napi::Value dtype(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] { return Napi::String::New(call.Env(), dtypeName(alive()->dtype)); });
  }

  Napi::Value shape(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      const Tensor& tensor = *alive();
      Napi::Array result = Napi::Array::New(call.Env(), static_cast<size_t>(tensor.rank));
      for (uint32_t i = 0; i < static_cast<uint32_t>(tensor.rank); ++i) {
        result.Set(i, static_cast<double>(tensor.shape[i]));
      }
      return result;
    });
  }

  Napi::Value writable(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] { return Napi::Boolean::New(call.Env(), alive()->storage->writable); });
  }

  Napi::Value disposed(const Napi::CallbackInfo& call) { return Napi::Boolean::New(call.Env(), !tensor_); }

  Napi::Value slice(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      const Tensor& from = *alive();
      const int64_t span = layoutOf(from).span;
      const int64_t offset = integerArgument(call[0], "[Tensor.slice] elementOffset", 0, span);
      std::vector<int64_t> extents = integersArgument(call[1], "[Tensor.slice] shape", kMaxRank), strides;
      if (!call[2].IsUndefined()) {
        strides = integersArgument(call[2], "[Tensor.slice] strides", kMaxRank);
        if (strides.size() != extents.size()) {
          fail(ErrorCode::InvalidArgument, "[Tensor.slice] strides must have %zu entries, got %zu", extents.size(),
               strides.size());
        }
      }
      const Layout layout = makeLayout(std::move(extents), std::move(strides), "Tensor.slice");
      if (layout.span > span - offset) {
        fail(ErrorCode::InvalidArgument, "[Tensor.slice] elements %lld to %lld reach past the tensor's %lld",
             static_cast<long long>(offset), static_cast<long long>(offset + layout.span),
             static_cast<long long>(span));
      }
      auto tensor = makeTensor(from.storage, from.dtype, layout,
                               from.byteOffset + static_cast<size_t>(offset) * dtypeSize(from.dtype));
      tensor->packAs = from.packAs;
      return wrap(call.Env(), std::move(tensor));
    });
  }

  Napi::Value part(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      const Tensor& from = *alive();
      const int64_t axis = integerArgument(call[0], "[Tensor.part] axis", 0, from.rank - 1);
      const int64_t extent = from.shape[axis];
      const int64_t count = integerArgument(call[2], "[Tensor.part] count", 1, std::max<int64_t>(extent, 1));
      const int64_t index = integerArgument(call[1], "[Tensor.part] index", 0, count - 1);
      if (extent % count != 0) {
        fail(ErrorCode::InvalidArgument, "[Tensor.part] %lld parts must divide axis %lld of size %lld",
             static_cast<long long>(count), static_cast<long long>(axis), static_cast<long long>(extent));
      }
      Layout whole = layoutOf(from);
      whole.shape[axis] = extent / count;
      const Layout layout = makeLayout(std::move(whole.shape), std::move(whole.strides), "Tensor.part");
      const auto offset = static_cast<size_t>(index * layout.shape[axis] * layout.strides[axis]);
      auto tensor = makeTensor(from.storage, from.dtype, layout, from.byteOffset + offset * dtypeSize(from.dtype));
      tensor->whole = alive();
      tensor->partAxis = static_cast<int>(axis);
      tensor->partIndex = index;
      tensor->packAs = from.packAs;
      return wrap(call.Env(), std::move(tensor));
    });
  }

  Napi::Value setPackAs(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      Tensor& tensor = *alive();
      const DType wanted = dtypeArgument(call[0], "[Tensor.setPackAs] dtype");
      if (wanted == DType::I32 || tensor.dtype == DType::I32) {
        fail(ErrorCode::InvalidArgument, "[Tensor.setPackAs] only floating tensors are packed, as a floating dtype");
      }
      const std::lock_guard lock(tensor.packMutex);
      if (tensor.packed) fail(ErrorCode::InvalidArgument, "[Tensor.setPackAs] the tensor is already packed");
      tensor.packAs = wanted;
      return call.Env().Undefined();
    });
  }

  void requireReadable(const char* what) const {
    if (alive()->storage->pendingWriters > 0) {
      fail(ErrorCode::InvalidArgument, "[%s] a pending run writes to the tensor: await it first", what);
    }
  }

  Napi::Value read(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      const Tensor& tensor = *alive();
      requireReadable("Tensor.read");
      tensor.storage->readHost();
      const int64_t elements = requireContiguous(tensor, "Tensor.read");
      return copyToTypedArray(call.Env(), tensor.dtype, tensor.data(), static_cast<size_t>(elements));
    });
  }

  Napi::Value readFloat(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&]() -> Napi::Value {
      const Tensor& tensor = *alive();
      requireReadable("Tensor.readFloat");
      tensor.storage->readHost();
      if (tensor.dtype == DType::I32) {
        fail(ErrorCode::InvalidArgument, "[Tensor.readFloat] dtype must be f32, bf16 or f16, got i32");
      }
      const Layout layout = layoutOf(tensor);
      const auto elements = static_cast<size_t>(layout.elements);
      Napi::Float32Array result = Napi::Float32Array::New(call.Env(), elements);
      float* to = result.Data();
      std::array<int64_t, kMaxRank> index{};
      for (size_t i = 0; i < elements; ++i) {
        int64_t at = 0;
        for (int d = 0; d < tensor.rank; ++d) at += index[d] * tensor.strides[d];
        to[i] = loadAsFloat(tensor.data(), tensor.dtype, at);
        for (int d = tensor.rank - 1; d >= 0 && ++index[d] == tensor.shape[d]; --d) index[d] = 0;
      }
      return result;
    });
  }

  Napi::Value write(const Napi::CallbackInfo& call) {
    return guarded(call.Env(), [&] {
      Tensor& tensor = *alive();
      if (!tensor.storage->writable) fail(ErrorCode::InvalidArgument, "[Tensor.write] the tensor is read-only");
      requireContiguous(tensor, "Tensor.write");
      if (tensor.storage->pendingWriters + tensor.storage->pendingReaders > 0) {
        fail(ErrorCode::InvalidArgument, "[Tensor.write] a pending run uses the tensor: await it first");
      }
      tensor.storage->writeHost();
      copyIn(tensor, typedArrayArgument(call[0], tensor.dtype, "[Tensor.write] data"), "Tensor.write");
      return call.Env().Undefined();
    });
  }

  Napi::Value dispose(const Napi::CallbackInfo& call) {
    release(call.Env());
    return call.Env().Undefined();
  }

  std::shared_ptr<Tensor> tensor_;
  std::shared_ptr<ExternalMemory> external_;
};

}  // namespace

std::shared_ptr<Tensor> tensorArgument(const Napi::Value& value, const char* what) {
  return TensorObject::tensorOf(value, what);
}

void initTensors(Napi::Env env, Napi::Object exports) {
  AddonData& data = addonData(env);
  const Napi::Function mapping = MappingObject::define(env), tensor = TensorObject::define(env);
  data.mapping = Napi::Persistent(mapping);
  data.tensor = Napi::Persistent(tensor);
  exports.Set("Mapping", mapping);
  exports.Set("Tensor", tensor);
}

}  // namespace elastiform::addon
