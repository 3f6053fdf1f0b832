// Tests of the runtime: pool, signatures, program validation, memory plan, engine, file mapping.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <random>
#include <thread>

#include "core/pool.h"
#include "cpu/kernels.h"
#include "io/mapping.h"
#include "runtime/plan.h"
#include "runtime/signature.h"
#include "test/program_writer.h"
#include "test/test.h"

namespace elastiform::test {
namespace {

std::shared_ptr<const Program> build(const ProgramWriter& writer) { return writer.build(cpu::findKernel, cpu::findKernelOfSteps); }

std::shared_ptr<Job> makeJob(const std::shared_ptr<const Program>& program, std::vector<int32_t> dims,
                             const std::vector<std::vector<float>>& feeds) {
  dims.resize(program->dims.size());
  auto job = std::make_shared<Job>(program, dims.data(), dims.size());
  for (size_t i = 0; i < feeds.size(); ++i) job->setFeed(i, DType::F32, feeds[i].data(), feeds[i].size());
  return job;
}

std::vector<float> outputOf(const Job& job, size_t slot) {
  const auto* data = reinterpret_cast<const float*>(job.outputs[slot].data());
  return {data, data + job.elements(job.program->outputs[slot])};
}

int testPool() {
  int failures = 0;
  const int before = threadCount();
  for (const int threads : {1, 2, 5, 3}) {
    setThreadCount(threads);
    CHECK(threadCount() == threads);
    for (int round = 0; round < 300; ++round) {
      const int64_t chunks = 1 + round % 41;
      std::vector<std::atomic<int>> seen(static_cast<size_t>(chunks));
      std::vector<std::atomic<int>> busy(static_cast<size_t>(threads));
      std::atomic<bool> clash{false};
      parallelFor(
          chunks,
          [&](int64_t chunk, int worker) {
            if (worker < 0 || worker >= threads || busy[worker].exchange(1) != 0) clash = true;
            ++seen[chunk];
            busy[worker] = 0;
          },
          nullptr);
      CHECK(!clash);
      for (const auto& count : seen) CHECK(count == 1);
    }
  }

  CHECK_ERROR(InvalidData, "chunk 7", parallelFor(
                                          50,
                                          [](int64_t chunk, int) {
                                            if (chunk == 7) fail(ErrorCode::InvalidData, "chunk 7");
                                          },
                                          nullptr));
  std::atomic<bool> abort{false};
  std::atomic<int> ran{0};
  CHECK_ERROR(Aborted, "aborted", parallelFor(
                                      1000000,
                                      [&](int64_t, int) {
                                        if (++ran == 5) abort = true;
                                      },
                                      &abort));
  CHECK(ran < 100);
  CHECK_ERROR(Internal, "inside a chunk",
              parallelFor(4, [](int64_t, int) { parallelFor(2, [](int64_t, int) {}, nullptr); }, nullptr));
  CHECK_ERROR(InvalidArgument, "threads must be in", setThreadCount(0));

  // Several callers at once, as several engines make them, while the size changes under them.
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) parallelFor(6, [&](int64_t chunk, int) { total += chunk; }, nullptr);
    });
  }
  for (int i = 0; i < 20; ++i) setThreadCount(1 + i % 4);
  for (auto& caller : callers) caller.join();
  CHECK(total == 4 * 500 * 15);
  setThreadCount(before);
  return failures;
}

int testSignatures() {
  int failures = 0;
  for (size_t op = 0; op < opDefs().size(); ++op) {
    const Signature& signature = signatureOf(static_cast<int>(op));
    CHECK(signature.inputs.size() <= kMaxOperands && signature.outputs.size() <= kMaxOperands);
    CHECK(cpu::findKernel(opDefs()[op].name) != nullptr);
    CHECK(findOp(opDefs()[op].name) == static_cast<int>(op));
    const int inplace = opDefs()[op].inplace;
    CHECK(inplace < static_cast<int>(signature.inputs.size()));
    CHECK(inplace < 0 || (!signature.outputs.empty() && !signature.outputs[0].optional));
  }
  const Signature linear = parseSignature("x:f32[M,K] w:w[N<,K<] rows?:i32[R] s!:f32[8] -> y:f32[R|M,N] z?:i32[+Q]");
  CHECK(linear.inputs.size() == 4 && linear.outputs.size() == 2 && linear.producedDims == 1);
  CHECK(linear.inputs[1].dims[0].prefix && linear.inputs[1].type == OperandPattern::Type::Weight);
  CHECK(linear.inputs[2].optional && linear.inputs[3].writable && linear.inputs[3].dims[0].value == 8);
  CHECK(linear.outputs[0].dims[0].letter == 'R' && linear.outputs[0].dims[0].otherwise == 'M');
  CHECK(linear.introducer('R') == 2 && linear.introducer('N') == -1);
  CHECK(parseSignature("-> y:f32[*X]").outputs[0].wholeShape == 'X');
  CHECK_ERROR(Internal, "a dtype expected", parseSignature("x:f64[N] -> y:f32[N]"));
  CHECK_ERROR(Internal, "an operand name expected", parseSignature("x:f32[N]"));
  return failures;
}

// y = x w^T + rows etc.: a writer with the parts that the bad programs below spoil.
struct Sample {
  ProgramWriter writer;
  int m, k, n, r;
  int x, w, y;
  Sample() {
    m = writer.dim(DimKind::Set, 8);
    k = writer.constant(4);
    n = writer.constant(3);
    r = writer.dim(DimKind::Produced, 8);
    x = writer.feed({m, k});
    w = writer.bound(ProgramWriter::makeTensor(DType::F32, {3, 4}), {n, k});
    y = writer.output({m, n});
  }
};

template <typename Change>
void buildChanged(const Change& change) {
  Sample sample;
  sample.writer.step("linear", {sample.x, sample.w, -1, -1, -1, -1}, {sample.y, -1}, {0});
  std::vector<int32_t> code = sample.writer.code();
  std::vector<double> attributes = sample.writer.attributes();
  std::vector<std::string> names = sample.writer.opNames();
  std::vector<std::shared_ptr<Tensor>> tensors = sample.writer.boundTensors();
  change(code, attributes, names, tensors);
  buildProgram({code.data(), code.size(), attributes.data(), attributes.size(), names, tensors}, cpu::findKernel,
               cpu::findKernelOfSteps);
}
#define BAD(text, change)                                                                                     \
  CHECK_ERROR(InvalidProgram, text,                                                                           \
              buildChanged([]([[maybe_unused]] auto& code, [[maybe_unused]] auto& attributes,                 \
                              [[maybe_unused]] auto& names, [[maybe_unused]] auto& tensors) { change; }))

int testBadEncodings() {
  int failures = 0;
  // Layout: 6 of header, 4 dims x 2 from 6, 3 tensors x 7 from 14, one step from 35.
  BAD("magic number", code[0] = 1);
  BAD("version must be 1, got 2", code[1] = 2);
  BAD("number of dims must be", code[2] = -1);
  BAD("number of tensors must be", code[3] = 1 << 30);
  BAD("code ends where a step should be", code.pop_back());
  BAD("code ends where magic should be", code.clear());
  BAD("2 values follow the last step", code.push_back(0); code.push_back(0));
  BAD("dim 0: kind must be in [0, 2], got 7", code[6] = 7);
  BAD("dim 1: value must be at least 1, got 0", code[9] = 0);
  BAD("tensor 0: kind must be in", code[14] = 4);
  BAD("tensor 0: dtype must be in", code[15] = -1);
  BAD("tensor 0: rank must be in [1, 4], got 0", code[16] = 0);
  BAD("tensor 0: dim 99 is no dim", code[17] = 99);
  BAD("tensor 0: dim 0 is no dim", code[20] = 0);
  BAD("tensor 0: a feed cannot have a dim that an op produces", code[17] = 3);
  BAD("may hold more than", code[7] = code[9] = 0x7fffffff);
  BAD("tensor 1: only 0 bound tensors were given", tensors.clear());
  BAD("0 bound tensors wanted, got 1", code[21] = 2);
  BAD("tensor 1: dtype must be f32 as bound, got bf16", code[22] = 1);
  BAD("tensor 1: rank must be 2 as bound, got 1", code[23] = 1; code[25] = -1);
  BAD("tensor 1: dim 0 must be the constant 3 as bound, got 4", code[24] = 1);
  BAD("unknown op \"nonsense\"", names[0] = "nonsense");
  BAD("step 0: op must be in [0, 1), got 3", code[35] = 3);
  BAD("step 0 (linear): tag must be in [0, 1), got 1", code[36] = 1);
  BAD("step 0 (linear): 6 inputs wanted, got 5", code[37] = 5);
  BAD("step 0 (linear): 2 outputs wanted, got 1", code[38] = 1);
  BAD("step 0 (linear): 1 attributes wanted, got 0", code[39] = 0);
  BAD("step 0 (linear): attributes 1.. lie outside", code[40] = 1);
  BAD("step 0 (linear): attribute act is NaN", attributes[0] = NAN);
  BAD("step 0 (linear): x is missing", code[41] = -1);
  BAD("step 0 (linear): x must be a tensor in [0, 3) or -1, got 3", code[41] = 3);
  BAD("step 0 (linear): x (tensor 2) is read before it is written", code[41] = 2);
  BAD("step 0 (linear): y must be a temporary or an output, got a feed", code[47] = 0);
  BAD("step 0 (linear): pre (tensor 2) is written twice", code[48] = 2);
  BAD("step 0 (linear): w[0] must be at least N = 4, got 3", code[32] = 1);
  return failures;
}

int testBadPrograms() {
  int failures = 0;
  {
    Sample s;
    CHECK_ERROR(InvalidProgram, "output tensor 2 is never written", build(s.writer));
  }
  {
    Sample s;  // K of x is 3 where the weight has only 4 x 3
    const int x = s.writer.feed({s.m, s.writer.constant(5)});
    s.writer.step("linear", {x, s.w, -1, -1, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "step 0 (linear): w[1] must be at least K = 5, got 4", build(s.writer));
  }
  {
    Sample s;
    const int x = s.writer.feedIds({s.m, s.k});
    s.writer.step("linear", {x, s.w, -1, -1, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "x must be f32, got i32", build(s.writer));
  }
  {
    Sample s;
    const int w = s.writer.bound(DType::F32, {12});
    s.writer.step("linear", {s.x, w, -1, -1, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "w must have rank 2, got 1", build(s.writer));
  }
  {
    Sample s;
    const int w = s.writer.bound(DType::I32, {3, 4});
    s.writer.step("linear", {s.x, w, -1, -1, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "w must be f32, bf16 or f16, got i32", build(s.writer));
  }
  {
    Sample s;
    s.writer.step("linear", {s.w, s.w, -1, -1, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "y[0] must be M = 3, got dim 0 (at most 8)", build(s.writer));
  }
  {
    Sample s;
    const int rows = s.writer.feedIds({s.n});  // with rows present, y has R rows and not M
    s.writer.step("linear", {s.x, s.w, -1, rows, -1, -1}, {s.y, -1}, {0});
    CHECK_ERROR(InvalidProgram, "y[0] must be R = 3, got dim 0 (at most 8)", build(s.writer));
  }
  {
    Sample s;
    const int t = s.writer.temp({s.m, s.k});
    s.writer.step("add", {s.x, s.w}, {t});
    CHECK_ERROR(InvalidProgram, "step 0 (add): b must have the shape of the other operands", build(s.writer));
  }
  {
    Sample s;  // a dim used before an op has produced it
    const int t = s.writer.temp({s.r, s.k});
    s.writer.step("zeros", {}, {t});
    CHECK_ERROR(InvalidProgram, "y has dim 3 before an op has produced it", build(s.writer));
  }
  for (const bool twice : {false, true}) {
    Sample s;
    const int one = s.writer.constant(1), o = s.writer.constant(2);
    const int z = s.writer.feed({s.m, one}), offsets = s.writer.feedIds({o}), capacity = s.writer.feed({one});
    const auto rows = [&](int dim) { return s.writer.tensor(TensorKind::Temp, DType::I32, {dim}); };
    s.writer.step("route_topk", {z, offsets, capacity}, {rows(twice ? s.r : s.m), rows(o)});
    if (twice) s.writer.step("route_topk", {z, offsets, capacity}, {rows(s.r), rows(o)});
    CHECK_ERROR(InvalidProgram, twice ? "dim 3 of rows is produced twice" : "must be of the kind that an op produces",
                build(s.writer));
  }
  for (const bool readOnly : {true, false}) {
    Sample s;
    const int size = s.writer.constant(16);
    const int state = readOnly ? s.writer.bound(ProgramWriter::makeTensor(DType::F32, {16}), {size}) : s.writer.feed({size});
    s.writer.step("accumulate", {state, s.x}, {}, {0, 1});
    CHECK_ERROR(InvalidProgram, readOnly ? "state is written to and must be writable" : "state must be a state tensor, got a feed",
                build(s.writer));
  }
  {
    Sample s;
    const auto strided = ProgramWriter::makeTensor(DType::F32, {3, 4}, true);
    std::swap(strided->strides[0], strided->strides[1]);
    std::swap(strided->shape[0], strided->shape[1]);
    const int t = s.writer.temp({s.k, s.n}), a = s.writer.bound(strided, {s.k, s.n});
    s.writer.step("add", {a, a}, {t});
    CHECK_ERROR(InvalidProgram, "a must be contiguous", build(s.writer));
  }
  {
    Sample s;
    const int hyper = s.writer.feed({s.k});
    const int state = s.writer.bound(DType::F32, {16}, true), out = s.writer.output({s.writer.constant(1)});
    s.writer.step("adamw", {state, state, state, state, hyper}, {out}, {16});
    CHECK_ERROR(InvalidProgram, "hyper[0] must be 8, got 4", build(s.writer));
  }
  return failures;
}

// Random elementwise programs: tensors that live at the same time must not share bytes, and sharing must not change
// what a program computes.
int testMemoryPlan() {
  int failures = 0;
  std::mt19937 random(7);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  for (int round = 0; round < 300; ++round) {
    const uint32_t seed = random();
    std::vector<std::vector<float>> results[2];
    for (const bool shared : {false, true}) {
      random.seed(seed);
      ProgramWriter writer;
      // Two shapes of very different sizes, one of them set at run.
      const int n = writer.dim(DimKind::Set, 40);
      const std::vector<std::vector<int>> shapes{{n, writer.constant(3)}, {writer.constant(1 + static_cast<int>(below(30)))}};
      std::vector<int> alive[2];
      for (const int shape : {0, 1}) alive[shape].push_back(writer.feed(shapes[shape]));
      const int steps = 2 + static_cast<int>(below(30));
      for (int s = 0; s < steps; ++s) {
        const size_t shape = below(2);
        const auto operand = [&] { return alive[shape][alive[shape].size() - 1 - below(std::min<size_t>(alive[shape].size(), 4))]; };
        const bool output = below(6) == 0 || !shared;
        const int y = writer.tensor(output ? TensorKind::Output : TensorKind::Temp, DType::F32, shapes[shape]);
        switch (below(4)) {
          case 0: writer.step("scale", {operand(), -1}, {y}, {0.5}); break;
          case 1: writer.step("activation", {operand()}, {y}, {1}); break;
          case 2: {
            const int a = operand(), b = operand();
            writer.step("add", {a, b}, {y});
            break;
          }
          default: {
            const int a = operand(), b = operand(), c = operand();
            const int second = writer.tensor(output ? TensorKind::Output : TensorKind::Temp, DType::F32, shapes[shape]);
            writer.step("gated_activation_grad", {a, b, c}, {y, second}, {3});
            alive[shape].push_back(second);
          }
        }
        alive[shape].push_back(y);
      }
      const int last[2] = {alive[0].back(), alive[1].back()};
      for (const int shape : {0, 1}) writer.step("scale", {last[shape], -1}, {writer.output(shapes[shape])}, {1});

      const auto program = build(writer);
      std::vector<int> first(program->tensors.size(), -1), final(program->tensors.size(), -1);
      for (size_t s = 0; s < program->steps.size(); ++s) {
        for (const int t : program->steps[s].in) {
          if (t >= 0) final[t] = static_cast<int>(s);
        }
        for (const int t : program->steps[s].out) first[t] = final[t] = static_cast<int>(s);
      }
      for (size_t a = 0; a < program->tensors.size(); ++a) {
        const TensorDef& x = program->tensors[a];
        if (x.kind != TensorKind::Temp) continue;
        CHECK(x.arenaOffset >= 0 && x.arenaOffset % 64 == 0 && x.arenaOffset + x.boundBytes <= program->arenaBytes);
        for (size_t b = 0; b < program->tensors.size(); ++b) {
          const TensorDef& y = program->tensors[b];
          if (a == b || y.kind != TensorKind::Temp || first[a] > final[b] || first[b] > final[a]) continue;
          const bool overlap = x.arenaOffset < y.arenaOffset + y.boundBytes && y.arenaOffset < x.arenaOffset + x.boundBytes;
          if (!overlap) continue;
          // Only a takeover may overlap: one ends as an input of the step that makes the other.
          const size_t donor = first[a] < first[b] ? a : b, taker = donor == a ? b : a;
          const Step& step = program->steps[first[taker]];
          const int inplace = opDefs()[step.op].inplace;
          CHECK(final[donor] == first[taker] && inplace >= 0 && step.in[inplace] == static_cast<int>(donor) &&
                step.out[0] == static_cast<int>(taker) && x.arenaOffset == y.arenaOffset);
        }
      }
      std::vector<float> wide(3 * 17), narrow(static_cast<size_t>(program->dims[shapes[1][0]].bound));
      for (size_t i = 0; i < wide.size(); ++i) wide[i] = std::sin(static_cast<float>(i));
      for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = std::cos(static_cast<float>(i));
      Workspace workspace;
      const auto job = makeJob(program, {17}, {wide, narrow});
      runJob(*job, workspace);
      CHECK(!job->error);
      const size_t outputs = program->outputs.size();
      for (const size_t slot : {outputs - 2, outputs - 1}) results[shared].push_back(outputOf(*job, slot));
    }
    CHECK(results[0] == results[1]);
  }

  // Exact cases: disjoint lifetimes share, the smaller gap is preferred, the limit holds.
  const MemoryPlan reuse = planMemory({{100, 0, 1}, {100, 2, 3}}, 1 << 20);
  CHECK(reuse.bytes == 128 && reuse.offsets[0] == 0 && reuse.offsets[1] == 0);
  const MemoryPlan apart = planMemory({{100, 0, 2}, {64, 2, 3}}, 1 << 20);
  CHECK(apart.bytes == 192 && apart.offsets[1] == 128);
  CHECK_ERROR(InvalidProgram, "need more than 1000 bytes", planMemory({{600, 0, 1}, {600, 1, 1}}, 1000));
  return failures;
}

// Steps that are run as one give what they give one by one, whatever they are among.
int testJoined() {
  int failures = 0;
  std::mt19937 engine(5);
  const auto below = [&](size_t n) { return static_cast<int>(engine() % n); };
  int most = 0, mostAttention = 0;
  for (int round = 0; round < 60; ++round) {
    ProgramWriter w;
    const int rows = w.dim(DimKind::Set, 40), width = w.constant(24), part = w.constant(8);
    const int x = w.feed({rows, width}), offsets = w.feedIds({w.constant(3)});
    std::vector<int> weights, downs, narrow;
    for (int i = 0; i < 3; ++i) {
      weights.push_back(w.bound(ProgramWriter::makeTensor(DType::F32, {8, 24}), {part, width}));
      downs.push_back(w.bound(ProgramWriter::makeTensor(DType::F32, {24, 8}), {width, part}));
    }
    std::vector<int> wide{x};
    const auto temp = [&](std::vector<int> dims) {
      return w.tensor(below(8) == 0 ? TensorKind::Output : TensorKind::Temp, DType::F32, std::move(dims));
    };
    const auto pickOf = [&](const std::vector<int>& list) { return list[list.size() - 1 - below(std::min<size_t>(list.size(), 5))]; };
    const int steps = 6 + below(30);
    for (int s = 0; s < steps; ++s) {
      if (narrow.empty() || below(2) == 0) {
        const int from = pickOf(wide), to = temp({rows, part});
        w.step("linear", {from, weights[below(3)], -1, -1, -1, -1}, {to, -1}, {0});
        narrow.push_back(to);
      } else if (below(3) == 0) {
        const int q = pickOf(narrow), k = pickOf(narrow), v = pickOf(narrow), to = temp({rows, part});
        w.step("attention", {q, k, v, offsets, -1, -1, -1}, {to, -1}, {2, 2, 1, 0.5, 0, 0});
        narrow.push_back(to);
      } else {
        const int residual = below(3) == 0 ? pickOf(wide) : wide.back(), from = pickOf(narrow), to = temp({rows, width});
        w.step("linear_add", {residual, from, downs[below(3)], -1, -1, -1, -1, -1}, {to});
        wide.push_back(to);
      }
    }
    w.step("scale", {wide.back(), -1}, {w.output({rows, width})}, {1});
    const int count = 1 + below(40);
    std::vector<float> values(static_cast<size_t>(count) * 24);
    for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
    std::vector<std::vector<float>> results[2];
    for (const bool joined : {false, true}) {
      const auto program = joined ? build(w) : w.build(cpu::findKernel, [](const std::string&) -> KernelOfSteps { return nullptr; });
      for (const Step& step : program->steps) {
        CHECK(joined || step.count == 1);
        int& longest = std::string(opDefs()[step.op].name) == "attention" ? mostAttention : most;
        longest = std::max(longest, step.count);
      }
      Workspace workspace;
      const auto job = makeJob(program, {count}, {values});
      const int32_t ends[3] = {0, count / 3, count};
      job->setFeed(1, DType::I32, ends, 3);
      runJob(*job, workspace);
      CHECK(!job->error);
      for (size_t slot = 0; slot < program->outputs.size(); ++slot) results[joined].push_back(outputOf(*job, slot));
    }
    CHECK(results[0] == results[1]);
  }
  CHECK(most > 2 && mostAttention > 1);
  return failures;
}

int testRuns() {
  int failures = 0;
  {  // routing: a produced dim sizes what follows
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 8), r = w.dim(DimKind::Produced, 6), one = w.constant(1), o = w.constant(2);
    const int d = w.constant(2);
    const int z = w.feed({n, one}), capacity = w.feed({one}), x = w.feed({n, d}), offsets = w.feedIds({o});
    const int rows = w.tensor(TensorKind::Temp, DType::I32, {r});
    const int rowOffsets = w.tensor(TensorKind::Output, DType::I32, {o});
    const int y = w.output({r, d});
    w.tags(2);
    w.step("route_topk", {z, offsets, capacity}, {rows, rowOffsets});
    w.step("gather_rows", {x, rows}, {y}, {}, 1);
    const auto program = build(w);
    Workspace workspace;
    const auto run = [&](int count, float share) {
      std::vector<float> scores, values;
      for (int i = 0; i < count; ++i) {
        scores.push_back(static_cast<float>((i * 3) % count));
        values.insert(values.end(), {static_cast<float>(i), static_cast<float>(-i)});
      }
      const auto job = makeJob(program, {count}, {scores, {share}, values});
      const int32_t ends[2] = {0, count};
      job->setFeed(3, DType::I32, ends, 2);
      runJob(*job, workspace);
      return job;
    };
    const auto job = run(5, 0.4f);  // scores 0 3 1 4 2
    CHECK(!job->error && job->dims[r] == 2);
    CHECK((outputOf(*job, 1) == std::vector<float>{1, -1, 3, -3}));
    const auto none = run(5, 0.0f);
    CHECK(!none->error && none->dims[r] == 0 && outputOf(*none, 1).empty());
    // More rows than the bound of the produced dim: an error, nothing written past the end.
    const auto tooMany = run(8, 1.0f);
    CHECK(tooMany->error && tooMany->error->code == ErrorCode::InvalidData);
  }
  {  // arguments of a run
    Sample s;
    s.writer.step("linear", {s.x, s.w, -1, -1, -1, -1}, {s.y, -1}, {0});
    const auto program = build(s.writer);
    CHECK_ERROR(InvalidArgument, "4 dims wanted, got 1", Job(program, std::vector<int32_t>{1}.data(), 1));
    CHECK_ERROR(InvalidArgument, "dim 0 must be in [1, 8], got 9", makeJob(program, {9}, {}));
    CHECK_ERROR(InvalidArgument, "dim 0 must be in [1, 8], got 0", makeJob(program, {0}, {}));
    CHECK_ERROR(InvalidArgument, "feed 0 must hold 8 elements, got 3", makeJob(program, {2}, {{1, 2, 3}}));
  }
  {  // a state is busy while a run that writes it is pending; kernels' errors name step and op
    ProgramWriter w;
    const int n = w.dim(DimKind::Set, 8);
    const int state = w.bound(DType::F32, {4}, true), x = w.feed({n});
    w.step("accumulate", {state, x}, {}, {1, 1});
    const auto program = build(w);
    Storage& storage = *program->bound[0]->storage;
    Workspace workspace;
    {
      const auto job = makeJob(program, {3}, {{1, 1, 1}});
      CHECK(storage.pendingWriters == 1);
      runJob(*job, workspace);
      CHECK(!job->error);
      job->finish();
      CHECK(storage.pendingWriters == 0);
    }
    const auto job = makeJob(program, {4}, {{1, 1, 1, 1}});
    runJob(*job, workspace);
    CHECK(job->error && std::string(job->error->what()).find("[run] step 0 (accumulate): ") == 0);
  }
  return failures;
}

int testEngine() {
  int failures = 0;
  // Many steps over a large tensor: long enough to be aborted.
  ProgramWriter w;
  const int n = w.dim(DimKind::Set, 1 << 20);
  int x = w.feed({n});
  for (int i = 0; i < 2000; ++i) {
    const int y = w.temp({n});
    w.step("activation", {x}, {y}, {2});
    x = y;
  }
  w.step("scale", {x, -1}, {w.output({n})}, {1});
  const auto program = build(w);
  CHECK(program->arenaBytes <= 3 * (4 << 20));

  std::mutex mutex;
  std::vector<std::shared_ptr<Job>> done;
  const auto finished = [&] {
    const std::lock_guard lock(mutex);
    return done.size();
  };
  const int64_t arenaBefore = memoryCounters().arenaBytes;
  {
    Engine engine(
        [&](std::shared_ptr<Job> job) {
          const std::lock_guard lock(mutex);
          done.push_back(std::move(job));
        },
        cpu::makeRunner({}));
    const std::vector<float> large(1 << 20, 0.5f), small(4, 0.5f);
    const auto first = makeJob(program, {1 << 20}, {large}), second = makeJob(program, {4}, {small}),
               third = makeJob(program, {4}, {small});
    for (const auto& job : {first, second, third}) engine.submit(job);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    engine.abort(second);  // waiting: reported at once, out of order
    CHECK(finished() == 1 && done[0] == second && second->error->code == ErrorCode::Aborted);
    const auto start = std::chrono::steady_clock::now();
    engine.abort(first);
    while (finished() < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(2));
    CHECK(first->error && first->error->code == ErrorCode::Aborted);
    CHECK(!third->error && outputOf(*third, 0).size() == 4 && third->milliseconds > 0);
    const auto running = makeJob(program, {1 << 20}, {large}), waiting = makeJob(program, {4}, {small});
    engine.submit(running);
    engine.submit(waiting);
    engine.stop();
    CHECK(finished() == 5 && running->error && waiting->error->code == ErrorCode::Disposed);
    CHECK_ERROR(Disposed, "the engine is disposed", engine.submit(makeJob(program, {4}, {small})));
  }
  CHECK(memoryCounters().arenaBytes == arenaBefore);
  return failures;
}

int testScratch() {
  int failures = 0;
  Workspace workspace;
  auto* a = static_cast<uint8_t*>(workspace.scratch(100));
  auto* b = static_cast<uint8_t*>(workspace.scratch(1 << 20));  // does not fit: a second block, the first stays valid
  std::memset(a, 1, 100);
  std::memset(b, 2, 1 << 20);
  CHECK(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0);
  CHECK(a[99] == 1);
  workspace.resetScratch();
  const int64_t reserved = memoryCounters().arenaBytes;
  for (int i = 0; i < 10; ++i) {
    workspace.scratch(100);
    workspace.scratch(1 << 20);
    workspace.resetScratch();
  }
  CHECK(memoryCounters().arenaBytes == reserved);
  CHECK_ERROR(OutOfMemory, "cannot allocate", workspace.scratch(static_cast<size_t>(-1) / 2));
  return failures;
}

int testMapping() {
  int failures = 0;
  const auto folder = std::filesystem::temp_directory_path() / ("elastiform-mapping-" + std::to_string(std::random_device{}()));
  std::filesystem::create_directory(folder);
  const auto full = (folder / "full").string(), empty = (folder / "empty").string();
  std::ofstream(full) << "0123456789";
  std::ofstream(empty).close();
  const int64_t before = memoryCounters().mappedBytes;
  {
    const auto storage = mapFile(full);
    CHECK(storage->bytes == 10 && storage->data[3] == '3' && !storage->writable);
    CHECK(memoryCounters().mappedBytes == before + 10);
    storage->evict(0, 10);
    CHECK(storage->data[9] == '9');
  }
  CHECK(memoryCounters().mappedBytes == before);
  CHECK_ERROR(InvalidFile, "the file is empty", mapFile(empty));
  CHECK_ERROR(InvalidFile, "missing", mapFile((folder / "missing").string()));
  CHECK_ERROR(InvalidFile, "not a regular file", mapFile(folder.string()));
  std::filesystem::remove_all(folder);
  return failures;
}

}  // namespace

}  // namespace elastiform::test

int testRuntime() {
  using namespace elastiform::test;
  return testPool() + testSignatures() + testBadEncodings() + testBadPrograms() + testMemoryPlan() + testRuns() +
         testJoined() + testEngine() + testScratch() + testMapping();
}
