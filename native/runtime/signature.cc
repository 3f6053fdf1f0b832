// Op signatures parsed from the language documented in ops/op.h.
#include "runtime/signature.h"

#include <cctype>
#include <cstring>
#include <sstream>

namespace elastiform {
namespace {

class Parser {
 public:
  explicit Parser(const char* text) : text_(text), at_(text) {}

  Signature parse() {
    Signature signature;
    for (skipSpaces(); !take("->"); skipSpaces()) signature.inputs.push_back(operand(false));
    for (skipSpaces(); *at_; skipSpaces()) signature.outputs.push_back(operand(true));
    for (const auto& output : signature.outputs) {
      for (const auto& dim : output.dims) signature.producedDims += dim.produced;
    }
    return signature;
  }

 private:
  [[noreturn]] void reject(const char* what) const {
    fail(ErrorCode::Internal, "[signature] %s at offset %d of \"%s\"", what, static_cast<int>(at_ - text_), text_);
  }
  void skipSpaces() {
    while (*at_ == ' ') ++at_;
  }
  bool take(const char* token) {
    const size_t length = std::strlen(token);
    if (std::strncmp(at_, token, length) != 0) return false;
    at_ += length;
    return true;
  }
  void expect(const char* token) {
    if (!take(token)) reject(token);
  }
  char letter() {
    if (!std::isupper(static_cast<unsigned char>(*at_))) reject("a dim letter expected");
    return *at_++;
  }

  OperandPattern operand(bool output) {
    OperandPattern result;
    while (std::islower(static_cast<unsigned char>(*at_)) || *at_ == '_') result.name += *at_++;
    if (result.name.empty()) reject("an operand name expected");
    result.optional = take("?");
    result.writable = take("!");
    expect(":");
    if (take("f32")) {
      result.type = OperandPattern::Type::F32;
    } else if (take("i32")) {
      result.type = OperandPattern::Type::I32;
    } else if (take("w")) {
      result.type = OperandPattern::Type::Weight;
    } else {
      reject("a dtype expected");
    }
    expect("[");
    if (take("*")) {
      result.wholeShape = letter();
      expect("]");
      return result;
    }
    do {
      if (result.dims.size() == kMaxRank) reject("more than four dims");
      result.dims.push_back(dim(output));
    } while (take(","));
    expect("]");
    return result;
  }

  DimPattern dim(bool output) {
    DimPattern result;
    if (std::isdigit(static_cast<unsigned char>(*at_))) {
      while (std::isdigit(static_cast<unsigned char>(*at_))) result.value = result.value * 10 + (*at_++ - '0');
      return result;
    }
    result.produced = take("+");
    if (result.produced && !output) reject("only outputs can produce dims");
    result.letter = letter();
    if (take("|")) result.otherwise = letter();
    result.prefix = take("<");
    return result;
  }

  const char* text_;
  const char* at_;
};

}  // namespace

int Signature::introducer(char letter) const {
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (const auto& dim : inputs[i].dims) {
      if (dim.letter == letter && !dim.otherwise && !dim.prefix) return static_cast<int>(i);
    }
  }
  return -1;
}

Signature parseSignature(const char* text) { return Parser(text).parse(); }

namespace {

void markNarrow(const char* groups, Signature& signature) {
  std::istringstream split(groups);
  std::string group;
  for (int number = 1; split >> group; ++number) {
    std::istringstream names(group);
    for (std::string name; std::getline(names, name, ',');) {
      OperandPattern* found = nullptr;
      for (auto* side : {&signature.inputs, &signature.outputs}) {
        for (OperandPattern& pattern : *side) {
          if (pattern.name == name && pattern.type == OperandPattern::Type::F32) found = &pattern;
        }
      }
      if (!found) fail(ErrorCode::Internal, "[signature] no f32 operand %s to be narrow", name.c_str());
      found->narrowGroup = number;
    }
  }
}

}  // namespace

const Signature& signatureOf(int op) {
  static const auto& signatures = *[] {
    auto* parsed = new std::vector<Signature>;
    for (const OpDef& def : opDefs()) {
      parsed->push_back(parseSignature(def.signature));
      markNarrow(def.narrow, parsed->back());
    }
    return parsed;
  }();
  return signatures[static_cast<size_t>(op)];
}

}  // namespace elastiform
