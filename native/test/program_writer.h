// Writes encoded programs, valid or not, for tests and for the fuzz target.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/memory.h"
#include "runtime/engine.h"
#include "runtime/program.h"

namespace elastiform::test {

// Feeds, dims and steps are written in the order of the calls; indices count from 0.
class ProgramWriter {
 public:
  int dim(DimKind kind, int value) {
    dims_.insert(dims_.end(), {static_cast<int32_t>(kind), value});
    return static_cast<int>(dims_.size() / 2) - 1;
  }
  int constant(int value) { return dim(DimKind::Const, value); }

  int tensor(TensorKind kind, DType dtype, std::vector<int> dims) {
    tensors_.insert(tensors_.end(),
                    {static_cast<int32_t>(kind), static_cast<int32_t>(dtype), static_cast<int32_t>(dims.size())});
    dims.resize(kMaxRank, -1);
    tensors_.insert(tensors_.end(), dims.begin(), dims.end());
    return static_cast<int>(tensors_.size() / 7) - 1;
  }
  int temp(std::vector<int> dims) { return tensor(TensorKind::Temp, DType::F32, std::move(dims)); }
  int feed(std::vector<int> dims) { return tensor(TensorKind::Feed, DType::F32, std::move(dims)); }
  int feedIds(std::vector<int> dims) { return tensor(TensorKind::Feed, DType::I32, std::move(dims)); }
  int output(std::vector<int> dims) { return tensor(TensorKind::Output, DType::F32, std::move(dims)); }
  int bound(const std::shared_ptr<Tensor>& tensor, std::vector<int> dims) {
    bound_.push_back(tensor);
    return this->tensor(TensorKind::Bound, tensor->dtype, std::move(dims));
  }
  // A bound tensor with constant dims of its own, filled with a fixed pattern.
  int bound(DType dtype, std::vector<int64_t> shape, bool writable = false) {
    std::vector<int> dims;
    for (const int64_t extent : shape) dims.push_back(constant(static_cast<int>(extent)));
    return bound(makeTensor(dtype, shape, writable), std::move(dims));
  }

  void step(const std::string& op, std::vector<int> in, std::vector<int> out, std::vector<double> attributes = {},
            int tag = 0) {
    size_t index = 0;
    while (index < opNames_.size() && opNames_[index] != op) ++index;
    if (index == opNames_.size()) opNames_.push_back(op);
    for (const size_t value : {index, static_cast<size_t>(tag), in.size(), out.size(), attributes.size(),
                               attributes_.size()}) {
      steps_.push_back(static_cast<int32_t>(value));
    }
    steps_.insert(steps_.end(), in.begin(), in.end());
    steps_.insert(steps_.end(), out.begin(), out.end());
    attributes_.insert(attributes_.end(), attributes.begin(), attributes.end());
    ++stepCount_;
  }
  void tags(int count) { tags_ = count; }

  std::vector<int32_t> code() const {
    std::vector<int32_t> code{kProgramMagic,
                              kProgramVersion,
                              static_cast<int32_t>(dims_.size() / 2),
                              static_cast<int32_t>(tensors_.size() / 7),
                              stepCount_,
                              tags_};
    for (const auto* part : {&dims_, &tensors_, &steps_}) code.insert(code.end(), part->begin(), part->end());
    return code;
  }
  const std::vector<double>& attributes() const { return attributes_; }
  const std::vector<std::string>& opNames() const { return opNames_; }
  const std::vector<std::shared_ptr<Tensor>>& boundTensors() const { return bound_; }

  std::shared_ptr<const Program> build(KernelTable kernels, KernelOfStepsTable several) const {
    const std::vector<int32_t> encoded = code();
    return buildProgram({encoded.data(), encoded.size(), attributes_.data(), attributes_.size(), opNames_, bound_},
                        kernels, several);
  }

  static std::shared_ptr<Tensor> makeTensor(DType dtype, const std::vector<int64_t>& shape, bool writable = false) {
    auto tensor = std::make_shared<Tensor>();
    tensor->dtype = tensor->packAs = dtype;
    tensor->rank = static_cast<int>(shape.size());
    int64_t elements = 1;
    for (int d = tensor->rank - 1; d >= 0; --d) {
      tensor->shape[d] = shape[d];
      tensor->strides[d] = elements;
      elements *= shape[d];
    }
    tensor->storage = heapStorage(static_cast<size_t>(elements) * dtypeSize(dtype), writable);
    for (int64_t i = 0; i < elements; ++i) {
      const float value = static_cast<float>(std::sin(0.7 * static_cast<double>(i + 1)));
      const uint16_t half = dtype == DType::F16 ? floatToF16(value) : floatToBf16(value);
      if (dtype == DType::F32) std::memcpy(tensor->storage->data + 4 * i, &value, 4);
      if (dtypeSize(dtype) == 2) std::memcpy(tensor->storage->data + 2 * i, &half, 2);
    }
    return tensor;
  }

 private:
  std::vector<int32_t> dims_, tensors_, steps_;
  int32_t stepCount_ = 0, tags_ = 1;
  std::vector<double> attributes_;
  std::vector<std::string> opNames_;
  std::vector<std::shared_ptr<Tensor>> bound_;
};

}  // namespace elastiform::test
