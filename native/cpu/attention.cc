// Attention over variable-length segments, its gradient, and attention against a growing key-value cache.
#include <cstring>

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
// rows[i] of the new keys (null: at row i).
struct Queries {
  const int32_t *offsets, *rows;

  int64_t count(int64_t s) const { return offsets[s + 1] - offsets[s]; }
};

// `offsets`: of the `keys` new rows, checked.
Queries checkedQueries(const char* op, const TensorView& rows, const TensorView& rowOffsets, const TensorView& q,
                       int64_t keys, const int32_t* offsets) {
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

// Pairs (query, key) in sight in segment s, whose new rows come after `cached` ones.
double visiblePairs(bool causal, const Queries& queries, const int32_t* offsets, int64_t s, int64_t cached) {
  const double count = static_cast<double>(queries.count(s));
  if (!causal) return count * (offsets[s + 1] - offsets[s]);
  if (!queries.rows) return count * (count + 1) / 2 + count * static_cast<double>(cached);
  double pairs = 0;
  for (int64_t i = queries.offsets[s]; i < queries.offsets[s + 1]; ++i) {
    pairs += static_cast<double>(cached + queries.rows[i] - offsets[s] + 1);
  }
  return pairs;
}

// Multiply-adds below which the calling thread does the work alone.
constexpr double kParallelWork = 131072;

struct Keys {
  const float *k, *v;
  int64_t cached;  // keys before the segment's first new row
};

// What attention and attention_cached have in common. offsets: of the new key rows; keysOf(s): the keys of segment s.
template <typename KeysOf>
void attend(const KernelArgs& args, const Heads& h, const float* q, const Queries& queries, const int32_t* offsets,
            int64_t segments, bool causal, float scale, float* y, float* lse, const KeysOf& keysOf) {
  const VectorOps& vector = vectorOps();
  const int64_t queryWidth = h.heads * h.headDim;
  double pairs = 0;
  for (int64_t s = 0; s < segments; ++s) {
    pairs += visiblePairs(causal, queries, offsets, s, keysOf(s).cached);
  }
  args.counters->flops += 4.0 * h.headDim * h.heads * pairs;
  const bool parallel = pairs * h.heads * h.headDim > kParallelWork;
  const int64_t threads = parallel ? threadCount() : 1;
  // A task is one block of a segment's query rows for one kv head. Segments of a single block (decoding) take several
  // heads at once, to read the cache in longer runs; which heads go together changes no result.
  const int64_t parts = std::clamp<int64_t>(parallel ? 2 * threads / std::max<int64_t>(segments, 1) : 1, 1, h.kvHeads);
  const int64_t together = (h.kvHeads + parts - 1) / parts;
  int64_t* tasksBefore = args.scratch<int64_t>(segments + 1);  // of the segments before
  int64_t mostRows = 0;
  tasksBefore[0] = 0;
  const auto headsPerTask = [&](int64_t rows) { return rows <= kQueryRows ? together : 1; };
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t rows = queries.count(s) * h.group;
    const int64_t heads = headsPerTask(rows), blocks = (rows + kQueryRows - 1) / kQueryRows;
    tasksBefore[s + 1] = tasksBefore[s] + blocks * ((h.kvHeads + heads - 1) / heads);
    mostRows = std::max(mostRows, std::min(rows, kQueryRows) * heads);
  }
  const int64_t tasks = tasksBefore[segments];
  const int64_t scratchSize = (vector.attentionScratch(h.headDim, mostRows) + 15) / 16 * 16;
  float* scratch = args.scratch<float>(scratchSize * threads);
  forChunks(tasks, parallel ? 1 : tasks, args, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      // The last blocks first: under causal attention they see the most keys.
      const int64_t task = tasks - 1 - chunk;
      const int64_t s = std::upper_bound(tasksBefore, tasksBefore + segments + 1, task) - tasksBefore - 1;
      const int64_t rows = queries.count(s) * h.group, heads = headsPerTask(rows);
      const int64_t headGroups = (h.kvHeads + heads - 1) / heads, index = task - tasksBefore[s];
      const int64_t head = index % headGroups * heads, firstQuery = queries.offsets[s];
      const int64_t query = firstQuery * queryWidth + head * h.group * h.headDim;
      const Keys keys = keysOf(s);
      AttentionBlock block;
      block.q = q + query;
      block.k = keys.k + head * h.headDim;
      block.v = keys.v + head * h.headDim;
      block.y = y + query;
      block.lse = lse ? lse + firstQuery * h.heads + head * h.group : nullptr;
      block.qStride = queryWidth;
      block.kvStride = h.kvHeads * h.headDim;
      block.lseStride = h.heads;
      block.headDim = h.headDim;
      block.group = h.group;
      block.kvHeads = std::min(heads, h.kvHeads - head);
      block.firstRow = index / headGroups * kQueryRows;
      block.rows = std::min(kQueryRows, rows - block.firstRow);
      block.keys = keys.cached + offsets[s + 1] - offsets[s];
      block.stands = queries.rows ? queries.rows + firstQuery : nullptr;
      block.shift = keys.cached - (queries.rows ? offsets[s] : 0);
      block.causal = causal;
      block.scale = scale;
      block.scratch = scratch + worker * scratchSize;
      vector.attention(block);
    }
  });
}

}  // namespace

void attention(const KernelArgs& args) {
  const char* op = "attention";
  const int64_t kvWidth = args.in[1].dim(1);
  const Heads h = checkedHeads(args, op, args.in[0].dim(1), kvWidth);
  const bool causal = intAttribute(args, op, 2, "causal", 0, 1) != 0;
  const float scale = static_cast<float>(finiteAttribute(args, op, 3, "scale"));
  checkStatistics(op, args.out[1], h.heads);
  const int64_t segments = checkOffsets(op, args.in[3], args.in[1].dim(0));
  const int32_t* offsets = args.in[3].i32();
  const Queries queries = checkedQueries(op, args.in[4], args.in[5], args.in[0], args.in[1].dim(0), offsets);
  const float *k = args.in[1].f32(), *v = args.in[2].f32();
  attend(args, h, args.in[0].f32(), queries, offsets, segments, causal, scale, args.out[0].f32(),
         args.out[1] ? args.out[1].f32() : nullptr, [&](int64_t s) {
           return Keys{k + offsets[s] * kvWidth, v + offsets[s] * kvWidth, 0};
         });
}

void attentionGrad(const KernelArgs& args) {
  const char* op = "attention_grad";
  const int64_t queryWidth = args.in[1].dim(1), kvWidth = args.in[2].dim(1);
  const Heads h = checkedHeads(args, op, queryWidth, kvWidth);
  const bool causal = intAttribute(args, op, 2, "causal", 0, 1) != 0;
  const float scale = static_cast<float>(finiteAttribute(args, op, 3, "scale"));
  checkStatistics(op, args.in[5], h.heads);
  const int64_t segments = checkOffsets(op, args.in[6], args.in[2].dim(0));
  const int32_t* offsets = args.in[6].i32();
  const Queries queries = checkedQueries(op, args.in[7], args.in[8], args.in[1], args.in[2].dim(0), offsets);
  const VectorOps& vector = vectorOps();
  double pairs = 0;
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    pairs += visiblePairs(causal, queries, offsets, s, 0);
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
      block.causal = causal;
      block.scale = scale;
      block.scratch = scratch + worker * scratchSize;
      vector.attentionGrad(block);
    }
  });
}

namespace {

// One length per segment, in [least(s), most(s)].
template <typename Least, typename Most>
void checkLengths(const char* op, const TensorView& lengths, int64_t segments, const Least& least, const Most& most) {
  if (lengths.dim(0) != segments) {
    fail(ErrorCode::InvalidProgram, "[%s] one length per segment wanted: %lld segments, got %lld lengths", op,
         static_cast<long long>(segments), static_cast<long long>(lengths.dim(0)));
  }
  for (int64_t s = 0; s < segments; ++s) {
    const int32_t length = lengths.i32()[s];
    if (length >= least(s) && length <= most(s)) continue;
    fail(ErrorCode::InvalidData, "[%s] lengths[%lld] must be in [%lld, %lld] for the new rows and the cache, got %d", op,
         static_cast<long long>(s), static_cast<long long>(least(s)), static_cast<long long>(most(s)), length);
  }
}

}  // namespace

void cacheAppend(const KernelArgs& args) {
  const char* op = "cache_append";
  const int64_t rows = args.in[0].dim(0), width = args.in[0].dim(1);
  const int64_t segments = checkOffsets(op, args.in[2], rows);
  const int32_t* offsets = args.in[2].i32();
  const TensorView &cacheK = args.in[4], &cacheV = args.in[5];
  const int64_t capacity = cacheK.dim(1);
  int32_t* lengths = args.in[3].i32();
  checkLengths(op, args.in[3], segments, [](int64_t) { return 0; },
               [&](int64_t s) { return capacity - (offsets[s + 1] - offsets[s]); });
  const float *k = args.in[0].f32(), *v = args.in[1].f32();
  forChunks(rows, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    int64_t s = std::upper_bound(offsets, offsets + segments + 1, begin) - offsets - 1;
    for (int64_t row = begin; row < end; ++row) {
      while (row >= offsets[s + 1]) ++s;
      const int64_t to = (s * capacity + lengths[s] + row - offsets[s]) * width;
      std::memcpy(cacheK.f32() + to, k + row * width, static_cast<size_t>(width) * sizeof(float));
      std::memcpy(cacheV.f32() + to, v + row * width, static_cast<size_t>(width) * sizeof(float));
    }
  });
  // Last, so that an aborted run leaves the cache as it was.
  for (int64_t s = 0; s < segments; ++s) lengths[s] += offsets[s + 1] - offsets[s];
}

void attentionCached(const KernelArgs& args) {
  const char* op = "attention_cached";
  const TensorView &q = args.in[0], &lengths = args.in[2], &cacheK = args.in[3], &cacheV = args.in[4];
  const int64_t capacity = cacheK.dim(1), kvWidth = cacheK.dim(2);
  const Heads h = checkedHeads(args, op, q.dim(1), kvWidth);
  const float scale = static_cast<float>(finiteAttribute(args, op, 2, "scale"));
  const int32_t* offsets = args.in[1].i32();
  const int64_t last = args.in[1].dim(0) - 1, added = args.in[5] && last >= 0 ? offsets[last] : q.dim(0);
  const int64_t segments = checkOffsets(op, args.in[1], added);
  const auto fresh = [&](int64_t s) { return offsets[s + 1] - offsets[s]; };
  checkLengths(op, lengths, segments, fresh, [&](int64_t) { return capacity; });
  const Queries queries = checkedQueries(op, args.in[5], args.in[6], q, added, offsets);
  attend(args, h, q.f32(), queries, offsets, segments, true, scale, args.out[0].f32(), nullptr, [&](int64_t s) {
    return Keys{cacheK.f32() + s * capacity * kvWidth, cacheV.f32() + s * capacity * kvWidth,
                lengths.i32()[s] - fresh(s)};
  });
}

}  // namespace elastiform::cpu
