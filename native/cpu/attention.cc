// Attention over variable-length segments, its gradient, and attention over key-value caches of pages, which grow.
#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/cache.h"
#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

struct Heads {
  int64_t heads, kvHeads, headDim, group;
};

Heads checkedHeads(const KernelArgs& args, const char* op, int64_t queryWidth, int64_t kvWidth) {
  const int64_t heads = intAttribute(args, op, 0, "heads", 1, 1 << 20);
  const int64_t kvHeads = intAttribute(args, op, 1, "kv_heads", 1, 1 << 20);
  if (heads % kvHeads != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] heads must be a multiple of kv_heads, got %lld and %lld", op,
         static_cast<long long>(heads), static_cast<long long>(kvHeads));
  }
  const int64_t headDim = queryWidth / heads;
  if (headDim < 1 || queryWidth % heads != 0 || kvWidth != headDim * kvHeads) {
    fail(ErrorCode::InvalidProgram,
         "[%s] widths must be heads x head_dim and kv_heads x head_dim, got %lld and %lld with %lld and %lld heads", op,
         static_cast<long long>(queryWidth), static_cast<long long>(kvWidth), static_cast<long long>(heads),
         static_cast<long long>(kvHeads));
  }
  return {heads, kvHeads, headDim, heads / kvHeads};
}

void checkStatistics(const char* op, const TensorView& lse, int64_t heads) {
  if (lse && lse.dim(1) != heads) {
    fail(ErrorCode::InvalidProgram, "[%s] lse must have one column per head: %lld, got %lld", op,
         static_cast<long long>(heads), static_cast<long long>(lse.dim(1)));
  }
}

// The rows that are queries: those of segment s are [offsets[s], offsets[s + 1]) of q, and row i of q stands at row
// rows[i] of the new keys (null: at row i, or, of another sequence, nowhere).
struct Queries {
  const int32_t *offsets, *rows;

  int64_t count(int64_t s) const { return offsets[s + 1] - offsets[s]; }
};

// `offsets`: of the `keys` new rows, checked.
Queries checkedQueries(const char* op, const TensorView& rows, const TensorView& rowOffsets, const TensorView& q,
                       int64_t keys, const int32_t* offsets, bool causal) {
  if (rowOffsets && !rows && !causal) {
    const int64_t segments = checkOffsets(op, rowOffsets, q.dim(0), "row_offsets");
    const Queries queries{rowOffsets.i32(), nullptr};
    for (int64_t s = 0; s < segments; ++s) {
      if (queries.count(s) > 0 && offsets[s] == offsets[s + 1]) {
        fail(ErrorCode::InvalidData, "[%s] offsets: segment %lld has %lld queries and no keys", op,
             static_cast<long long>(s), static_cast<long long>(queries.count(s)));
      }
    }
    return queries;
  }
  if (!rows != !rowOffsets) {
    fail(ErrorCode::InvalidProgram, "[%s] rows and row_offsets must be given together, got %s alone", op,
         rows ? "rows" : "row_offsets");
  }
  if (!rows) {
    if (q.dim(0) != keys) {
      fail(ErrorCode::InvalidProgram, "[%s] without rows q and k must have as many rows, got %lld and %lld", op,
           static_cast<long long>(q.dim(0)), static_cast<long long>(keys));
    }
    return {offsets, nullptr};
  }
  checkRows(op, rows.i32(), q.dim(0), keys);
  const int64_t segments = checkOffsets(op, rowOffsets, q.dim(0), "row_offsets");
  const Queries queries{rowOffsets.i32(), rows.i32()};
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t i = queries.offsets[s]; i < queries.offsets[s + 1]; ++i) {
      if (queries.rows[i] < offsets[s] || queries.rows[i] >= offsets[s + 1]) {
        fail(ErrorCode::InvalidData, "[%s] rows[%lld] must be in segment %lld, [%d, %d), got %d", op,
             static_cast<long long>(i), static_cast<long long>(s), offsets[s], offsets[s + 1], queries.rows[i]);
      }
    }
  }
  return queries;
}

// What decides about scores besides queries and keys.
struct Scoring {
  bool causal;
  int64_t window;  // causal: keys that a query sees at most, the last ones
  float scale, softcap;
};

// From attribute i on: scale, window, softcap.
Scoring checkedScoring(const KernelArgs& args, const char* op, int i, bool causal) {
  Scoring scoring{causal, intAttribute(args, op, i + 1, "window", 0, INT32_MAX),
                  static_cast<float>(finiteAttribute(args, op, i, "scale")),
                  checkedSoftcap(op, "softcap", args.attr[i + 2])};
  if (scoring.window > 0 && !causal) fail(ErrorCode::InvalidProgram, "[%s] a window needs causal attention", op);
  if (scoring.window == 0) scoring.window = INT32_MAX;
  return scoring;
}

// Added to scores by the distance from a query to a key: [heads, 2 reach + 1].
struct Bias {
  const float* values;  // or null
  int64_t reach;

  int64_t columns() const { return 2 * reach + 1; }
  const float* of(int64_t head) const { return values ? values + head * columns() : nullptr; }
};

Bias checkedBias(const char* op, const TensorView& bias, int64_t heads, const Scoring& scoring, bool placed) {
  if (!bias) return {nullptr, 0};
  if (bias.dim(0) != heads || bias.dim(1) % 2 != 1 || scoring.softcap > 0 || !placed) {
    fail(ErrorCode::InvalidProgram,
         "[%s] bias must be [%lld, an odd number], without a softcap and for queries that have a place among the keys, got "
         "[%lld, %lld]",
         op, static_cast<long long>(heads), static_cast<long long>(bias.dim(0)), static_cast<long long>(bias.dim(1)));
  }
  return {bias.f32(), bias.dim(1) / 2};
}

// min(1, window) + ... + min(n, window)
double windowedSum(int64_t n, int64_t window) {
  const double inside = static_cast<double>(std::min(n, window)), outside = static_cast<double>(n) - inside;
  return inside * (inside + 1) / 2 + outside * static_cast<double>(window);
}

// Pairs (query, key) in sight in segment s, whose new rows come after `cached` ones.
double visiblePairs(const Scoring& scoring, const Queries& queries, const int32_t* offsets, int64_t s, int64_t cached) {
  const int64_t count = queries.count(s);
  if (!scoring.causal) return static_cast<double>(count) * (offsets[s + 1] - offsets[s]);
  if (!queries.rows) return windowedSum(cached + count, scoring.window) - windowedSum(cached, scoring.window);
  double pairs = 0;
  for (int64_t i = queries.offsets[s]; i < queries.offsets[s + 1]; ++i) {
    pairs += static_cast<double>(std::min(cached + queries.rows[i] - offsets[s] + 1, scoring.window));
  }
  return pairs;
}

// Multiply-adds below which the calling thread does the work alone.
constexpr double kParallelWork = 131072;

// The keys of a segment: key j is row j % pageRows of page pages[j / pageRows].
struct Keys {
  const float *k, *v;  // page 0
  const int32_t* pages;
  int64_t pageRows;
  int64_t cached;  // keys before the segment's first new row
};

// Attention of one step, as attention and attention_cached have it in common, in tasks: one is a block of a segment's query
// rows for one kv head.
class Attending {
 public:
  // offsets: of the new key rows; keysOf(s): the keys of segment s.
  Attending(const KernelArgs& args, const Heads& heads, const Queries& queries, const int32_t* offsets, int64_t segments,
            const Scoring& scoring, const Bias& bias, float* lse, std::function<Keys(int64_t)> keysOf)
      : h_(heads),
        queries_(queries),
        offsets_(offsets),
        segments_(segments),
        scoring_(scoring),
        bias_(bias),
        keysOf_(std::move(keysOf)),
        q_(args.in[0].f32()),
        y_(args.out[0].f32()),
        lse_(lse),
        pairsOf_(args.scratch<double>(segments)),
        tasksBefore_(args.scratch<int64_t>(segments + 1)),
        headsPerTask_(args.scratch<int64_t>(segments)) {
    for (int64_t s = 0; s < segments; ++s) {
      pairsOf_[s] = visiblePairs(scoring, queries, offsets, s, keysOf_(s).cached);
      pairs_ += pairsOf_[s];
    }
    args.counters->flops += 4 * work();
  }

  // Multiply-adds of each of the two products.
  double work() const { return pairs_ * static_cast<double>(h_.heads * h_.headDim); }

  // Segments of a single block (decoding) take several heads at once, to read the cache in longer runs, as far as no task
  // becomes too large a part of `wanted`, the tasks that this step is to be cut into; which heads go together changes no result.
  void cut(double wanted) {
    tasksBefore_[0] = 0;
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t rows = queries_.count(s) * h_.group;
      const double own = pairs_ > 0 ? std::ceil(wanted * (pairsOf_[s] / pairs_)) : 1;
      const int64_t parts = std::clamp(static_cast<int64_t>(own), int64_t{1}, h_.kvHeads);
      const int64_t heads = rows <= kQueryRows ? (h_.kvHeads + parts - 1) / parts : 1;
      const int64_t blocks = (rows + kQueryRows - 1) / kQueryRows;
      headsPerTask_[s] = heads;
      tasksBefore_[s + 1] = tasksBefore_[s] + blocks * ((h_.kvHeads + heads - 1) / heads);
      mostRows_ = std::max(mostRows_, std::min(rows, kQueryRows) * heads);
    }
  }
  int64_t tasks() const { return tasksBefore_[segments_]; }
  int64_t scratchSize() const { return (vectorOps().attentionScratch(h_.headDim, mostRows_) + 15) / 16 * 16; }

  // The last blocks first: under causal attention they see the most keys.
  void run(int64_t index, float* scratch) const {
    const int64_t task = tasks() - 1 - index;
    const int64_t s = std::upper_bound(tasksBefore_, tasksBefore_ + segments_ + 1, task) - tasksBefore_ - 1;
    const int64_t queryWidth = h_.heads * h_.headDim;
    const int64_t rows = queries_.count(s) * h_.group, heads = headsPerTask_[s];
    const int64_t headGroups = (h_.kvHeads + heads - 1) / heads, inSegment = task - tasksBefore_[s];
    const int64_t head = inSegment % headGroups * heads, firstQuery = queries_.offsets[s];
    const int64_t query = firstQuery * queryWidth + head * h_.group * h_.headDim;
    const Keys keys = keysOf_(s);
    AttentionBlock block;
    block.q = q_ + query;
    block.k = keys.k + head * h_.headDim;
    block.v = keys.v + head * h_.headDim;
    block.pages = keys.pages;
    block.pageRows = keys.pageRows;
    block.y = y_ + query;
    block.lse = lse_ ? lse_ + firstQuery * h_.heads + head * h_.group : nullptr;
    block.qStride = queryWidth;
    block.kvStride = h_.kvHeads * h_.headDim;
    block.lseStride = h_.heads;
    block.headDim = h_.headDim;
    block.group = h_.group;
    block.kvHeads = std::min(heads, h_.kvHeads - head);
    block.firstRow = inSegment / headGroups * kQueryRows;
    block.rows = std::min(kQueryRows, rows - block.firstRow);
    block.keys = keys.cached + offsets_[s + 1] - offsets_[s];
    block.stands = queries_.rows ? queries_.rows + firstQuery : nullptr;
    block.shift = keys.cached - (queries_.rows ? offsets_[s] : 0);
    block.causal = scoring_.causal;
    block.window = scoring_.window;
    block.scale = scoring_.scale;
    block.softcap = scoring_.softcap;
    block.bias = bias_.of(head * h_.group);
    block.biasReach = bias_.reach;
    block.scratch = scratch;
    vectorOps().attention(block);
  }

 private:
  Heads h_;
  Queries queries_;
  const int32_t* offsets_;
  int64_t segments_;
  Scoring scoring_;
  Bias bias_;
  std::function<Keys(int64_t)> keysOf_;
  const float* q_;
  float *y_, *lse_;
  double pairs_ = 0;
  double* pairsOf_;                        // [segments]
  int64_t *tasksBefore_, *headsPerTask_;   // of the segments before, [segments + 1]; [segments]
  int64_t mostRows_ = 0;
};

// All steps at once, so that none waits for the last task of the one before it.
void attendTogether(const KernelArgs* steps, int count, Attending (*of)(const KernelArgs&)) {
  std::vector<Attending> all;
  double work = 0;
  for (int i = 0; i < count; ++i) work += all.emplace_back(of(steps[i])).work();
  const bool parallel = work > kParallelWork;
  const int64_t threads = parallel ? threadCount() : 1;
  std::vector<int64_t> before{0};  // tasks of the steps before
  int64_t scratchSize = 0;
  for (Attending& one : all) {
    one.cut(parallel ? 2 * static_cast<double>(threads) * (one.work() / work) : 1);
    before.push_back(before.back() + one.tasks());
    scratchSize = std::max(scratchSize, one.scratchSize());
  }
  float* scratch = steps->scratch<float>(scratchSize * threads);
  const int64_t tasks = before.back();
  forChunks(tasks, parallel ? 1 : tasks, *steps, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task) {
      const auto i = static_cast<size_t>(std::upper_bound(before.begin(), before.end(), task) - before.begin() - 1);
      all[i].run(task - before[i], scratch + worker * scratchSize);
    }
  });
}

Attending attentionOf(const KernelArgs& args) {
  const char* op = "attention";
  const int64_t kvWidth = args.in[1].dim(1);
  const Heads h = checkedHeads(args, op, args.in[0].dim(1), kvWidth);
  const Scoring scoring = checkedScoring(args, op, 3, intAttribute(args, op, 2, "causal", 0, 1) != 0);
  checkStatistics(op, args.out[1], h.heads);
  const int64_t segments = checkOffsets(op, args.in[3], args.in[1].dim(0));
  const int32_t* offsets = args.in[3].i32();
  const Queries queries = checkedQueries(op, args.in[4], args.in[5], args.in[0], args.in[1].dim(0), offsets,
                                         scoring.causal);
  const Bias bias = checkedBias(op, args.in[6], h.heads, scoring, !args.in[5] || args.in[4]);
  const float *k = args.in[1].f32(), *v = args.in[2].f32();
  float* lse = args.out[1] ? args.out[1].f32() : nullptr;
  return {args, h, queries, offsets, segments, scoring, bias, lse, [=](int64_t s) {
            static constexpr int32_t kFirstPage = 0;
            return Keys{k + offsets[s] * kvWidth, v + offsets[s] * kvWidth, &kFirstPage, INT64_MAX, 0};
          }};
}

Attending attentionCachedOf(const KernelArgs& args) {
  const char* op = "attention_cached";
  const TensorView &q = args.in[0], &poolK = args.in[5], &poolV = args.in[6];
  const Heads h = checkedHeads(args, op, q.dim(1), poolK.dim(2));
  const Scoring scoring = checkedScoring(args, op, 2, true);
  const int32_t* offsets = args.in[1].i32();
  const int64_t last = args.in[1].dim(0) - 1, added = args.in[7] && last >= 0 ? offsets[last] : q.dim(0);
  const int64_t segments = checkOffsets(op, args.in[1], added);
  const Slots slots(args, op, 2, poolK, segments);
  for (int64_t s = 0; s < segments; ++s) {
    slots.checkLength(s, offsets[s + 1] - offsets[s], 0);
    slots.checkPages(s, 0, slots.length(s));
  }
  const Queries queries = checkedQueries(op, args.in[7], args.in[8], q, added, offsets, true);
  const Bias bias = checkedBias(op, args.in[9], h.heads, scoring, true);
  const float *k = poolK.f32(), *v = poolV.f32();
  return {args, h, queries, offsets, segments, scoring, bias, nullptr, [=](int64_t s) {
            const int64_t cached = slots.length(s) - (offsets[s + 1] - offsets[s]);
            return Keys{k, v, slots.pagesOf(s), slots.pageRows, cached};
          }};
}

}  // namespace

void attentionTogether(const KernelArgs* steps, int count) { attendTogether(steps, count, attentionOf); }
void attentionCachedTogether(const KernelArgs* steps, int count) { attendTogether(steps, count, attentionCachedOf); }
void attention(const KernelArgs& args) { attentionTogether(&args, 1); }
void attentionCached(const KernelArgs& args) { attentionCachedTogether(&args, 1); }

void attentionGrad(const KernelArgs& args) {
  const char* op = "attention_grad";
  const int64_t queryWidth = args.in[1].dim(1), kvWidth = args.in[2].dim(1);
  const Heads h = checkedHeads(args, op, queryWidth, kvWidth);
  const Scoring scoring = checkedScoring(args, op, 3, intAttribute(args, op, 2, "causal", 0, 1) != 0);
  checkStatistics(op, args.in[5], h.heads);
  const int64_t segments = checkOffsets(op, args.in[6], args.in[2].dim(0));
  const int32_t* offsets = args.in[6].i32();
  const Queries queries = checkedQueries(op, args.in[7], args.in[8], args.in[1], args.in[2].dim(0), offsets,
                                         scoring.causal);
  const Bias bias = checkedBias(op, args.in[9], h.heads, scoring, !args.in[8] || args.in[7]);
  const VectorOps& vector = vectorOps();
  double pairs = 0;
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    pairs += visiblePairs(scoring, queries, offsets, s, 0);
    longest = std::max(longest, queries.count(s));
  }
  args.counters->flops += 10.0 * h.headDim * h.heads * pairs;
  const bool parallel = pairs * h.heads * h.headDim > kParallelWork;
  const int64_t scratchSize = (vector.attentionGradScratch(h.headDim, longest * h.group) + 15) / 16 * 16;
  float* scratch = args.scratch<float>(scratchSize * (parallel ? threadCount() : 1));
  const int64_t tasks = segments * h.kvHeads;
  forChunks(tasks, parallel ? 1 : tasks, args, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / h.kvHeads, head = task % h.kvHeads, firstQuery = queries.offsets[s];
      const int64_t query = firstQuery * queryWidth + head * h.group * h.headDim;
      const int64_t key = offsets[s] * kvWidth + head * h.headDim;
      AttentionGradBlock block;
      block.dy = args.in[0].f32() + query;
      block.q = args.in[1].f32() + query;
      block.k = args.in[2].f32() + key;
      block.v = args.in[3].f32() + key;
      block.y = args.in[4].f32() + query;
      block.lse = args.in[5].f32() + firstQuery * h.heads + head * h.group;
      block.dq = args.out[0].f32() + query;
      block.dk = args.out[1].f32() + key;
      block.dv = args.out[2].f32() + key;
      block.qStride = queryWidth;
      block.kvStride = kvWidth;
      block.lseStride = h.heads;
      block.headDim = h.headDim;
      block.group = h.group;
      block.positions = queries.count(s);
      block.keys = offsets[s + 1] - offsets[s];
      block.stands = queries.rows ? queries.rows + firstQuery : nullptr;
      block.shift = queries.rows ? -offsets[s] : 0;
      block.causal = scoring.causal;
      block.window = scoring.window;
      block.scale = scoring.scale;
      block.softcap = scoring.softcap;
      block.bias = bias.of(head * h.group);
      block.biasReach = bias.reach;
      block.scratch = scratch + worker * scratchSize;
      vector.attentionGrad(block);
    }
  });
}

}  // namespace elastiform::cpu
