// Op signatures parsed from the language documented in ops/op.h.
#pragma once

#include <string>
#include <vector>

#include "ops/op.h"

namespace elastiform {

struct DimPattern {
  char letter = 0;       // 0: the constant `value`
  char otherwise = 0;    // the letter meant when the operand that introduces `letter` is absent
  bool prefix = false;   // "A<"
  bool produced = false; // "+A"
  int64_t value = 0;
};

struct OperandPattern {
  enum class Type { F32, I32, Weight };
  std::string name;
  bool optional = false;
  bool writable = false;
  Type type = Type::F32;
  int narrowGroup = 0;  // of OpDef::narrow, from 1; 0: never narrow
  char wholeShape = 0;  // the letter of "*X"
  std::vector<DimPattern> dims;
};

struct Signature {
  std::vector<OperandPattern> inputs, outputs;
  int producedDims = 0;

  // Input that introduces `letter` (the first with it as a plain dim), or -1.
  int introducer(char letter) const;
};

// Throws Error(Internal) where the text is not a signature: the registry itself is wrong then.
Signature parseSignature(const char* text);

// Signature of opDefs()[op], parsed once.
const Signature& signatureOf(int op);

}  // namespace elastiform
