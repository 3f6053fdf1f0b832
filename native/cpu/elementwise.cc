// Elementwise ops: zeros, sums, scaling, activations and gated activations with their gradients.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

constexpr int64_t kActs = 5;

int actAttribute(const KernelArgs& args, const char* op) {
  return static_cast<int>(intAttribute(args, op, 0, "act", 0, kActs - 1));
}

float capAttribute(const KernelArgs& args, const char* op) { return checkedPositive(op, "cap", args.attr[0]); }

}  // namespace

void zeros(const KernelArgs& args) {
  float* y = args.out[0].f32();
  forChunks(args.out[0].elements(), kParallelElements * 4, args, [&](int64_t begin, int64_t end, int) {
    std::memset(y + begin, 0, (end - begin) * sizeof(float));
  });
}

void add(const KernelArgs& args) {
  const float *a = args.in[0].f32(), *b = args.in[1].f32();
  float* y = args.out[0].f32();
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements, args, [&](int64_t begin, int64_t end, int) {
    vector.add(a + begin, b + begin, y + begin, end - begin);
  });
}

void scale(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  float* y = args.out[0].f32();
  const double factor = finiteAttribute(args, "scale", 0, "factor");
  const float total = static_cast<float>(args.in[1] ? factor * args.in[1].f32()[0] : factor);
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements, args, [&](int64_t begin, int64_t end, int) {
    vector.scale(x + begin, total, y + begin, end - begin);
  });
}

void activation(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  float* y = args.out[0].f32();
  const int act = actAttribute(args, "activation");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.activation(act, x + begin, y + begin, end - begin);
  });
}

void activationGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32();
  float* dx = args.out[0].f32();
  const int act = actAttribute(args, "activation_grad");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.activationGrad(act, dy + begin, x + begin, dx + begin, end - begin);
  });
}

void softcap(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  float* y = args.out[0].f32();
  const float cap = capAttribute(args, "softcap");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.softcap(cap, x + begin, y + begin, end - begin);
  });
}

void softcapGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32();
  float* dx = args.out[0].f32();
  const float cap = capAttribute(args, "softcap_grad");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.softcapGrad(cap, dy + begin, x + begin, dx + begin, end - begin);
  });
}

void gatedActivation(const KernelArgs& args) {
  const float *g = args.in[0].f32(), *u = args.in[1].f32();
  float* y = args.out[0].f32();
  const int act = actAttribute(args, "gated_activation");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.gatedActivation(act, g + begin, u + begin, y + begin, end - begin);
  });
}

void gatedActivationGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *g = args.in[1].f32(), *u = args.in[2].f32();
  float *dg = args.out[0].f32(), *du = args.out[1].f32();
  const int act = actAttribute(args, "gated_activation_grad");
  const VectorOps& vector = vectorOps();
  forChunks(args.out[0].elements(), kParallelElements / 2, args, [&](int64_t begin, int64_t end, int) {
    vector.gatedActivationGrad(act, dy + begin, g + begin, u + begin, dg + begin, du + begin, end - begin);
  });
}

}  // namespace elastiform::cpu
