// Sampling of the next token: one block a row of logits.
//
// Weights are bit for bit those of the CPU's kernel, so that both order tokens alike. The mass that top-p keeps is a sum of
// integers, exact in any order: what is chosen depends on the logits alone.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "ops/sample.h"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kWarpsMax = 32;
constexpr int kFewThreads = 128;        // of a block for vocabularies up to
constexpr int64_t kFewWeights = 4096;
constexpr int kGroup = 128;  // weights a warp takes at a time: 16 bytes a lane
constexpr int kAhead = 4;      // loads of a thread under way
constexpr int kCopies = 8;   // of a histogram, by lane, so that lanes seldom meet
constexpr int64_t kVocabularyMax = int64_t{1} << 23;  // of kCopies sums of 12 bits in 32

// The smallest set that top-k and top-p keep: weights whose bits are above `floor`, and the first `ties` equal to it.
struct Kept {
  uint32_t floor;
  int ties;
};

struct Found {
  int digit;
  double before, goal;
};

struct SampleShared {
  // Sums of the lower and the upper 12 bits of mantissas, or counts, by digit; zero when not in use.
  uint32_t low[256][kCopies], high[256][kCopies];
  double mass[256];
  Found found;
  uint64_t tops[kWarpsMax];
  int ties[kWarpsMax];
  double partial[kWarpsMax];
};

// The CPU kernels' exponential (cpu/simd.h), step by step.
DEVICE float exponential(float x) {
  x = fminf(89.f, fmaxf(-104.f, x));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = fmaf(x, 1.44269504f, magic), n = shifted - magic;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float q = 1.381314237e-03f;
  q = fmaf(q, r, 8.369419044e-03f);
  q = fmaf(q, r, 4.166845683e-02f);
  q = fmaf(q, r, 1.666651479e-01f);
  q = fmaf(q, r, 4.999999305e-01f);
  const float p = fmaf(q, r * r, r) + 1.f;
  const int power = static_cast<int>(asUint(shifted)) - static_cast<int>(asUint(magic)), half = power >> 1;
  return p * asFloat(static_cast<uint32_t>(half + 127) << 23) *
         asFloat(static_cast<uint32_t>(power - half + 127) << 23);
}

// A weight is mantissaOf times 2^exponentOf.
DEVICE uint32_t mantissaOf(uint32_t bits) { return bits < 0x800000 ? bits : (bits & 0x7fffff) | 0x800000; }
DEVICE int exponentOf(uint32_t bits) { return max(static_cast<int>(bits >> 23), 1) - 150; }

// f(logit, index) for the row's logits, in no order.
template <typename F>
DEVICE void forLogits(const float* row, int count, const F& f) {
  const int threads = blockDim.x;
  for (int first = threadIdx.x; first < count; first += kAhead * threads) {
    float x[kAhead];
    UNROLL
    for (int j = 0; j < kAhead; ++j) x[j] = first + j * threads < count ? ldGlobal(row + first + j * threads) : 0;
    UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (first + j * threads < count) f(x[j], first + j * threads);
    }
  }
}

// Order-preserving bits of the largest logit, then ~ of the lowest index that has it. A NaN is above everything.
DEVICE uint64_t largestOf(const float* row, int count, SampleShared& s) {
  uint64_t top = 0;
  forLogits(row, count, [&](float x, int i) {
    const uint32_t bits = x == 0.f ? 0 : asUint(x);
    const uint32_t key = x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
    top = max(top, uint64_t{key} << 32 | ~static_cast<uint32_t>(i));
  });
  const auto warpTop = [](uint64_t value) {
    UNROLL
    for (int lanes = 16; lanes > 0; lanes >>= 1) value = max(value, fromLane(value, laneId() ^ lanes));
    return value;
  };
  top = warpTop(top);
  syncThreads();  // the previous row's have been read, and its weights
  if (laneId() == 0) s.tops[warpId()] = top;
  syncThreads();  // those of all warps are there
  return warpTop(laneId() < static_cast<int>(blockDim.x / 32) ? s.tops[laneId()] : 0);
}

struct Params {
  float temperature, topK, topP, u;
};

// Whether `row`'s params are in range; a fault if not.
DEVICE bool inRange(const Params& p, int row, const StepState& state) {
  const auto refuse = [&](Fault fault, int i, double high, float got) {
    if (threadIdx.x == 0) state.report(fault, 1, row * 4.0 + i, 0, high, got);
    return false;
  };
  if (!(p.temperature >= 0 && p.temperature < INFINITY)) return refuse(Fault::Below, 0, INFINITY, p.temperature);
  if (!(p.topK >= 0 && p.topK < INFINITY && p.topK == floorf(p.topK))) return refuse(Fault::Whole, 1, 0, p.topK);
  if (!(p.topP >= 0 && p.topP <= 1)) return refuse(Fault::Range, 2, 1, p.topP);
  if (!(p.u >= 0 && p.u < 1)) return refuse(Fault::Below, 3, 1, p.u);
  return true;
}

// The smallest set of weights, heavier first, then of lower index, that amounts to the goal: byMass, `amount` is the
// share of the mass of `within` that it must reach; else their number. `padded` weights, a multiple of kGroup; those
// past the vocabulary are 0 and so come last.
template <bool byMass>
DEVICE Kept keep(const float* weights, int padded, const Kept& within, double amount, SampleShared& s) {
  const int tid = threadIdx.x, threads = blockDim.x, lane = laneId(), copy = lane % kCopies;
  const bool first = warpId() == 0;
  uint32_t prefix = 0, mask = 0;
  double before = 0;  // of all weights above the prefix
  double goal = amount;
  // The first digit is the exponent, so that the weights of every digit have one exponent and their mantissas add up.
  for (int pass = 0; pass < 4; ++pass) {
    const int shift = pass == 3 ? 0 : 23 - 8 * pass;
    const auto record = [&](uint32_t bits) {
      if ((bits & mask) != prefix || (byMass && bits <= within.floor)) return;
      const uint32_t digit = bits >> shift & 255, mantissa = mantissaOf(bits);
      atomicAdd(&s.low[digit][copy], byMass ? mantissa & 0xfff : 1u);
      if (byMass) atomicAdd(&s.high[digit][copy], mantissa >> 12);
    };
    for (int i = 4 * tid; i < padded; i += 4 * kAhead * threads) {
      uint4 four[kAhead];
      UNROLL
      for (int j = 0; j < kAhead; ++j) {
        const int at = i + 4 * j * threads;
        four[j] = at < padded ? ldGlobal<uint4>(weights + at) : uint4{0, 0, 0, 0};  // what is past the end comes last
      }
      UNROLL
      for (int j = 0; j < kAhead; ++j) {
        record(four[j].x);
        record(four[j].y);
        record(four[j].z);
        record(four[j].w);
      }
    }
    syncThreads();  // the histogram is complete
    for (int digit = tid; digit < 256; digit += threads) {
      uint64_t sum = 0;
      UNROLL
      for (int c = 0; c < kCopies; ++c) {
        sum += s.low[digit][c];
        s.low[digit][c] = 0;
        if (!byMass) continue;
        sum += static_cast<uint64_t>(s.high[digit][c]) << 12;
        s.high[digit][c] = 0;
      }
      const uint32_t lowest = prefix | static_cast<uint32_t>(digit) << shift;  // weight of this digit
      if (byMass && (within.floor & (mask | 255u << shift)) == lowest) {
        sum += static_cast<uint64_t>(within.ties) * mantissaOf(within.floor);
      }
      s.mass[digit] = byMass ? ldexp(static_cast<double>(sum), exponentOf(lowest)) : static_cast<double>(sum);
    }
    syncThreads();  // the masses are there
    if (first) {
      // Lane l has the digits 255 - 8 l and the seven below.
      const int highest = 255 - 8 * lane;
      double sum = 0;
      for (int i = 0; i < 8; ++i) sum += s.mass[highest - i];
      const double scan = warpScan(sum), previous = fromLane(scan, max(lane - 1, 0));
      if (byMass && pass == 0) goal = amount * fromLane(scan, 31);
      const uint32_t some = ballot(sum > 0), reach = ballot(sum > 0 && before + scan >= goal);
      // Rounding may leave the goal out of reach of all: then the last.
      if (lane == (reach ? lowestBit(reach) : 31 - leadingZeros(some))) {
        double reached = before + (lane > 0 ? previous : 0.0);
        bool done = false;
        for (int i = 0; i < 8; ++i) {
          const double mass = s.mass[highest - i];
          if (done || mass == 0) continue;
          s.found = {highest - i, reached, goal};
          reached += mass;
          done = reached >= goal;
        }
      }
    }
    syncThreads();  // the digit is found
    prefix |= static_cast<uint32_t>(s.found.digit) << shift;
    mask |= 255u << shift;
    before = s.found.before;
    goal = s.found.goal;
  }
  const double each = byMass ? static_cast<double>(asFloat(prefix)) : 1.0;
  double ties = max(ceil((goal - before) / each), 1.0);
  if (before + (ties - 1) * each >= goal) ties = max(ties - 1, 1.0);
  if (before + ties * each < goal) ties += 1;
  ties = min(ties, static_cast<double>(prefix == within.floor ? within.ties : padded));
  return {prefix, static_cast<int>(ties)};
}

// The winner of the race among the weights kept.
DEVICE int winnerOf(const float* weights, int padded, const Kept& kept, float u, SampleShared& s) {
  const int lane = laneId(), warp = warpId(), warps = blockDim.x / 32;
  // Each warp takes a piece. First how many weights equal to the floor come before it.
  const int piece = ((padded + warps - 1) / warps + kGroup - 1) / kGroup * kGroup;
  const int from = min(warp * piece, padded), to = min(from + piece, padded);
  int equal = 0;
  for (int i = from + lane; i < to; i += 32) equal += asUint(ldGlobal(weights + i)) == kept.floor;
  equal = warpTotal(equal);
  if (lane == 0) s.ties[warp] = equal;
  syncThreads();  // those of all warps are there
  const int own = lane < warps ? s.ties[lane] : 0;
  int rank = fromLane(warpScan(own) - own, warp);
  Race race(asUint(u));
  for (int i = from + lane; i < to; i += 32) {
    const float weight = ldGlobal(weights + i);
    const bool tie = asUint(weight) == kept.floor;
    const uint32_t ties = ballot(tie);
    const bool among = asUint(weight) > kept.floor || (tie && rank + popCount(ties & ((1u << lane) - 1)) < kept.ties);
    rank += popCount(ties);
    if (among) race.enter(weight, i);
  }
  const auto better = [](double score, int token, double than, int other) {
    return score > than || (score == than && token < other);
  };
  const auto warpWinner = [&] {
    UNROLL
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
      const double score = fromLane(race.score, lane ^ lanes);
      const int token = fromLane(race.winner, lane ^ lanes);
      if (better(score, token, race.score, race.winner)) {
        race.score = score;
        race.winner = token;
      }
    }
  };
  warpWinner();
  syncThreads();  // ties have been read
  if (lane == 0) {
    s.partial[warp] = race.score;
    s.ties[warp] = race.winner;
  }
  syncThreads();  // those of all warps are there
  race.score = lane < warps ? s.partial[lane] : 0;
  race.winner = lane < warps ? s.ties[lane] : -1;
  warpWinner();
  return race.winner;
}

__global__ void __launch_bounds__(32 * kWarpsMax, 1)
    sampleKernel(Operand logits, Operand params, Operand ids, Operand logprob, float* allWeights, int64_t weightStride,
                 StepState state) {
  SHARED_MEMORY(SampleShared, s);
  const int rows = logits.size(0), vocabulary = logits.size(1), tid = threadIdx.x, threads = blockDim.x;
  const int padded = (vocabulary + kGroup - 1) / kGroup * kGroup;
  float* weights = allWeights + blockIdx.x * weightStride;
  for (int i = tid; i < 256 * kCopies; i += threads) {
    (&s.low[0][0])[i] = 0;
    (&s.high[0][0])[i] = 0;
  }
  for (int r = blockIdx.x; r < rows; r += gridDim.x) {
    const float* row = logits.f32() + int64_t{r} * vocabulary;
    const float* given = params.f32() + int64_t{r} * 4;
    const Params p{ldGlobal(given), ldGlobal(given + 1), ldGlobal(given + 2), ldGlobal(given + 3)};
    const uint64_t top = largestOf(row, vocabulary, s);
    const uint32_t at = ~static_cast<uint32_t>(top);
    const float largest = vocabulary > 0 ? ldGlobal(row + at) : NAN;
    if (!inRange(p, r, state)) continue;
    if (!(fabsf(largest) < INFINITY)) {
      if (tid == 0) state.report(Fault::NoMaximum, 0, static_cast<double>(r), 0, 0, largest);
      continue;
    }
    const bool greedy = p.temperature == 0;
    const float factor = fminf(1.f / p.temperature, 3e38f);
    double plain = 0;
    forLogits(row, vocabulary, [&](float x, int i) {
      plain += exponential(x - largest);
      if (greedy) return;
      stGlobal(weights + i, exponential((x - largest) * factor));
    });
    plain = blockTotal(plain, s.partial);
    int id = static_cast<int>(at);
    if (!greedy) {
      for (int i = vocabulary + tid; i < padded; i += threads) stGlobal(weights + i, 0.f);
      syncThreads();  // the weights are there
      Kept kept{0, padded};
      const bool some = p.topK > 0 && p.topK < static_cast<float>(vocabulary);
      if (some) kept = keep<false>(weights, padded, kept, p.topK, s);
      if (p.topP < 1) kept = keep<true>(weights, padded, kept, p.topP, s);
      id = winnerOf(weights, padded, kept, p.u, s);
    }
    if (tid == 0) {
      const double logit = ldGlobal(row + id);
      stGlobal(ids.i32() + r, id);
      stGlobal(logprob.f32() + r, static_cast<float>(logit - largest - log(plain)));
    }
  }
}

}  // namespace

void sample(const Launch& launch) {
  const Operand& logits = launch.in[0];
  const int64_t vocabulary = logits.bound[1];
  if (vocabulary < 1) fail(ErrorCode::InvalidProgram, "[sample] logits must have at least one column, got none");
  if (vocabulary > kVocabularyMax) {
    fail(ErrorCode::InvalidProgram, "[sample] logits must have at most %lld columns on this device, got %lld",
         static_cast<long long>(kVocabularyMax), static_cast<long long>(vocabulary));
  }
  // Of the larger blocks one fits on a multiprocessor.
  const bool few = vocabulary <= kFewWeights;
  const int threads = few ? kFewThreads : 32 * kWarpsMax;
  const int64_t most = int64_t{few ? 8 : 1} * launch.multiprocessors;
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(logits.bound[0], 1, most));
  const int64_t stride = (vocabulary + kGroup - 1) / kGroup * kGroup;
  float* weights = launch.scratch<float>(blocks * stride);
  LAUNCH(sampleKernel, blocks, threads, sizeof(SampleShared), launch.stream, logits, launch.in[1], launch.out[0],
         launch.out[1], weights, stride, launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
