// How a random number becomes a token, for the kernels of every device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ELASTIFORM_SAMPLE __host__ __device__ __forceinline__
#else
#define ELASTIFORM_SAMPLE inline
#endif

namespace elastiform {

// Mixes 32 bits, one to one: the finalizer "lowbias32" of Chris Wellons.
ELASTIFORM_SAMPLE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// A race of exponential variates (Gumbel-max): of tokens with weights w, the one of the largest w / e wins, and wins with
// probability w / sum w. A token's variate e depends on the random number and the token alone, so that two distributions
// often give the same token for one random number: with a probability of at least (1 - d) / (1 + d), d being their total
// variation distance (Daliri, Musco, Suresh, arXiv 2408.07978).
struct Race {
  uint32_t noise;
  int32_t winner = -1;
  double score = 0;

  // uBits: the random number's, an f32 in [0, 1).
  ELASTIFORM_SAMPLE explicit Race(uint32_t uBits) : noise(mixed(uBits)) {}

  // Tokens come in ascending order: of equal scores the lowest wins. A weight of 0 never does.
  ELASTIFORM_SAMPLE void enter(float weight, int32_t token) {
    const uint32_t bits = mixed(noise + static_cast<uint32_t>(token) * 0x9e3779b9u);
    // Most are out without a logarithm: e = -log(1 - v) is more than v.
    if (weight < 0.99f * static_cast<float>(score) * (static_cast<float>(bits) * 0x1p-32f)) return;
    const double own = weight / -log(1 - (bits + 0.5) * 0x1p-32);
    if (own > score) {
      score = own;
      winner = token;
    }
  }
};

}  // namespace elastiform
