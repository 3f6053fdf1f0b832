// Fuzz target of the program validator: mutates valid programs and runs what is still accepted.
//
//   elastiform_fuzz [iterations = 20000] [seed = 1] [seconds = 0: no limit]
//
// Deterministic: the same arguments try the same programs. A defect shows as a sanitizer report, a crash, or an error of
// the kind Internal; the iteration and seed are printed first. Every operand of a run has memory of its own with guarded
// ends (AlignedBuffer under AddressSanitizer), as most temporaries are turned into outputs.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

#include "cpu/kernels.h"
#include "test/program_writer.h"

namespace elastiform::test {
namespace {

struct Encoded {
  std::vector<int32_t> code;
  std::vector<double> attributes;
  std::vector<std::string> opNames;
  std::vector<std::shared_ptr<Tensor>> bound;
};

Encoded encode(const ProgramWriter& writer) {
  return {writer.code(), writer.attributes(), writer.opNames(), writer.boundTensors()};
}

// Between them the programs use every op and every feature of the signature language.
std::vector<Encoded> corpus() {
  std::vector<Encoded> programs;
  {  // routed feed-forward: norm of selected rows, prefix of a bf16 weight, gated scatter to the residual
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 6), r = w.dim(DimKind::Produced, 6), d = w.constant(4), f = w.constant(5);
    const int one = w.constant(1), o = w.constant(3), segments = w.constant(2);
    const int x = w.feed({n, d}), z = w.feed({n, one}), capacity = w.feed({segments}), offsets = w.feedIds({o});
    const int rows = w.tensor(TensorKind::Temp, DType::I32, {r});
    const int rowOffsets = w.tensor(TensorKind::Temp, DType::I32, {o});
    const int norm = w.bound(DType::F32, {2}), up = w.bound(DType::BF16, {8, 4}), gate = w.bound(DType::F16, {8, 4});
    const int down = w.bound(DType::F32, {4, 8});
    const int gates = w.temp({r}), normed = w.temp({r, d}), rstd = w.temp({r, w.constant(2)}), hidden = w.temp({r, f});
    const int y = w.output({n, d}), dx = w.temp({r, f}), dgate = w.output({r}), dz = w.output({n, one});
    w.step("route_topk", {z, offsets, capacity}, {rows, rowOffsets});
    w.step("gate", {z, rows}, {gates}, {2});
    w.step("rms_norm", {x, norm, rows}, {normed, rstd}, {1e-5, 1});
    const int rank = w.constant(2), wide = w.constant(3), low = w.temp({r, rank}), lower = w.temp({r, wide});
    const int small = w.bound(DType::F32, {2, 4}), smaller = w.bound(DType::BF16, {3, 4});
    const int gateB = w.bound(DType::F32, {8, 2}, true), upB = w.bound(DType::BF16, {8, 4});
    const int downB = w.bound(DType::F16, {4, 2});
    w.step("linear", {normed, small, -1, -1, -1, -1}, {low, -1}, {0});
    w.step("linear", {normed, smaller, -1, -1, low, w.bound(DType::F32, {3, 2})}, {lower, -1}, {0});
    w.step("linear_gated", {normed, gate, up, -1, -1, -1, low, gateB, lower, upB}, {hidden, -1, -1}, {3});
    w.step("linear_add", {x, hidden, down, -1, rows, gates, low, downB}, {y});
    w.step("linear_add_grad", {x, hidden, down, -1, rows, gates}, {dx, dgate});
    w.step("gate_grad", {dgate, z, rows}, {dz}, {2});
    w.step("topk_bce", {z, rows}, {w.output({one})});
    w.step("rms_norm_grad", {normed, x, norm, rstd, rows}, {w.output({r, d}), w.output({w.constant(2)})}, {1});
    w.step("linear_dw", {x, hidden, rows, -1, gates}, {w.output({d, f})});
    w.step("sum_rows", {x, rows, gates}, {w.output({d})});
    w.step("add_rows", {x, normed, rows, gates}, {w.output({n, d})});
    w.step("add_rows_grad", {x, normed, rows, gates}, {w.output({r, d}), w.output({r})});
    programs.push_back(encode(w));
  }
  {  // attention with a cache, embedding, rotation, sampling
    ProgramWriter w;
    const int r = w.dim(DimKind::Set, 4), o = w.constant(3), s = w.constant(2), q = w.constant(4), c = w.constant(2);
    const int v = w.constant(7), four = w.constant(4), h = w.constant(2);
    const int ids = w.feedIds({r}), positions = w.feedIds({r}), offsets = w.feedIds({o}), params = w.feed({s, four});
    const int table = w.bound(DType::BF16, {7, 4}), wk = w.bound(DType::F32, {2, 4}), head = w.bound(DType::F32, {7, 4});
    const int frequencies = w.bound(DType::F32, {1});
    const int lengths = w.bound(DType::I32, {4}, true), pages = w.bound(DType::I32, {4, 1}, true);
    const int slots = w.bound(DType::I32, {2}, true), k = w.bound(DType::F32, {4, 5, 2}, true);
    const int values = w.bound(DType::F32, {4, 5, 2}, true);
    const int x = w.temp({r, q}), rotated = w.temp({r, q}), key = w.temp({r, c}), y = w.temp({r, q});
    const int full = w.temp({r, q}), lse = w.temp({r, h});
    w.step("embedding", {table, ids}, {x});
    w.step("rope", {x, positions, frequencies}, {rotated}, {2, 1, 1});
    w.step("linear", {x, wk, -1, -1, -1, -1}, {key, -1}, {0});
    w.step("attention", {rotated, key, key, offsets, -1, -1, -1}, {full, lse}, {2, 1, 1, 0.7, 2, 5});
    w.step("attention_grad", {x, rotated, key, key, full, lse, offsets, -1, -1, -1},
           {w.output({r, q}), w.output({r, c}), w.output({r, c})}, {2, 1, 1, 0.7, 2, 5});
    w.step("cache_append", {key, key, offsets, slots, lengths, pages, k, values}, {});
    w.step("attention_cached", {rotated, offsets, slots, lengths, pages, k, values, -1, -1, -1}, {y}, {2, 1, 0.7, 2, 5});
    const int logits = w.temp({s, v}), rows = w.feedIds({s}), picked = w.temp({s, q});
    w.step("gather_rows", {y, rows}, {picked});
    w.step("linear", {picked, head, -1, -1, -1, -1}, {logits, -1}, {0});
    w.step("sample", {logits, params}, {w.tensor(TensorKind::Output, DType::I32, {s}), w.output({s})});
    w.step("embedding_grad", {y, ids}, {w.output({v, q})});
    programs.push_back(encode(w));
  }
  {  // attention of the rows that a router selects, and what its scores learn from that
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 5), r = w.dim(DimKind::Produced, 5), o = w.constant(3), s = w.constant(2);
    const int q = w.constant(4), c = w.constant(2), h = w.constant(2), one = w.constant(1);
    const int x = w.feed({n, q}), key = w.feed({n, c}), z = w.feed({n, one}), threshold = w.feed({s});
    const int offsets = w.feedIds({o}), after = w.feed({n, q}), weight = w.feed({n});
    const int lengths = w.bound(DType::I32, {4}, true), pages = w.bound(DType::I32, {4, 2}, true);
    const int slots = w.feedIds({s}), k = w.bound(DType::F32, {4, 4, 2}, true);
    const int values = w.bound(DType::F32, {4, 4, 2}, true);
    const int rows = w.tensor(TensorKind::Temp, DType::I32, {r});
    const int rowOffsets = w.tensor(TensorKind::Temp, DType::I32, {o});
    const int queries = w.temp({r, q}), y = w.temp({r, q}), lse = w.temp({r, h}), bias = w.feed({h, w.constant(5)});
    w.step("route_threshold", {z, offsets, threshold}, {rows, rowOffsets});
    w.step("gather_rows", {x, rows}, {queries});
    w.step("attention", {queries, key, key, offsets, rows, rowOffsets, bias}, {y, lse}, {2, 1, 1, 0.7, 2, 0});
    w.step("attention", {queries, key, key, offsets, -1, rowOffsets, -1}, {w.output({r, q}), -1}, {2, 1, 0, 0.7, 0, 0});
    w.step("attention_grad", {queries, queries, key, key, y, lse, offsets, rows, rowOffsets, bias},
           {w.output({r, q}), w.output({n, c}), w.output({n, c})}, {2, 1, 1, 0.7, 2, 0});
    w.step("cache_append", {key, key, offsets, slots, lengths, pages, k, values}, {});
    w.step("attention_cached", {queries, offsets, slots, lengths, pages, k, values, rows, rowOffsets, bias}, {w.output({r, q})},
           {2, 1, 0.7, 2, 0});
    w.step("page_copy", {w.bound(DType::I32, {2}, true), w.bound(DType::I32, {2}, true), k, values}, {});
    w.step("topk_credit", {x, x, after, z, offsets, rowOffsets, weight}, {w.output({n, one})});
    const int pooled = w.temp({s, q}), held = w.feed({s, q}), kept = w.temp({s, q});
    w.step("segment_sum", {x, offsets}, {pooled}, {2, 1});
    w.step("latch", {pooled, held}, {kept});
    w.step("segment_broadcast", {kept, offsets}, {w.output({n, q})}, {0, 0});
    programs.push_back(encode(w));
  }
  {  // rows that choose experts, their gates, what trains the choice and the balance of loads
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 6), e = w.constant(3), o = w.constant(3), s = w.constant(2), one = w.constant(1);
    const int r = w.dim(DimKind::Produced, 6);
    const int z = w.feed({n, e}), offsets = w.feedIds({o}), share = w.feed({s});
    const int rows = w.tensor(TensorKind::Temp, DType::I32, {r});
    const int gates = w.temp({r}), loss = w.temp({one}), entered = w.temp({r, e});
    const int h = w.feed({n, w.constant(6)}), weight = w.feed({n}), starts = w.tensor(TensorKind::Temp, DType::I32, {o});
    const int positions = w.feedIds({n}), held = w.feed({s, w.constant(8)}), tiled = w.temp({n, e});
    w.step("tile_scores", {z, positions, offsets, held}, {tiled, w.output({s, w.constant(8)})}, {2});
    w.step("tile_scores", {z, positions, offsets, -1}, {w.output({n, e}), -1}, {2});
    w.step("tile_scores_grad", {tiled, positions, offsets, held}, {w.output({n, e})}, {2});
    w.step("expert_rows", {z, offsets, share}, {rows, starts}, {1, 0});
    w.step("expert_gate", {z, offsets, share, rows}, {gates}, {1, 0, 2});
    w.step("expert_gate_grad", {gates, z, offsets, share, rows}, {w.output({n, e})}, {1, 0, 1});
    w.step("gather_rows", {z, rows}, {entered});
    w.step("expert_credit", {h, h, z, offsets, share, weight, -1}, {w.output({n, e})}, {0});
    w.step("expert_credit", {h, h, entered, starts, share, weight, rows}, {w.output({r, e})}, {0});
    w.step("expert_balance", {z, offsets, share}, {loss}, {1});
    w.step("expert_balance_grad", {loss, z, offsets, share}, {w.output({n, e})}, {1});
    programs.push_back(encode(w));
  }
  {  // losses, their gradients, and the optimizer
    ProgramWriter w;
    const int r = w.dim(DimKind::Set, 5), k = w.constant(3), v = w.constant(6), one = w.constant(1);
    const int p = w.constant(24), eight = w.constant(8);
    const int student = w.feed({r, k}), teacher = w.feed({r, k}), weight = w.feed({r}), targets = w.feedIds({r});
    const int hyper = w.feed({eight}), head = w.bound(DType::F16, {6, 4}), trained = w.bound(DType::F32, {6, 4}, true);
    std::vector<int> states;
    for (int i = 0; i < 4; ++i) states.push_back(w.bound(DType::F32, {24}, true));
    const int dh = w.temp({r, k}), dw = w.temp({v, k}), norm = w.temp({r, k}), mean = w.temp({r}), rstd = w.temp({r});
    const int scaled = w.temp({r, k}), loss = w.temp({one}), sum = w.temp({r, k});
    w.step("divergence", {student, teacher, head, weight, targets, head},
           {w.output({one}), w.output({r}), dh, w.output({r}), w.output({r})}, {2, 0.3, 4, 5});
    w.step("cross_entropy", {student, trained, targets, weight}, {loss, -1, scaled, dw, w.output({r})}, {3});
    w.step("layer_norm", {student, w.bound(DType::F32, {3}), w.bound(DType::F32, {3}), -1}, {norm, mean, rstd}, {1e-5});
    w.step("layer_norm_grad", {dh, student, w.bound(DType::F32, {3}), mean, rstd, -1},
           {w.output({r, k}), w.output({k}), w.output({k})});
    w.step("add", {dh, scaled}, {sum});
    w.step("scale", {sum, loss}, {w.output({r, k})}, {0.5});
    w.step("activation", {norm}, {w.output({r, k})}, {1});
    w.step("scale_columns", {norm, w.bound(DType::BF16, {3})}, {w.output({r, k})});
    w.step("add_scaled", {norm, student, teacher}, {w.output({r, k})}, {2, 1});
    w.step("add_scaled_grad", {norm, student, teacher}, {w.output({r, k}), w.output({r, k})}, {1, 0});
    w.step("rescale_rows", {norm, student}, {w.output({r, k})}, {1e-5});
    w.step("rescale_rows_grad", {norm, student, teacher}, {w.output({r, k}), w.output({r, k})}, {1e-5});
    w.step("gaussian_topk", {norm}, {w.output({r, k})}, {0.5});
    w.step("gaussian_topk_grad", {norm, student}, {w.output({r, k})}, {0.5});
    w.step("softcap", {norm}, {w.output({r, k})}, {3});
    w.step("softcap_grad", {norm, student}, {w.output({r, k})}, {3});
    w.step("gated_activation_grad", {norm, student, teacher}, {w.output({r, k}), w.output({r, k})}, {3});
    w.step("linear_dx", {w.feed({r, v}), head, norm}, {w.output({r, k})});
    w.step("accumulate", {states[1], dw}, {}, {2, 3});
    w.step("adamw", {states[0], states[1], states[2], states[3], hyper}, {w.output({one})}, {12});
    w.step("zeros", {}, {w.output({p})});
    w.step("dot", {weight, mean}, {w.output({one})});
    programs.push_back(encode(w));
  }
  {  // losses on the largest logits, and between residual streams
    ProgramWriter w;
    const int r = w.dim(DimKind::Set, 5), k = w.constant(3), t = w.constant(2), one = w.constant(1);
    const int student = w.feed({r, k}), teacher = w.feed({r, k}), weight = w.feed({r});
    const int head = w.bound(DType::BF16, {6, 4});
    const int ids = w.tensor(TensorKind::Temp, DType::I32, {r, t}), logp = w.temp({r, t}), rest = w.temp({r});
    w.step("top_logits", {teacher, head}, {ids, logp, rest}, {2});
    w.step("topk_divergence", {student, head, ids, logp, rest, weight},
           {w.output({one}), w.output({r}), w.output({r, k})}, {1, 2});
    w.step("hidden_distance", {student, teacher, weight}, {w.output({one}), w.output({r}), w.output({r, k})}, {1});
    programs.push_back(encode(w));
  }
  {  // routing by threshold, moving rows and ids
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 6), r = w.dim(DimKind::Produced, 6), d = w.constant(3), one = w.constant(1);
    const int o = w.constant(3), segments = w.constant(2);
    const int x = w.feed({n, d}), u = w.feed({n, d}), z = w.feed({n, one}), threshold = w.feed({segments});
    const int offsets = w.feedIds({o}), ids = w.feedIds({n});
    const int rows = w.tensor(TensorKind::Temp, DType::I32, {r});
    const int rowOffsets = w.tensor(TensorKind::Temp, DType::I32, {o});
    const int gated = w.temp({n, d}), dx = w.temp({n, d}), picked = w.temp({r, d}), loss = w.temp({one});
    w.step("route_threshold", {z, offsets, threshold}, {rows, rowOffsets});
    w.step("gated_activation", {x, u}, {gated}, {3});
    w.step("activation_grad", {gated, x}, {dx}, {2});
    w.step("gather_rows", {dx, rows}, {picked});
    w.step("scatter_add", {gated, picked, rows}, {w.output({n, d})});
    w.step("gather_ids", {ids, rows}, {w.tensor(TensorKind::Output, DType::I32, {r})});
    w.step("topk_bce", {z, rows}, {loss});
    w.step("topk_bce_grad", {loss, z, rows}, {w.output({n, one})});
    programs.push_back(encode(w));
  }
  return programs;
}

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed), corpus_(corpus()) {
    std::set<std::string> used;
    for (const Encoded& program : corpus_) {
      build(program);
      used.insert(program.opNames.begin(), program.opNames.end());
    }
    for (const OpDef& op : opDefs()) {
      if (!used.count(op.name)) fail(ErrorCode::Internal, "no program of the corpus uses %s", op.name);
    }
  }

  void iterate() {
    Encoded program = corpus_[below(corpus_.size())];
    if (below(4) != 0) separate(program);
    const size_t mutations = below(5);
    for (size_t i = 0; i < mutations; ++i) mutate(program);
    std::shared_ptr<const Program> built;
    try {
      built = build(program);
    } catch (const Error& error) {
      if (error.code == ErrorCode::Internal) throw;
      return;
    }
    ++accepted;
    run(built);
  }

  int64_t accepted = 0, completed = 0;

 private:
  size_t below(size_t n) { return static_cast<size_t>(random_() % n); }

  static std::shared_ptr<const Program> build(const Encoded& program) {
    // Copies without slack, so that reading past an end is seen.
    const std::vector<int32_t> code(program.code);
    const std::vector<double> attributes(program.attributes);
    return buildProgram({code.data(), code.size(), attributes.data(), attributes.size(), program.opNames, program.bound},
                        cpu::findKernel, cpu::findKernelOfSteps);
  }

  static size_t tensorsAt(const Encoded& program) { return 6 + 2 * static_cast<size_t>(program.code[2]); }
  static size_t stepsAt(const Encoded& program) {
    return tensorsAt(program) + 7 * static_cast<size_t>(program.code[3]);
  }

  // Temporaries become outputs: buffers of their own.
  static void separate(Encoded& program) {
    for (size_t at = tensorsAt(program); at < stepsAt(program); at += 7) {
      if (program.code[at] == static_cast<int32_t>(TensorKind::Temp) && isWritten(program, (at - tensorsAt(program)) / 7)) {
        program.code[at] = static_cast<int32_t>(TensorKind::Output);
      }
    }
  }
  static bool isWritten(const Encoded& program, size_t tensor) {
    size_t at = stepsAt(program);
    for (int32_t step = 0; step < program.code[4]; ++step) {
      const size_t in = static_cast<size_t>(program.code[at + 2]), out = static_cast<size_t>(program.code[at + 3]);
      for (size_t i = at + 6 + in; i < at + 6 + in + out; ++i) {
        if (program.code[i] == static_cast<int32_t>(tensor)) return true;
      }
      at += 6 + in + out;
    }
    return false;
  }

  void mutate(Encoded& program) {
    static constexpr int32_t kInteresting[] = {-1, 0, 1, 2, 3, 4, 5, 7, 8, 64, -2, 1 << 20, 0x7fffffff, INT32_MIN};
    static constexpr double kAttributes[] = {0, 1, 2, 3, 4, 5, -1, 0.5, 1e9, -1e300, 1e300, INFINITY, NAN};
    std::vector<int32_t>& code = program.code;
    const auto position = [&] { return code.begin() + static_cast<ptrdiff_t>(below(code.size())); };
    if (code.empty()) return;
    switch (below(12)) {
      case 0: *position() = kInteresting[below(std::size(kInteresting))]; break;
      case 1: {
        const auto at = position();
        *at = static_cast<int32_t>(static_cast<uint32_t>(*at) + below(3) - 1);
        break;
      }
      case 2: *position() = *position(); break;
      case 3: std::iter_swap(position(), position()); break;
      case 4: code.erase(position()); break;
      case 5: code.insert(position(), kInteresting[below(std::size(kInteresting))]); break;
      case 6: code.resize(below(code.size() + 1)); break;
      case 7:
        if (!program.attributes.empty()) {
          program.attributes[below(program.attributes.size())] = kAttributes[below(std::size(kAttributes))];
        }
        break;
      case 8: program.opNames[below(program.opNames.size())] = opDefs()[below(opDefs().size())].name; break;
      case 9:  // one operand or dim becomes another: the likeliest way to a program that is valid and odd
      case 10: *position() = static_cast<int32_t>(below(12)); break;
      default:
        if (!program.bound.empty()) {
          static constexpr DType kTypes[] = {DType::F32, DType::BF16, DType::F16, DType::I32};
          std::vector<int64_t> shape(1 + below(4));
          for (int64_t& extent : shape) extent = 1 + static_cast<int64_t>(below(8));
          program.bound[below(program.bound.size())] =
              ProgramWriter::makeTensor(kTypes[below(4)], shape, below(2) == 0);
        }
    }
  }

  void run(const std::shared_ptr<const Program>& program) {
    int64_t bytes = program->arenaBytes;
    for (const TensorDef& tensor : program->tensors) bytes += tensor.boundBytes;
    if (bytes > (1 << 20) || program->dims.empty()) return;
    std::vector<int32_t> dims;
    const bool full = below(2) == 0;
    for (const Dim& dim : program->dims) {
      dims.push_back(static_cast<int32_t>(full ? dim.bound : 1 + static_cast<int64_t>(below(static_cast<size_t>(dim.bound)))));
    }
    Job job(program, dims.data(), dims.size());
    for (size_t slot = 0; slot < program->feeds.size(); ++slot) feed(job, slot);
    for (const auto& tensor : program->bound) {  // slots, pages, and cache lengths, which runs would only ever raise
      if (tensor->dtype != DType::I32 || !tensor->storage->writable) continue;
      for (size_t i = 0; i < tensor->storage->bytes; i += 4) tensor->storage->data[i] = static_cast<uint8_t>(below(4));
    }
    runJob(job, workspace_);
    if (!job.error) ++completed;
    if (job.error && job.error->code == ErrorCode::Internal) throw *job.error;
  }

  // Plausible values, so that the checks of a kernel are passed often enough to reach what follows.
  void feed(Job& job, size_t slot) {
    const int tensor = job.program->feeds[slot];
    const auto count = static_cast<size_t>(job.elements(tensor));
    const DType dtype = job.program->tensors[tensor].dtype;
    std::vector<float> floats(count);
    std::vector<int32_t> ids(count);
    const size_t style = below(6);
    for (size_t i = 0; i < count; ++i) {
      floats[i] = style == 0 ? NAN : static_cast<float>(static_cast<double>(below(2001)) / 1000.0 - (style < 4 ? 0 : 1));
      if (style == 1) floats[i] = 1;
      ids[i] = style == 0 ? static_cast<int32_t>(random_()) : static_cast<int32_t>(i);  // ascending: rows, positions
    }
    if (style >= 2 && count > 0) {  // offsets end with the rows, which are dim 0 of every program
      ids.back() = static_cast<int32_t>(job.dims[style < 5 ? 0 : below(job.dims.size())]);
    }
    job.setFeed(slot, dtype, dtype == DType::F32 ? static_cast<const void*>(floats.data()) : ids.data(), count);
  }

  std::mt19937_64 random_;
  std::vector<Encoded> corpus_;
  Workspace workspace_;
};

}  // namespace
}  // namespace elastiform::test

int main(int argc, char** argv) {
  using namespace elastiform;
  const long long iterations = argc > 1 ? std::atoll(argv[1]) : 20000;
  const unsigned long long seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const double seconds = argc > 3 ? std::atof(argv[3]) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  test::Fuzzer fuzzer(seed);
  long long i = 0;
  std::printf("fuzz: up to %lld iterations from seed %llu\n", iterations, seed);
  std::fflush(stdout);
  try {
    for (; i < iterations && (seconds <= 0 || elapsed() < seconds); ++i) fuzzer.iterate();
  } catch (const Error& error) {
    std::fprintf(stderr, "fuzz: iteration %lld of seed %llu: %s\n", i, seed, error.what());
    return 1;
  }
  std::printf("fuzz: %lld programs, %lld accepted, %lld ran to their end, %.1f s\n", i,
              static_cast<long long>(fuzzer.accepted), static_cast<long long>(fuzzer.completed), elapsed());
  return 0;
}
