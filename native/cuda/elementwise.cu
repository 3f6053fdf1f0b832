// Elementwise ops: zeros, sums, scaling, activations and gated activations with their gradients.
#include "cuda/activation.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

// y = f(x...). y may be an operand's memory: every thread reads its elements before it writes them.
template <typename F, typename... Operands>
__global__ void __launch_bounds__(kThreads, 6) mapKernel(F f, Operand y, Operands... x) {
  forElements(y.elements(), startsAligned(y, x...), [&]<typename V>(int64_t i) {
    store(y, i, each(f, load<V>(x, i)...));
  });
}

__global__ void __launch_bounds__(kThreads, 8) clearKernel(Operand y, StepState state) {
  if (state.faulted()) return;
  forElements(y.elements(), startsAligned(y), [&]<typename V>(int64_t i) { stGlobal(y.f32() + i, V{}); });
}

__global__ void __launch_bounds__(kThreads, 8) copyKernel(Operand x, Operand y, StepState state) {
  if (state.faulted()) return;
  forElements(y.elements(), startsAligned(x, y), [&]<typename V>(int64_t i) { store(y, i, load<V>(x, i)); });
}

__global__ void __launch_bounds__(kThreads, 8) scaleKernel(Operand x, Operand s, Operand y, double factor) {
  const float total = static_cast<float>(s ? factor * ldGlobal(s.f32()) : factor);
  forElements(y.elements(), startsAligned(x, y), [&]<typename V>(int64_t i) {
    store(y, i, each([&](float v) { return v * total; }, load<V>(x, i)));
  });
}

// dg may be dy's memory.
template <Act act>
__global__ void __launch_bounds__(kThreads, 4)
    gatedGradKernel(Operand dy, Operand g, Operand u, Operand dg, Operand du) {
  forElements(dg.elements(), startsAligned(dy, g, u, dg, du), [&]<typename V>(int64_t i) {
    const V d = load<V>(dy, i), a = load<V>(g, i), b = load<V>(u, i);
    store(dg, i, each([](float d, float a, float b) { return d * b * activateGrad<act>(a); }, d, a, b));
    store(du, i, each([](float d, float a) { return d * activate<act>(a); }, d, a));
  });
}

template <Act act>
struct Activation {
  DEVICE float operator()(float x) const { return activate<act>(x); }
};
template <Act act>
struct ActivationGrad {
  DEVICE float operator()(float dy, float x) const { return dy * activateGrad<act>(x); }
};
template <Act act>
struct GatedActivation {
  DEVICE float operator()(float g, float u) const { return activate<act>(g) * u; }
};

struct Softcap {
  float cap;
  DEVICE float operator()(float x) const { return cap * tanhf(x / cap); }
};
struct SoftcapGrad {
  float cap;
  DEVICE float operator()(float dy, float x) const {
    const float t = tanhf(x / cap);
    return dy * fmaf(-t, t, 1.f);
  }
};

unsigned blocksFor(const Launch& launch) { return launch.blocks(launch.out[0].boundElements(), 4 * kThreads); }

// Output 0 = f(x...).
template <typename F, typename... Operands>
void map(const Launch& launch, F f, const Operands&... x) {
  LAUNCH((mapKernel<F, Operands...>), blocksFor(launch), kThreads, 0, launch.stream, f, launch.out[0], x...);
}

}  // namespace

void clear(const Launch& launch, const Operand& y) {
  LAUNCH(clearKernel, launch.blocks(y.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, y, launch.state);
}

void copy(const Launch& launch, const Operand& x, const Operand& y) {
  if (x.data == y.data) return;
  LAUNCH(copyKernel, launch.blocks(y.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, x, y, launch.state);
}

void zeros(const Launch& launch) { clear(launch, launch.out[0]); }

void add(const Launch& launch) { map(launch, Sum{}, launch.in[0], launch.in[1]); }

void scale(const Launch& launch) {
  const double factor = launch.finiteAttribute(0, "factor");
  LAUNCH(scaleKernel, blocksFor(launch), kThreads, 0, launch.stream, launch.in[0], launch.in[1], launch.out[0], factor);
}

void activation(const Launch& launch) {
  withAct(actAttribute(launch), [&]<Act act>() { map(launch, Activation<act>{}, launch.in[0]); });
}

void activationGrad(const Launch& launch) {
  withAct(actAttribute(launch), [&]<Act act>() { map(launch, ActivationGrad<act>{}, launch.in[0], launch.in[1]); });
}

void softcap(const Launch& launch) {
  map(launch, Softcap{checkedPositive("softcap", "cap", launch.attr[0])}, launch.in[0]);
}

void softcapGrad(const Launch& launch) {
  map(launch, SoftcapGrad{checkedPositive("softcap_grad", "cap", launch.attr[0])}, launch.in[0], launch.in[1]);
}

void gatedActivation(const Launch& launch) {
  withAct(actAttribute(launch), [&]<Act act>() { map(launch, GatedActivation<act>{}, launch.in[0], launch.in[1]); });
}

void gatedActivationGrad(const Launch& launch) {
  withAct(actAttribute(launch), [&]<Act act>() {
    LAUNCH(gatedGradKernel<act>, blocksFor(launch), kThreads, 0, launch.stream, launch.in[0], launch.in[1],
           launch.in[2], launch.out[0], launch.out[1]);
  });
}

}  // namespace elastiform::ELASTIFORM_DEVICE
