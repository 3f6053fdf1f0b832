// Validation of an encoded program against the op signatures, and the plan of its memory.
//
// Nothing a program says is believed: kernels rely on dtypes, ranks, equal dims, writability and the order of writes
// and reads exactly as their signature states them, so every one of these is checked here, once.
#include "runtime/program.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "runtime/signature.h"

namespace elastiform {
namespace {

constexpr int64_t kMaxArenaBytes = int64_t{1} << 44;
constexpr size_t kMostJoined = 64;  // steps

template <typename... Args>
[[noreturn]] void reject(const char* format, Args... args) {
  fail(ErrorCode::InvalidProgram, format, args...);
}

const char* kindName(TensorKind kind) {
  switch (kind) {
    case TensorKind::Temp: return "a temporary";
    case TensorKind::Bound: return "a bound tensor";
    case TensorKind::Feed: return "a feed";
    case TensorKind::Output: return "an output";
  }
  return "?";
}

bool isContiguous(const Tensor& tensor) {
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

class Builder {
 public:
  Builder(const ProgramSource& source, KernelTable kernels, KernelOfStepsTable several)
      : source_(source), kernels_(kernels), several_(several), program_(std::make_shared<Program>()) {}

  std::shared_ptr<const Program> build() {
    if (next("magic") != kProgramMagic) reject("[Program] the code does not start with the magic number");
    const int32_t version = next("version");
    if (version != kProgramVersion) reject("[Program] version must be %d, got %d", kProgramVersion, version);
    const int32_t dims = count("dims"), tensors = count("tensors"), steps = count("steps");
    program_->tags = count("tags");
    readOps();
    readDims(dims);
    readTensors(tensors);
    written_.assign(program_->tensors.size(), false);
    dimKnown_.assign(program_->dims.size(), true);
    for (size_t i = 0; i < program_->dims.size(); ++i) {
      if (program_->dims[i].kind == DimKind::Produced) dimKnown_[i] = false;
    }
    for (step_ = 0; step_ < steps; ++step_) readStep();
    if (at_ != source_.codeLength) {
      reject("[Program] %zu values follow the last step", source_.codeLength - at_);
    }
    for (const int output : program_->outputs) {
      if (!written_[output]) reject("[Program] output tensor %d is never written", output);
    }
    if (source_.narrow) narrowTemporaries();
    joinSteps();
    plan();
    listTensorsOfDims();
    listWritableUses();
    return program_;
  }

 private:
  int32_t next(const char* what) {
    if (at_ >= source_.codeLength) reject("[Program] the code ends where %s should be", what);
    return source_.code[at_++];
  }
  int32_t count(const char* what) {
    const int32_t value = next(what);
    if (value < 0 || value > kMaxProgramEntries) {
      reject("[Program] the number of %s must be in [0, %d], got %d", what, kMaxProgramEntries, value);
    }
    return value;
  }

  void readOps() {
    for (const std::string& name : source_.opNames) {
      const int op = findOp(name);
      if (op < 0) reject("[Program] unknown op \"%.64s\"", name.c_str());
      ops_.push_back(op);
    }
  }

  void readDims(int32_t dims) {
    for (int32_t i = 0; i < dims; ++i) {
      const int32_t kind = next("a dim"), value = next("a dim");
      if (kind < 0 || kind > 2) reject("[Program] dim %d: kind must be in [0, 2], got %d", i, kind);
      if (value < 1) reject("[Program] dim %d: value must be at least 1, got %d", i, value);
      program_->dims.push_back({static_cast<DimKind>(kind), value});
    }
  }

  void readTensors(int32_t tensors) {
    for (int32_t i = 0; i < tensors; ++i) {
      const int32_t kind = next("a tensor"), dtype = next("a tensor"), rank = next("a tensor");
      if (kind < 0 || kind > 3) reject("[Program] tensor %d: kind must be in [0, 3], got %d", i, kind);
      if (dtype < 0 || dtype >= kDTypeCount) {
        reject("[Program] tensor %d: dtype must be in [0, %d], got %d", i, kDTypeCount - 1, dtype);
      }
      if (rank < 1 || rank > kMaxRank) {
        reject("[Program] tensor %d: rank must be in [1, %d], got %d", i, kMaxRank, rank);
      }
      TensorDef tensor{static_cast<TensorKind>(kind), static_cast<DType>(dtype), rank, {}};
      int64_t elements = 1;
      for (int d = 0; d < kMaxRank; ++d) {
        const int32_t dim = next("a tensor");
        const bool valid = d < rank ? dim >= 0 && dim < static_cast<int32_t>(program_->dims.size()) : dim == -1;
        if (!valid) reject("[Program] tensor %d: dim %d is no dim of the program", i, dim);
        tensor.dims[d] = dim;
        if (d >= rank) continue;
        const int64_t bound = program_->dims[dim].bound;
        if (elements > kMaxTensorElements / bound) {
          reject("[Program] tensor %d may hold more than %lld elements", i, static_cast<long long>(kMaxTensorElements));
        }
        elements *= bound;
      }
      tensor.boundBytes = elements * static_cast<int64_t>(dtypeSize(tensor.dtype));
      if (tensor.kind == TensorKind::Bound) bind(i, tensor);
      if (tensor.kind == TensorKind::Feed) {
        for (int d = 0; d < rank; ++d) {
          if (program_->dims[tensor.dims[d]].kind == DimKind::Produced) {
            reject("[Program] tensor %d: a feed cannot have a dim that an op produces", i);
          }
        }
        tensor.slot = static_cast<int>(program_->feeds.size());
        program_->feeds.push_back(i);
      }
      if (tensor.kind == TensorKind::Output) {
        tensor.slot = static_cast<int>(program_->outputs.size());
        program_->outputs.push_back(i);
      }
      program_->tensors.push_back(tensor);
    }
    if (program_->bound.size() != source_.tensors.size()) {
      reject("[Program] %zu bound tensors wanted, got %zu", program_->bound.size(), source_.tensors.size());
    }
  }

  void bind(int32_t index, TensorDef& tensor) {
    const size_t slot = program_->bound.size();
    if (slot >= source_.tensors.size()) {
      reject("[Program] tensor %d: only %zu bound tensors were given", index, source_.tensors.size());
    }
    const std::shared_ptr<Tensor>& bound = source_.tensors[slot];
    if (bound->dtype != tensor.dtype) {
      reject("[Program] tensor %d: dtype must be %s as bound, got %s", index, dtypeName(bound->dtype),
             dtypeName(tensor.dtype));
    }
    if (bound->rank != tensor.rank) {
      reject("[Program] tensor %d: rank must be %d as bound, got %d", index, bound->rank, tensor.rank);
    }
    for (int d = 0; d < tensor.rank; ++d) {
      const Dim& dim = program_->dims[tensor.dims[d]];
      if (dim.kind != DimKind::Const || dim.bound != bound->shape[d]) {
        reject("[Program] tensor %d: dim %d must be the constant %lld as bound, got %lld", index, d,
               static_cast<long long>(bound->shape[d]), static_cast<long long>(dim.bound));
      }
    }
    tensor.slot = static_cast<int>(slot);
    program_->bound.push_back(bound);
  }

  // Prefix of every message about the step being read.
  std::string where() const {
    return "[Program] step " + std::to_string(step_) + " (" + opDefs()[current_.op].name + "): ";
  }
  template <typename... Args>
  [[noreturn]] void rejectStep(const char* format, Args... args) const {
    reject((where() + format).c_str(), args...);
  }

  void readStep() {
    const int32_t opIndex = next("a step");
    if (opIndex < 0 || opIndex >= static_cast<int32_t>(ops_.size())) {
      reject("[Program] step %d: op must be in [0, %zu), got %d", step_, ops_.size(), opIndex);
    }
    current_ = Step{};
    current_.op = ops_[opIndex];
    const OpDef& def = opDefs()[current_.op];
    const Signature& signature = signatureOf(current_.op);
    current_.kernel = kernels_(def.name);
    current_.several = several_(def.name);
    current_.tag = next("a step");
    if (current_.tag < 0 || current_.tag >= program_->tags) {
      rejectStep("tag must be in [0, %d), got %d", program_->tags, current_.tag);
    }
    readCount("inputs", signature.inputs.size());
    readCount("outputs", signature.outputs.size());
    readCount("attributes", def.attributes.size());
    readAttributes(def);
    readOperands(signature.inputs, current_.in);
    readOperands(signature.outputs, current_.out);
    checkInputs(signature);
    checkOutputs(signature);
    unify(signature);
    for (const int tensor : current_.out) {
      if (tensor >= 0) written_[tensor] = true;
    }
    for (const int dim : current_.produced) dimKnown_[dim] = true;
    program_->steps.push_back(current_);
  }

  void readCount(const char* what, size_t wanted) {
    const int32_t value = next("a step");
    if (value != static_cast<int32_t>(wanted)) rejectStep("%zu %s wanted, got %d", wanted, what, value);
  }

  void readAttributes(const OpDef& def) {
    const int32_t start = next("a step");
    if (start < 0 || static_cast<size_t>(start) + def.attributes.size() > source_.attributeCount) {
      rejectStep("attributes %d.. lie outside the %zu given", start, source_.attributeCount);
    }
    for (size_t i = 0; i < def.attributes.size(); ++i) {
      const double value = source_.attributes[start + i];
      if (std::isnan(value)) rejectStep("attribute %s is NaN", def.attributes[i]);
      current_.attributes.push_back(value);
    }
  }

  void readOperands(const std::vector<OperandPattern>& patterns, std::vector<int>& tensors) {
    for (const OperandPattern& pattern : patterns) {
      const int32_t tensor = next("a step");
      if (tensor < -1 || tensor >= static_cast<int32_t>(program_->tensors.size())) {
        rejectStep("%s must be a tensor in [0, %zu) or -1, got %d", pattern.name.c_str(), program_->tensors.size(),
                   tensor);
      }
      if (tensor == -1 && !pattern.optional) rejectStep("%s is missing", pattern.name.c_str());
      tensors.push_back(tensor);
      if (tensor >= 0) checkType(pattern, program_->tensors[tensor]);
    }
  }

  void checkType(const OperandPattern& pattern, const TensorDef& tensor) const {
    using Type = OperandPattern::Type;
    const bool matches = pattern.type == Type::I32   ? tensor.dtype == DType::I32
                         : pattern.type == Type::F32 ? tensor.dtype == DType::F32
                                                     : tensor.dtype != DType::I32;
    if (!matches) {
      rejectStep("%s must be %s, got %s", pattern.name.c_str(),
                 pattern.type == Type::I32   ? "i32"
                 : pattern.type == Type::F32 ? "f32"
                                             : "f32, bf16 or f16",
                 dtypeName(tensor.dtype));
    }
    if (!pattern.wholeShape && static_cast<int>(pattern.dims.size()) != tensor.rank) {
      rejectStep("%s must have rank %zu, got %d", pattern.name.c_str(), pattern.dims.size(), tensor.rank);
    }
  }

  void checkInputs(const Signature& signature) const {
    for (size_t i = 0; i < current_.in.size(); ++i) {
      const int index = current_.in[i];
      if (index < 0) continue;
      const OperandPattern& pattern = signature.inputs[i];
      const TensorDef& tensor = program_->tensors[index];
      const char* name = pattern.name.c_str();
      if ((tensor.kind == TensorKind::Temp || tensor.kind == TensorKind::Output) && !written_[index]) {
        rejectStep("%s (tensor %d) is read before it is written", name, index);
      }
      if (tensor.kind != TensorKind::Bound) {
        if (pattern.writable) rejectStep("%s must be a state tensor, got %s", name, kindName(tensor.kind));
        continue;
      }
      const Tensor& bound = *program_->bound[tensor.slot];
      if (pattern.writable && !bound.storage->writable) rejectStep("%s is written to and must be writable", name);
      if (pattern.type != OperandPattern::Type::Weight && !isContiguous(bound)) {
        rejectStep("%s must be contiguous", name);
      }
    }
  }

  void checkOutputs(const Signature& signature) {
    for (size_t i = 0; i < current_.out.size(); ++i) {
      const int index = current_.out[i];
      if (index < 0) continue;
      const char* name = signature.outputs[i].name.c_str();
      const TensorDef& tensor = program_->tensors[index];
      if (tensor.kind != TensorKind::Temp && tensor.kind != TensorKind::Output) {
        rejectStep("%s must be a temporary or an output, got %s", name, kindName(tensor.kind));
      }
      const bool twice = std::find(current_.out.begin(), current_.out.begin() + static_cast<ptrdiff_t>(i), index) !=
                         current_.out.begin() + static_cast<ptrdiff_t>(i);
      if (written_[index] || twice) rejectStep("%s (tensor %d) is written twice", name, index);
      for (size_t d = 0; d < signature.outputs[i].dims.size(); ++d) {
        if (signature.outputs[i].dims[d].produced) produce(name, tensor.dims[d]);
      }
    }
    for (size_t i = 0; i < current_.out.size(); ++i) {
      if (current_.out[i] < 0) continue;
      const TensorDef& tensor = program_->tensors[current_.out[i]];
      for (int d = 0; d < tensor.rank; ++d) {
        const bool mine = !signature.outputs[i].wholeShape && signature.outputs[i].dims[d].produced;
        if (!mine && !dimKnown_[tensor.dims[d]]) {
          rejectStep("%s has dim %d before an op has produced it", signature.outputs[i].name.c_str(), tensor.dims[d]);
        }
      }
    }
  }

  void produce(const char* name, int dim) {
    if (program_->dims[dim].kind != DimKind::Produced) {
      rejectStep("dim %d of %s must be of the kind that an op produces", dim, name);
    }
    const bool again = std::find(current_.produced.begin(), current_.produced.end(), dim) != current_.produced.end();
    if (dimKnown_[dim] || again) rejectStep("dim %d of %s is produced twice", dim, name);
    current_.produced.push_back(dim);
  }

  bool same(int a, int b) const {
    const Dim &x = program_->dims[a], &y = program_->dims[b];
    return a == b || (x.kind == DimKind::Const && y.kind == DimKind::Const && x.bound == y.bound);
  }
  std::string describe(int dim) const {
    const Dim& d = program_->dims[dim];
    return d.kind == DimKind::Const ? std::to_string(d.bound)
                                    : "dim " + std::to_string(dim) + " (at most " + std::to_string(d.bound) + ")";
  }

  // Calls visit(pattern, tensor) for every operand that is present, inputs first.
  template <typename Visit>
  void forOperands(const Signature& signature, const Visit& visit) const {
    for (size_t i = 0; i < current_.in.size(); ++i) {
      if (current_.in[i] >= 0) visit(signature.inputs[i], program_->tensors[current_.in[i]]);
    }
    for (size_t i = 0; i < current_.out.size(); ++i) {
      if (current_.out[i] >= 0) visit(signature.outputs[i], program_->tensors[current_.out[i]]);
    }
  }

  // Gives every letter one dim, or says which operands disagree.
  void unify(const Signature& signature) const {
    std::map<char, int> dims;                       // letter -> dim
    std::map<char, const TensorDef*> wholeShapes;   // *X -> the first tensor with it
    forOperands(signature, [&](const OperandPattern& pattern, const TensorDef& tensor) {
      const char* name = pattern.name.c_str();
      if (pattern.wholeShape) {
        const TensorDef* first = wholeShapes.emplace(pattern.wholeShape, &tensor).first->second;
        bool equal = first->rank == tensor.rank;
        for (int d = 0; equal && d < tensor.rank; ++d) equal = same(first->dims[d], tensor.dims[d]);
        if (!equal) rejectStep("%s must have the shape of the other operands", name);
        return;
      }
      for (size_t d = 0; d < pattern.dims.size(); ++d) {
        const DimPattern& wanted = pattern.dims[d];
        const int dim = tensor.dims[d];
        if (!wanted.letter) {
          if (program_->dims[dim].kind != DimKind::Const || program_->dims[dim].bound != wanted.value) {
            rejectStep("%s[%zu] must be %lld, got %s", name, d, static_cast<long long>(wanted.value),
                       describe(dim).c_str());
          }
        } else if (!wanted.prefix) {
          const char letter = effective(signature, wanted);
          const auto [found, fresh] = dims.emplace(letter, dim);
          if (!fresh && !same(found->second, dim)) {
            rejectStep("%s[%zu] must be %c = %s, got %s", name, d, letter, describe(found->second).c_str(),
                       describe(dim).c_str());
          }
        }
      }
    });
    forOperands(signature, [&](const OperandPattern& pattern, const TensorDef& tensor) {
      for (size_t d = 0; d < pattern.dims.size(); ++d) {
        const DimPattern& wanted = pattern.dims[d];
        if (!wanted.prefix) continue;
        const auto found = dims.find(wanted.letter);
        if (found == dims.end()) rejectStep("nothing says how much of %s is used", pattern.name.c_str());
        const Dim& extent = program_->dims[tensor.dims[d]];
        const bool fits = found->second == tensor.dims[d] ||
                          (extent.kind == DimKind::Const && program_->dims[found->second].bound <= extent.bound);
        if (!fits) {
          rejectStep("%s[%zu] must be at least %c = %s, got %s", pattern.name.c_str(), d, wanted.letter,
                     describe(found->second).c_str(), describe(tensor.dims[d]).c_str());
        }
      }
    });
  }

  char effective(const Signature& signature, const DimPattern& dim) const {
    if (!dim.otherwise) return dim.letter;
    const int introducer = signature.introducer(dim.letter);
    return introducer >= 0 && current_.in[introducer] >= 0 ? dim.letter : dim.otherwise;
  }

  // Makes every f32 temporary bf16 whose ops all may have it so, by groups: the largest such set, found by taking out
  // what may not be until nothing changes.
  void narrowTemporaries() {
    std::vector<bool> narrow(program_->tensors.size());
    for (size_t t = 0; t < narrow.size(); ++t) {
      narrow[t] = program_->tensors[t].kind == TensorKind::Temp && program_->tensors[t].dtype == DType::F32;
    }
    for (bool changed = true; changed;) {
      changed = false;
      for (const Step& step : program_->steps) {
        const Signature& signature = signatureOf(step.op);
        std::map<int, bool> groups;  // whether all of a group are narrow; group 0 may not be
        groups[0] = false;
        const auto visit = [&](const auto& body) {
          for (size_t i = 0; i < step.in.size(); ++i) {
            if (step.in[i] >= 0) body(signature.inputs[i].narrowGroup, step.in[i]);
          }
          for (size_t i = 0; i < step.out.size(); ++i) {
            if (step.out[i] >= 0) body(signature.outputs[i].narrowGroup, step.out[i]);
          }
        };
        visit([&](int group, int tensor) {
          const bool all = groups.emplace(group, true).first->second;
          groups[group] = all && narrow[tensor];
        });
        visit([&](int group, int tensor) {
          if (!narrow[tensor] || groups[group]) return;
          narrow[tensor] = false;
          changed = true;
        });
      }
    }
    for (size_t t = 0; t < narrow.size(); ++t) {
      if (!narrow[t]) continue;
      TensorDef& tensor = program_->tensors[t];
      tensor.dtype = DType::BF16;
      tensor.boundBytes /= 2;
      program_->narrow = true;
    }
  }

  // Finds neighbouring steps that are run as one.
  void joinSteps() {
    std::vector<Step>& steps = program_->steps;
    for (size_t begin = 0, end; begin < steps.size(); begin = end) {
      end = begin + 1;
      if (!steps[begin].several) continue;
      const int operand = opDefs()[steps[begin].op].inplace;
      const auto joins = [&](const Step& step) {
        if (step.op != steps[begin].op) return false;
        if (operand >= 0 && step.in[operand] != steps[end - 1].out[0]) return false;
        for (size_t i = 0; i < step.in.size(); ++i) {
          if (step.in[i] < 0 || static_cast<int>(i) == operand) continue;
          for (size_t s = begin; s < end; ++s) {
            if (std::count(steps[s].out.begin(), steps[s].out.end(), step.in[i]) > 0) return false;
          }
        }
        return true;
      };
      while (end < steps.size() && end - begin < kMostJoined && joins(steps[end])) ++end;
      steps[begin].count = static_cast<int>(end - begin);
    }
  }

  // Gives every temporary its place in the arena. Temporaries that take over each other's memory share one lifetime. What
  // steps that are run as one read and write is there from the first of them to the last.
  void plan() {
    const size_t tensors = program_->tensors.size();
    std::vector<int> first(tensors, -1), last(tensors, -1);
    std::vector<int> from(program_->steps.size()), to(program_->steps.size());  // of the steps run with each
    for (size_t s = 0; s < program_->steps.size(); s = static_cast<size_t>(to[s]) + 1) {
      const int end = static_cast<int>(s) + program_->steps[s].count;
      for (int i = static_cast<int>(s); i < end; ++i) {
        from[i] = static_cast<int>(s);
        to[i] = end - 1;
      }
    }
    for (size_t s = 0; s < program_->steps.size(); ++s) {
      for (const int t : program_->steps[s].in) {
        if (t >= 0) last[t] = static_cast<int>(s);
      }
      for (const int t : program_->steps[s].out) {
        if (t >= 0) first[t] = last[t] = static_cast<int>(s);
      }
    }
    std::vector<int> group(tensors, -1);
    std::vector<Lifetime> lifetimes;
    for (size_t s = 0; s < program_->steps.size(); ++s) {
      const Step& step = program_->steps[s];
      const int donor = takenOver(step, static_cast<int>(s), last);
      for (size_t i = 0; i < step.out.size(); ++i) {
        const int t = step.out[i];
        if (t < 0 || program_->tensors[t].kind != TensorKind::Temp) continue;
        if (i == 0 && donor >= 0) {
          group[t] = group[donor];
          lifetimes[group[t]].last = to[last[t]];
        } else {
          group[t] = static_cast<int>(lifetimes.size());
          lifetimes.push_back({program_->tensors[t].boundBytes, from[first[t]], to[last[t]]});
        }
      }
    }
    const MemoryPlan plan = planMemory(lifetimes, kMaxArenaBytes);
    for (size_t t = 0; t < tensors; ++t) {
      if (group[t] >= 0) program_->tensors[t].arenaOffset = plan.offsets[group[t]];
    }
    program_->arenaBytes = plan.bytes;
  }

  // The temporary whose memory output 0 of the step takes over, or -1. It must be read here for the last time and by
  // this operand only, and agree in dtype and shape.
  int takenOver(const Step& step, int index, const std::vector<int>& last) const {
    const int operand = opDefs()[step.op].inplace;
    if (operand < 0 || step.out[0] < 0 || step.in[operand] < 0) return -1;
    const int from = step.in[operand];
    const TensorDef &a = program_->tensors[from], &b = program_->tensors[step.out[0]];
    if (a.kind != TensorKind::Temp || b.kind != TensorKind::Temp || last[from] != index) return -1;
    if (std::count(step.in.begin(), step.in.end(), from) != 1) return -1;
    if (a.dtype != b.dtype || a.rank != b.rank) return -1;
    for (int d = 0; d < a.rank; ++d) {
      if (!same(a.dims[d], b.dims[d])) return -1;
    }
    return from;
  }

  void listTensorsOfDims() {
    program_->tensorsOfDim.resize(program_->dims.size());
    for (size_t t = 0; t < program_->tensors.size(); ++t) {
      const TensorDef& tensor = program_->tensors[t];
      for (int d = 0; d < tensor.rank; ++d) {
        std::vector<int>& list = program_->tensorsOfDim[tensor.dims[d]];
        const bool listed = !list.empty() && list.back() == static_cast<int>(t);
        if (program_->dims[tensor.dims[d]].kind == DimKind::Produced && !listed) list.push_back(static_cast<int>(t));
      }
    }
  }

  void listWritableUses() {
    std::map<Storage*, bool> uses;
    for (const auto& tensor : program_->bound) {
      if (tensor->storage->writable) uses.emplace(tensor->storage.get(), false);
    }
    for (const Step& step : program_->steps) {
      const Signature& signature = signatureOf(step.op);
      for (size_t i = 0; i < step.in.size(); ++i) {
        if (step.in[i] < 0 || !signature.inputs[i].writable) continue;
        uses[program_->bound[program_->tensors[step.in[i]].slot]->storage.get()] = true;
      }
    }
    for (const auto& [storage, written] : uses) program_->writableUses.push_back({storage, written});
  }

  const ProgramSource& source_;
  const KernelTable kernels_;
  const KernelOfStepsTable several_;
  const std::shared_ptr<Program> program_;
  size_t at_ = 0;
  std::vector<int> ops_;         // opNames -> index into opDefs()
  std::vector<bool> written_;    // temps and outputs written by the steps read so far
  std::vector<bool> dimKnown_;   // every dim but the produced ones not yet produced
  int32_t step_ = 0;
  Step current_;
};

}  // namespace

std::shared_ptr<const Program> buildProgram(const ProgramSource& source, KernelTable kernels, KernelOfStepsTable several) {
  return Builder(source, kernels, several).build();
}

}  // namespace elastiform
