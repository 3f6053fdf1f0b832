// Choosing the next token of every segment from its logits.
#include <bit>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"
#include "ops/sample.h"

namespace elastiform::cpu {

namespace {

struct Candidate {
  float weight;
  int32_t index;
};

// A strict order: heavier first, then lower index.
bool before(const Candidate& a, const Candidate& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.index < b.index);
}

struct SampleParams {
  float temperature;
  int64_t topK;
  double topP;
  float u;
};

SampleParams checkedParams(const float* params, int64_t segment, int64_t vocabulary) {
  const auto check = [&](bool valid, int i, const char* name, const char* range) {
    if (!valid) {
      fail(ErrorCode::InvalidData, "[sample] params[%lld] %s must be %s, got %g", static_cast<long long>(segment), name,
           range, static_cast<double>(params[i]));
    }
  };
  check(params[0] >= 0 && std::isfinite(params[0]), 0, "temperature", "finite and not negative");
  check(params[1] >= 0 && params[1] == std::floor(params[1]) && std::isfinite(params[1]), 1, "top-k",
        "a whole number, 0 for off");
  check(params[2] >= 0 && params[2] <= 1, 2, "top-p", "in [0, 1]");
  check(params[3] >= 0 && params[3] < 1, 3, "u", "in [0, 1)");
  const int64_t topK = params[1] == 0 || params[1] >= static_cast<float>(vocabulary) ? vocabulary
                                                                                     : static_cast<int64_t>(params[1]);
  return {params[0], topK, params[2], params[3]};
}

// The last candidate, in `before` order, of the smallest set that top-k and then top-p keep. `candidates` is reordered.
Candidate lastKept(Candidate* candidates, int64_t count, int64_t topK, double topP) {
  if (topK < count) std::nth_element(candidates, candidates + (topK - 1), candidates + count, before);
  double total = 0;
  for (int64_t i = 0; i < topK; ++i) total += candidates[i].weight;
  // Sort only as many of the heaviest as hold the wanted mass: usually few.
  double mass = 0;
  for (int64_t sorted = 0, size = 64; topP < 1 && sorted < topK; size *= 8) {
    const int64_t end = std::min(topK, sorted + size);
    if (end < topK) std::nth_element(candidates + sorted, candidates + (end - 1), candidates + topK, before);
    std::sort(candidates + sorted, candidates + end, before);
    for (; sorted < end; ++sorted) {
      mass += candidates[sorted].weight;
      if (mass >= topP * total) return candidates[sorted];
    }
  }
  Candidate last = candidates[0];
  for (int64_t i = 1; i < topK; ++i) {
    if (before(last, candidates[i])) last = candidates[i];
  }
  return last;
}

}  // namespace

void sample(const KernelArgs& args) {
  const float* logits = args.in[0].f32();
  const float* params = args.in[1].f32();
  const int64_t segments = args.in[0].dim(0), vocabulary = args.in[0].dim(1);
  int32_t* ids = args.out[0].i32();
  float* logprob = args.out[1].f32();
  if (vocabulary < 1) fail(ErrorCode::InvalidProgram, "[sample] logits must have at least one column, got none");
  const VectorOps& vector = vectorOps();
  const int64_t workers = segments > 1 ? threadCount() : 1;
  float* allWeights = args.scratch<float>(workers * vocabulary);
  Candidate* allCandidates = args.scratch<Candidate>(workers * vocabulary);
  const auto sampleRow = [&](int64_t s, int worker) {
    float* weights = allWeights + worker * vocabulary;
    Candidate* candidates = allCandidates + worker * vocabulary;
    const float* row = logits + s * vocabulary;
    const SampleParams p = checkedParams(params + s * 4, s, vocabulary);
    bool hasNaN = false;
    const float largest = vector.maximum(row, vocabulary, &hasNaN);
    if (hasNaN || !std::isfinite(largest)) {
      fail(ErrorCode::InvalidData, "[sample] logits of row %lld must hold no NaN and have a finite maximum, got %s",
           static_cast<long long>(s), hasNaN ? "NaN" : largest > 0 ? "+inf" : "-inf");
    }
    int64_t id = 0;
    if (p.temperature == 0) {
      while (row[id] != largest) ++id;
    } else {
      const float factor = std::min(1.0f / p.temperature, 3e38f);
      vector.expSum(row, largest, factor, weights, vocabulary);
      Candidate last{-1, 0};  // everything comes before it
      if (p.topK < vocabulary || p.topP < 1) {
        for (int64_t i = 0; i < vocabulary; ++i) candidates[i] = {weights[i], static_cast<int32_t>(i)};
        last = lastKept(candidates, vocabulary, p.topK, p.topP);
      }
      Race race(std::bit_cast<uint32_t>(p.u));
      for (int32_t i = 0; i < vocabulary; ++i) {
        if (!before(last, {weights[i], i})) race.enter(weights[i], i);
      }
      id = race.winner;
    }
    ids[s] = static_cast<int32_t>(id);
    const double sum = vector.expSum(row, largest, 1.0f, nullptr, vocabulary);
    logprob[s] = static_cast<float>(static_cast<double>(row[id]) - largest - std::log(sum));
  };
  forChunks(segments, rowsPerChunk(vocabulary), args, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t s = begin; s < end; ++s) sampleRow(s, worker);
  });
}

}  // namespace elastiform::cpu
