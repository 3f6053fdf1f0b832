// Activation functions and their derivatives, as docs/ops.md numbers them, and the way from an attribute to a template.
#pragma once

#include <cmath>

#include "cpu/act.h"
#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

using cpu::Act;

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// sigmoid(x) and its derivative without cancellation at either end.
DEVICE void sigmoidAndSlope(float x, float& value, float& slope) {
  const float e = expf(-fabsf(x)), inverse = 1.f / (1.f + e);
  slope = e * inverse * inverse;
  value = x < 0.f ? e * inverse : inverse;
}

// 2 sqrt(2/pi) (x + 0.044715 x^3): gelu in its tanh form is x * sigmoid of this.
DEVICE float geluTanhArgument(float x) { return x * fmaf(0.0713548162726f, x * x, 1.59576912161f); }

// Gelu and silu of minus infinity are NaN (0 times infinity).
template <Act act>
DEVICE float activate(float x) {
  if constexpr (act == Act::GeluTanh) return x * sigmoid(geluTanhArgument(x));
  if constexpr (act == Act::GeluErf) return 0.5f * x * (1.f + erff(x * 0.707106781187f));
  if constexpr (act == Act::Silu) return x * sigmoid(x);
  if constexpr (act == Act::Relu) return x < 0.f ? 0.f : x;
  return x;
}

// d act / dx. Arguments are clamped, NaN kept, where the derivative is 0 or 1 to the last bit.
template <Act act>
DEVICE float activateGrad(float x) {
  const float above = x < -128.f ? -128.f : x, c = above > 128.f ? 128.f : above;
  if constexpr (act == Act::GeluTanh) {
    float value, slope;
    sigmoidAndSlope(geluTanhArgument(c), value, slope);
    return fmaf(c * fmaf(3.f * 0.0713548162726f, c * c, 1.59576912161f), slope, value);
  }
  if constexpr (act == Act::GeluErf) {
    const float cdf = fmaf(0.5f, erff(c * 0.707106781187f), 0.5f);
    return fmaf(c * 0.398942280401f, expf(-0.5f * c * c), cdf);
  }
  if constexpr (act == Act::Silu) {
    float value, slope;
    sigmoidAndSlope(c, value, slope);
    return fmaf(c, slope, value);
  }
  if constexpr (act == Act::Relu) return x > 0.f ? 1.f : x != x ? x : 0.f;
  return 1.f;
}

inline Act actAttribute(const Launch& launch, int i = 0) {
  return static_cast<Act>(launch.intAttribute(i, "act", 0, static_cast<int>(Act::Relu)));
}

// Calls body.template operator()<act>() for the run-time value of act, on the host.
template <typename Body>
void withAct(Act act, const Body& body) {
  switch (act) {
    case Act::None: return body.template operator()<Act::None>();
    case Act::GeluTanh: return body.template operator()<Act::GeluTanh>();
    case Act::GeluErf: return body.template operator()<Act::GeluErf>();
    case Act::Silu: return body.template operator()<Act::Silu>();
    case Act::Relu: return body.template operator()<Act::Relu>();
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
