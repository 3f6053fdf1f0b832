// Tests of the CPU kernels outside the matrix engine: each against a reference in double, on every instruction set the
// machine has, with one and two threads, and with hostile index data.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/pool.h"
#include "cpu/act.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"
#include "ops/sample.h"
#include "runtime/signature.h"

using namespace elastiform;
using namespace elastiform::cpu;

namespace {

using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;
using Shape = std::vector<int64_t>;

int failures = 0;
std::string where;  // the op and shape being tested
std::mt19937 random32(20240607);

void expect(bool condition, const std::string& what) {
  if (condition) return;
  if (++failures <= 40) std::fprintf(stderr, "FAIL %s: %s\n", where.c_str(), what.c_str());
}

double normal() { return std::normal_distribution<double>()(random32); }
int64_t below(int64_t n) { return static_cast<int64_t>(random32() % static_cast<uint64_t>(n)); }

int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t d : shape) n *= d;
  return n;
}

// A tensor in heap memory of exactly its size, so that AddressSanitizer sees any overrun.
struct Value {
  std::unique_ptr<uint8_t[]> data;
  TensorView view;

  float* f32() { return view.f32(); }
  int32_t* i32() { return view.i32(); }
  size_t bytes() const { return view.elements() * dtypeSize(view.dtype); }
  Doubles doubles() const {
    Doubles d(view.elements());
    for (size_t i = 0; i < d.size(); ++i) d[i] = loadAsFloat(view.data, view.dtype, i);
    return d;
  }
};

Value make(DType dtype, const Shape& shape) {
  Value v;
  v.view.dtype = dtype;
  v.view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = v.view.rank - 1; i >= 0; --i) {
    v.view.shape[i] = shape[i];
    v.view.strides[i] = stride;
    stride *= shape[i];
  }
  v.data.reset(new uint8_t[product(shape) * dtypeSize(dtype)]());
  v.view.data = v.data.get();
  return v;
}
Value noise(const Shape& shape, double spread = 1) {
  Value v = make(DType::F32, shape);
  for (int64_t i = 0; i < v.view.elements(); ++i) v.f32()[i] = static_cast<float>(spread * normal());
  return v;
}
Value empty(const Shape& shape) {  // an output: garbage first, so that every element has to be written
  Value v = make(DType::F32, shape);
  for (int64_t i = 0; i < v.view.elements(); ++i) v.f32()[i] = std::nanf("");
  return v;
}
Value floats(const std::vector<float>& x) {
  Value v = make(DType::F32, {static_cast<int64_t>(x.size())});
  std::copy(x.begin(), x.end(), v.f32());
  return v;
}
Value ints(const Ints& x) {
  Value v = make(DType::I32, {static_cast<int64_t>(x.size())});
  std::copy(x.begin(), x.end(), v.i32());
  return v;
}

Value intTable(const Ints& x, int64_t columns) {
  Value v = make(DType::I32, {static_cast<int64_t>(x.size()) / columns, columns});
  std::copy(x.begin(), x.end(), v.i32());
  return v;
}

Ints someRows(int64_t total) {
  Ints rows;
  for (int64_t i = 0; i < total; ++i) {
    if (below(3) > 0) rows.push_back(static_cast<int32_t>(i));
  }
  return rows;
}

Ints offsetsOf(const Ints& lengths) {
  Ints offsets{0};
  for (const int32_t n : lengths) offsets.push_back(offsets.back() + n);
  return offsets;
}

struct Op {
  std::string name;
  std::vector<Value*> in, out;  // null: absent, as are inputs left out at the end
  std::vector<double> attr;
  std::vector<int> alias = {};  // {output, input}: the output takes over that operand's memory
  int64_t produced[4] = {};
  Counters counters = {};

  void once() {
    std::vector<TensorView> inViews, outViews;
    for (const Value* v : in) inViews.push_back(v ? v->view : TensorView{});
    inViews.resize(std::max(inViews.size(), signatureOf(findOp(name)).inputs.size()));
    for (const Value* v : out) outViews.push_back(v ? v->view : TensorView{});
    if (!alias.empty()) outViews[alias[0]].data = inViews[alias[1]].data;
    std::vector<void*> arena;
    const auto allocate = [](void* to, size_t bytes) {
      void* p = ::operator new((bytes + 63) / 64 * 64 + 64, std::align_val_t{64});
      static_cast<std::vector<void*>*>(to)->push_back(p);
      return p;
    };
    const std::atomic<bool> abort{false};
    counters = {};
    KernelArgs args{inViews.data(), outViews.data(), attr.data(), &counters, &abort, produced, allocate, &arena};
    const auto release = [&] {
      for (void* p : arena) ::operator delete(p, std::align_val_t{64});
    };
    try {
      findKernel(name)(args);
    } catch (...) {
      release();
      throw;
    }
    release();
  }

  // With two threads, then with one: every operand and output must end with the same bits.
  void run() {
    where = name + " [" + isaName() + "]";
    for (const Value* v : out) {
      if (!v) continue;
      where += " ->";
      for (int i = 0; i < v->view.rank; ++i) where += " " + std::to_string(v->view.dim(i));
    }
    std::vector<std::vector<uint8_t>> before, after;
    std::vector<Value*> all = in;
    all.insert(all.end(), out.begin(), out.end());
    const auto save = [&](std::vector<std::vector<uint8_t>>& to) {
      for (const Value* v : all) {
        to.emplace_back();
        if (v) to.back().assign(v->data.get(), v->data.get() + v->bytes());
      }
    };
    save(before);
    try {
      setThreadCount(2);
      once();
      save(after);
      for (size_t i = 0; i < all.size(); ++i) {
        if (all[i] && !before[i].empty()) std::memcpy(all[i]->data.get(), before[i].data(), before[i].size());
      }
      setThreadCount(1);
      once();
    } catch (const Error& e) {
      expect(false, std::string("threw ") + e.what());
      return;
    }
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i] || after[i].empty()) continue;
      expect(!std::memcmp(all[i]->data.get(), after[i].data(), after[i].size()), "bits differ with the thread count");
    }
  }

  // says: a part of the message.
  void throws(ErrorCode code, const std::string& what, const std::string& says = "") {
    where = name + " (hostile)";
    try {
      once();
    } catch (const Error& e) {
      expect(e.code == code, what + ": wrong code, message " + e.what());
      expect(std::string(e.what()).find("[" + name + "]") == 0, what + ": message lacks the op: " + e.what());
      expect(std::string(e.what()).find(says) != std::string::npos, what + ": message does not say it: " + e.what());
      return;
    }
    expect(false, what + ": accepted");
  }

  const char* isaName() const;
};

Isa testing = Isa::Portable;
const char* Op::isaName() const { return elastiform::cpu::isaName(testing); }

void near(Value& got, const Doubles& want, double tolerance, const char* what) {
  expect(got.view.elements() == static_cast<int64_t>(want.size()), std::string(what) + ": size");
  const Doubles values = got.doubles();
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::fabs(values[i] - want[i]) <= tolerance * (1 + std::fabs(want[i]))) continue;
    char text[128];
    std::snprintf(text, sizeof text, "%s[%zu] is %.9g, want %.9g", what, i, values[i], want[i]);
    return expect(false, text);
  }
}

// d f / d x by central differences.
Doubles slope(const std::function<double(const Doubles&)>& f, Doubles x) {
  Doubles result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i], h = 1e-5;
    x[i] = at + h;
    const double up = f(x);
    x[i] = at - h;
    result[i] = (up - f(x)) / (2 * h);
    x[i] = at;
  }
  return result;
}

double inner(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

const std::vector<int64_t> kWidths{1, 3, 17, 64, 100};
const std::vector<int64_t> kRows{0, 1, 2, 7, 64, 700};

double act(int kind, double x) {
  switch (kind) {
    case 1: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case 2: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case 3: return x / (1 + std::exp(-x));
    case 4: return std::max(x, 0.0);
    default: return x;
  }
}
double actGrad(int kind, double x) {
  if (kind == 4) return x > 0;
  return (act(kind, x + 1e-5) - act(kind, x - 1e-5)) / 2e-5;
}

// ---- elementwise

void testElementwise() {
  for (const int64_t d : kWidths) {
    for (const int64_t n : kRows) {
      const Shape shape{n, d};
      Value a = noise(shape, 3), b = noise(shape, 3), u = noise(shape), y = empty(shape), y2 = empty(shape);
      Doubles A = a.doubles(), B = b.doubles(), U = u.doubles(), want(A.size()), want2(A.size());
      const auto fill = [&](auto f) {
        for (size_t i = 0; i < A.size(); ++i) want[i] = f(i);
      };
      Op{"zeros", {}, {&y}, {}}.run();
      fill([&](size_t) { return 0.0; });
      near(y, want, 0, "y");
      Op{"add", {&a, &b}, {&y}, {}}.run();
      fill([&](size_t i) { return A[i] + B[i]; });
      near(y, want, 1e-6, "y");
      Value s = floats({-0.75f});
      Op{"scale", {&a, &s}, {&y}, {2}}.run();
      fill([&](size_t i) { return -1.5 * A[i]; });
      near(y, want, 1e-6, "y");
      for (int kind = 0; kind < 5; ++kind) {
        const std::vector<double> attr{static_cast<double>(kind)};
        Op{"activation", {&a}, {&y}, attr}.run();
        fill([&](size_t i) { return act(kind, A[i]); });
        near(y, want, 2e-6, "y");
        Op{"activation_grad", {&b, &a}, {&y}, attr}.run();
        fill([&](size_t i) { return B[i] * actGrad(kind, A[i]); });
        near(y, want, 5e-6, "dx");
        Op{"gated_activation", {&a, &u}, {&y}, attr}.run();
        fill([&](size_t i) { return act(kind, A[i]) * U[i]; });
        near(y, want, 2e-6, "y");
        Op{"gated_activation_grad", {&b, &a, &u}, {&y, &y2}, attr}.run();
        for (size_t i = 0; i < A.size(); ++i) {
          want[i] = B[i] * U[i] * actGrad(kind, A[i]);
          want2[i] = B[i] * act(kind, A[i]);
        }
        near(y, want, 1e-5, "dg");
        near(y2, want2, 5e-6, "du");
        Value dy = make(DType::F32, shape), du = empty(shape);
        if (b.bytes()) std::memcpy(dy.f32(), b.f32(), b.bytes());
        Op{"gated_activation_grad", {&dy, &a, &u}, {&dy, &du}, attr, {0, 0}}.once();
        near(dy, want, 1e-5, "dg in dy's memory");
        near(du, want2, 5e-6, "du beside");
      }
    }
  }
  Value x = noise({2}), y = empty({2});
  Op{"activation", {&x}, {&y}, {5}}.throws(ErrorCode::InvalidProgram, "act 5");
  Op{"activation", {&x}, {&y}, {std::nan("")}}.throws(ErrorCode::InvalidProgram, "act NaN");
  Op{"scale", {&x, nullptr}, {&y}, {INFINITY}}.throws(ErrorCode::InvalidProgram, "infinite factor");
}

// ---- embedding and rows

void testRows() {
  for (const int64_t d : kWidths) {
    for (const int64_t n : kRows) {
      const int64_t vocabulary = 9;
      Ints ids(n);
      for (int32_t& id : ids) id = static_cast<int32_t>(below(vocabulary));
      Value idValue = ints(ids), y = empty({n, d});
      for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
        Value table = make(dtype, {vocabulary, d});
        for (int64_t i = 0; i < vocabulary * d; ++i) {
          const float value = static_cast<float>(normal());
          if (dtype == DType::F32) table.f32()[i] = value;
          if (dtype == DType::BF16) reinterpret_cast<uint16_t*>(table.data.get())[i] = floatToBf16(value);
          if (dtype == DType::F16) reinterpret_cast<uint16_t*>(table.data.get())[i] = floatToF16(value);
        }
        const Doubles t = table.doubles();
        Doubles want;
        for (const int32_t id : ids) want.insert(want.end(), t.begin() + id * d, t.begin() + (id + 1) * d);
        Op{"embedding", {&table, &idValue}, {&y}, {}}.run();
        near(y, want, 0, "y");
      }
      // A transposed view [d, 9] of the table, and rounding to the packed type.
      Value table = noise({d, vocabulary});
      Tensor owner;
      owner.storage = std::make_shared<Storage>();
      owner.packAs = DType::BF16;
      Value view = make(DType::F32, {d, vocabulary});
      std::memcpy(view.f32(), table.f32(), table.bytes());
      view.view.shape = {vocabulary, d};
      view.view.strides = {1, vocabulary};
      view.view.tensor = &owner;
      Doubles want;
      for (const int32_t id : ids) {
        for (int64_t i = 0; i < d; ++i) want.push_back(bf16ToFloat(floatToBf16(table.f32()[i * vocabulary + id])));
      }
      Op{"embedding", {&view, &idValue}, {&y}, {}}.run();
      near(y, want, 0, "rounded y");

      Value dy = noise({n, d}), dtable = empty({vocabulary, d});
      const Doubles DY = dy.doubles();
      want.assign(vocabulary * d, 0);
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < d; ++i) want[ids[r] * d + i] += DY[r * d + i];
      }
      Op{"embedding_grad", {&dy, &idValue}, {&dtable}, {}}.run();
      near(dtable, want, 1e-5, "dtable");

      const Ints rows = someRows(n);
      const int64_t count = static_cast<int64_t>(rows.size());
      Value rowValue = ints(rows), part = empty({count, d}), gates = noise({count}), acc = noise({n, d});
      want.clear();
      for (const int32_t r : rows) want.insert(want.end(), DY.begin() + r * d, DY.begin() + (r + 1) * d);
      Op{"gather_rows", {&dy, &rowValue}, {&part}, {}}.run();
      near(part, want, 0, "y");
      Value gathered = make(DType::I32, {count});
      Op{"gather_ids", {&idValue, &rowValue}, {&gathered}, {}}.run();
      for (int64_t r = 0; r < count; ++r) expect(gathered.i32()[r] == ids[rows[r]], "gathered id");
      const Doubles PART = want;
      Doubles sums = acc.doubles();
      Doubles total(d, 0.0), plain(d, 0.0);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < d; ++i) {
          sums[rows[r] * d + i] += PART[r * d + i];
          total[i] += gates.f32()[r] * PART[r * d + i];
        }
      }
      for (int64_t i = 0; i < n * d; ++i) plain[i % d] += DY[i];
      Op{"scatter_add", {&acc, &part, &rowValue}, {&y}, {}}.run();
      near(y, sums, 1e-6, "y");
      Value column = empty({d});
      Op{"sum_rows", {&dy, &rowValue, &gates}, {&column}, {}}.run();
      near(column, total, 1e-4, "gated sum");
      Op{"sum_rows", {&dy, nullptr, nullptr}, {&column}, {}}.run();
      near(column, plain, 1e-4, "sum");
      Op{"scatter_add", {&acc, &part, &rowValue}, {&acc}, {}, {0, 0}}.once();
      near(acc, sums, 1e-6, "y in place");
      Value a = noise({n * d}), b = noise({n * d}), scalar = empty({1});
      Op{"dot", {&a, &b}, {&scalar}, {}}.run();
      near(scalar, {inner(a.doubles(), b.doubles())}, 1e-5, "y");
    }
  }
  // Segments, one of them empty; sums longer than a chunk are shared among threads.
  for (const int64_t d : {1, 7, 130, 300}) {
    const Ints starts{0, 5, 5, 400};
    Value x = noise({400, d}), offsets = ints(starts), sums = empty({3, d}), back = empty({400, d});
    const Doubles X = x.doubles();
    for (const int64_t most : {0, 3}) {
      Doubles want(3 * d, 0.0), spread(400 * d, 0.0);
      for (int64_t s = 0; s < 3; ++s) {
        const int64_t length = starts[s + 1] - starts[s], counted = most > 0 ? std::min(length, most) : length;
        for (int64_t r = starts[s]; r < starts[s] + counted; ++r) {
          for (int64_t i = 0; i < d; ++i) want[s * d + i] += X[r * d + i] / static_cast<double>(counted);
        }
      }
      Op{"segment_sum", {&x, &offsets}, {&sums}, {static_cast<double>(most), 1}}.run();
      near(sums, want, 1e-5, "mean");
      const Doubles SUMS = sums.doubles();
      for (int64_t s = 0; s < 3; ++s) {
        const int64_t length = starts[s + 1] - starts[s], counted = most > 0 ? std::min(length, most) : length;
        for (int64_t r = starts[s]; r < starts[s] + counted; ++r) {
          for (int64_t i = 0; i < d; ++i) spread[r * d + i] = SUMS[s * d + i];
        }
      }
      Op{"segment_broadcast", {&sums, &offsets}, {&back}, {static_cast<double>(most), 0}}.run();
      near(back, spread, 0, "value of the segment");
    }
    Value held = noise({3, d}), kept = empty({3, d});
    held.f32()[0] = NAN;
    Doubles want = held.doubles();
    want[0] = sums.doubles()[0];
    Op{"latch", {&sums, &held}, {&kept}, {}}.run();
    near(kept, want, 0, "held");
  }
  Value x = noise({3, 2}), y = empty({3, 2}), one = empty({1, 2}), two = empty({2, 2}), column = empty({2});
  for (const int32_t bad : {-1, 3, INT32_MIN, INT32_MAX}) {
    Value id = ints({bad}), pair = ints({0, bad});
    Op{"embedding", {&x, &id}, {&one}, {}}.throws(ErrorCode::InvalidData, "id");
    Op{"embedding_grad", {&one, &id}, {&x}, {}}.throws(ErrorCode::InvalidData, "id");
    Op{"gather_rows", {&x, &pair}, {&two}, {}}.throws(ErrorCode::InvalidData, "row");
    Op{"scatter_add", {&x, &two, &pair}, {&y}, {}}.throws(ErrorCode::InvalidData, "row");
    Op{"sum_rows", {&x, &pair, nullptr}, {&column}, {}}.throws(ErrorCode::InvalidData, "row");
  }
  Value twice = ints({1, 1}), down = ints({2, 0});
  Op{"gather_rows", {&x, &twice}, {&two}, {}}.throws(ErrorCode::InvalidData, "repeated row");
  Op{"gather_rows", {&x, &down}, {&two}, {}}.throws(ErrorCode::InvalidData, "falling rows");
}

// ---- norms

Doubles normRows(const Doubles& x, const Doubles& w, const Doubles& b, const Ints& rows, int64_t d, double eps,
                 bool centred) {
  Doubles y;
  for (const int32_t n : rows) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < d && centred; ++i) mean += x[n * d + i] / d;
    for (int64_t i = 0; i < d; ++i) square += (x[n * d + i] - mean) * (x[n * d + i] - mean) / d;
    for (int64_t i = 0; i < d; ++i) {
      y.push_back((x[n * d + i] - mean) / std::sqrt(square + eps) * w[i] + (b.empty() ? 0 : b[i]));
    }
  }
  return y;
}

void testNorms() {
  const double eps = 0.05;
  for (const int64_t d : kWidths) {
    for (const int64_t n : kRows) {
      for (const bool compact : {false, true}) {
        Ints rows = someRows(n);
        if (!compact) {
          rows.clear();
          for (int64_t i = 0; i < n; ++i) rows.push_back(static_cast<int32_t>(i));
        }
        const int64_t count = static_cast<int64_t>(rows.size());
        Value rowValue = ints(rows), *rowOperand = compact ? &rowValue : nullptr;
        Value x = noise({n, d}), w = noise({d}), b = noise({d}), dy = noise({count, d});
        Value y = empty({count, d}), mean = empty({count}), rstd = empty({count});
        Value dx = empty({count, d}), dw = empty({d}), db = empty({d});
        const Doubles X = x.doubles(), W = w.doubles(), B = b.doubles(), DY = dy.doubles();
        // Finite differences cost d^2 per row.
        const bool differences = n <= 7 && d <= 17;
        const auto checkGrad = [&](const Doubles& bias, bool centred) {
          if (!differences) return;
          const Doubles full =
              slope([&](const Doubles& v) { return inner(normRows(v, W, bias, rows, d, eps, centred), DY); }, X);
          Doubles want;
          for (const int32_t r : rows) want.insert(want.end(), full.begin() + r * d, full.begin() + (r + 1) * d);
          near(dx, want, 5e-5, "dx");
          near(dw, slope([&](const Doubles& v) { return inner(normRows(X, v, bias, rows, d, eps, centred), DY); }, W),
               5e-5, "dweight");
        };
        Value rstds = empty({count, 1});
        Op{"rms_norm", {&x, &w, rowOperand}, {&y, &rstds}, {eps, 0}}.run();
        near(y, normRows(X, W, {}, rows, d, eps, false), 5e-6, "y");
        Op{"rms_norm_grad", {&dy, &x, &w, &rstds, rowOperand}, {&dx, &dw}, {0}}.run();
        checkGrad({}, false);
        Op{"layer_norm", {&x, &w, nullptr, rowOperand}, {&y, nullptr, nullptr}, {eps}}.run();
        near(y, normRows(X, W, {}, rows, d, eps, true), 1e-5, "y without bias");
        Op{"layer_norm", {&x, &w, &b, rowOperand}, {&y, &mean, &rstd}, {eps}}.run();
        near(y, normRows(X, W, B, rows, d, eps, true), 1e-5, "y");
        Op{"layer_norm_grad", {&dy, &x, &w, &mean, &rstd, rowOperand}, {&dx, &dw, &db}, {}}.run();
        checkGrad(B, true);
        Doubles sums(d, 0.0);
        for (int64_t i = 0; i < count * d; ++i) sums[i % d] += DY[i];
        near(db, sums, 1e-4, "dbias");
        Value dx2 = empty({count, d});
        Op{"layer_norm_grad", {&dy, &x, &w, &mean, &rstd, rowOperand}, {&dx2, nullptr, nullptr}, {}}.run();
        if (dx.bytes()) expect(!std::memcmp(dx.f32(), dx2.f32(), dx.bytes()), "dx depends on wanted outputs");
        // A row's result does not depend on the rows beside it.
        if (count > 1) {
          Value lone = ints({rows.back()}), single = empty({1, d});
          Op{"layer_norm", {&x, &w, &b, &lone}, {&single, nullptr, nullptr}, {eps}}.once();
          expect(!std::memcmp(single.f32(), y.f32() + (count - 1) * d, d * sizeof(float)), "row alone differs");
        }
      }
    }
  }
  // Larger widths, where partial sums meet: the gradient against its formula.
  Value x = noise({96, 768}), w = noise({768}), y = empty({96, 768}), rstd = empty({96, 1}), dx = empty({96, 768}),
        dw = empty({768}), dy = noise({96, 768});
  Op{"rms_norm", {&x, &w, nullptr}, {&y, &rstd}, {eps, 0}}.run();
  Op{"rms_norm_grad", {&dy, &x, &w, &rstd, nullptr}, {&dx, &dw}, {0}}.run();
  const Doubles X = x.doubles(), W = w.doubles(), DY = dy.doubles();
  Doubles want(X.size()), wantW(768, 0.0);
  for (int64_t r = 0; r < 96; ++r) {
    double square = 0, pull = 0;
    for (int64_t i = 0; i < 768; ++i) square += X[r * 768 + i] * X[r * 768 + i] / 768;
    const double s = 1 / std::sqrt(square + eps);
    for (int64_t i = 0; i < 768; ++i) pull += DY[r * 768 + i] * W[i] * X[r * 768 + i] * s / 768;
    for (int64_t i = 0; i < 768; ++i) {
      want[r * 768 + i] = s * (DY[r * 768 + i] * W[i] - X[r * 768 + i] * s * pull);
      wantW[i] += DY[r * 768 + i] * X[r * 768 + i] * s;
    }
  }
  near(dx, want, 1e-5, "dx");
  near(dw, wantW, 1e-5, "dweight");
  Value bad = ints({96}), one = empty({1, 768});
  Op{"rms_norm", {&x, &w, &bad}, {&one, nullptr}, {eps, 0}}.throws(ErrorCode::InvalidData, "row");
  Op{"layer_norm", {&x, &w, nullptr, &bad}, {&one, nullptr, nullptr}, {eps}}.throws(ErrorCode::InvalidData, "row");
  Op{"rms_norm", {&x, &w, nullptr}, {&y, nullptr}, {-1, 0}}.throws(ErrorCode::InvalidProgram, "eps");
  Op{"rms_norm", {&x, &w, nullptr}, {&y, nullptr}, {eps, NAN}}.throws(ErrorCode::InvalidProgram, "offset");
  // Heads of a row are normalised by themselves: as rows of their own.
  Value heads = noise({96, 768}), headWeight = noise({64}), headsY = empty({96, 768}), headsRstd = empty({96, 12});
  Value apart = empty({1152, 64}), apartY = empty({1152, 64}), apartRstd = empty({1152, 1});
  std::memcpy(apart.f32(), heads.f32(), heads.bytes());
  Op{"rms_norm", {&heads, &headWeight, nullptr}, {&headsY, &headsRstd}, {eps, 1}}.run();
  Op{"rms_norm", {&apart, &headWeight, nullptr}, {&apartY, &apartRstd}, {eps, 1}}.run();
  expect(!std::memcmp(headsY.f32(), apartY.f32(), headsY.bytes()), "heads differ from rows");
  Value uneven = noise({100}), fewer = empty({96, 11});
  Op{"rms_norm", {&heads, &uneven, nullptr}, {&headsY, nullptr}, {eps, 0}}.throws(ErrorCode::InvalidProgram, "width");
  Op{"rms_norm", {&heads, &headWeight, nullptr}, {&headsY, &fewer}, {eps, 0}}.throws(ErrorCode::InvalidProgram, "rstd");
}

// ---- rope

void testRope() {
  const std::vector<std::pair<int64_t, int64_t>> heads{{2, 1}, {6, 3}, {17, 4}, {64, 32}, {100, 50}};
  for (const auto& [headDim, half] : heads) {
    for (const int64_t n : kRows) {
      const int64_t d = 3 * headDim;
      Ints positions(n);
      for (int32_t& p : positions) p = static_cast<int32_t>(below(100000));
      Value x = noise({n, d}), position = ints(positions), frequency = make(DType::F32, {half}), y = empty({n, d});
      for (int64_t i = 0; i < half; ++i) {
        frequency.f32()[i] = static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / half));
      }
      Op{"rope", {&x, &position, &frequency}, {&y}, {static_cast<double>(headDim), -1, 1.25}}.run();
      const Doubles X = x.doubles();
      Doubles want = X;
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t h = 0; h < 3; ++h) {
          for (int64_t i = 0; i < half; ++i) {
            const double angle = static_cast<float>(positions[r]) * frequency.f32()[i];
            const int64_t at = r * d + h * headDim + i;
            want[at] = 1.25 * (X[at] * std::cos(angle) + X[at + half] * std::sin(angle));
            want[at + half] = 1.25 * (X[at + half] * std::cos(angle) - X[at] * std::sin(angle));
          }
        }
      }
      near(y, want, 1e-6, "y");
      Op{"rope", {&x, &position, &frequency}, {&x}, {static_cast<double>(headDim), -1, 1.25}, {0, 0}}.once();
      near(x, want, 1e-6, "y in place");
    }
  }
  Value x = noise({1, 8}), position = ints({INT32_MIN}), frequency = noise({2}), y = empty({1, 8});
  Op{"rope", {&x, &position, &frequency}, {&y}, {4, 1, 1}}.run();
  Op{"rope", {&x, &position, &frequency}, {&y}, {3, 1, 1}}.throws(ErrorCode::InvalidProgram, "head_dim 3");
  Op{"rope", {&x, &position, &frequency}, {&y}, {2, 1, 1}}.throws(ErrorCode::InvalidProgram, "head_dim 2");
  Op{"rope", {&x, &position, &frequency}, {&y}, {0, 1, 1}}.throws(ErrorCode::InvalidProgram, "head_dim 0");
}

// ---- attention

struct AttentionShape {
  int64_t heads, kvHeads, headDim;
  bool causal;
  double scale;
  int64_t window = 0;
  double softcap = 0;

  // The first key of its segment, which begins at row `begin`, that row r sees.
  int64_t first(int64_t begin, int64_t r) const { return window > 0 ? std::max(begin, r + 1 - window) : begin; }
  double capped(double score) const { return softcap > 0 ? softcap * std::tanh(score / softcap) : score; }
};

// y; the log-sum-exp per row and head goes to lse, probabilities to probs[segment-local pair order] when wanted.
Doubles attentionReference(const Doubles& q, const Doubles& k, const Doubles& v, const Ints& offsets,
                           const AttentionShape& a, Doubles* lse) {
  const int64_t Q = a.heads * a.headDim, C = a.kvHeads * a.headDim, rows = offsets.back();
  Doubles y(rows * Q, 0.0);
  if (lse) lse->assign(rows * a.heads, 0.0);
  for (size_t s = 0; s + 1 < offsets.size(); ++s) {
    for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t g = h / (a.heads / a.kvHeads), end = a.causal ? r + 1 : offsets[s + 1];
        const int64_t first = a.first(offsets[s], r);
        Doubles score;
        for (int64_t j = first; j < end; ++j) {
          double dot = 0;
          for (int64_t i = 0; i < a.headDim; ++i) dot += q[r * Q + h * a.headDim + i] * k[j * C + g * a.headDim + i];
          score.push_back(a.capped(dot * a.scale));
        }
        const double largest = *std::max_element(score.begin(), score.end());
        double total = 0;
        for (double& x : score) total += x = std::exp(x - largest);
        for (int64_t j = first; j < end; ++j) {
          for (int64_t i = 0; i < a.headDim; ++i) {
            y[r * Q + h * a.headDim + i] += score[j - first] / total * v[j * C + g * a.headDim + i];
          }
        }
        if (lse) (*lse)[r * a.heads + h] = largest + std::log(total);
      }
    }
  }
  return y;
}

struct AttentionGrads {
  Doubles dq, dk, dv;
};
AttentionGrads attentionGradReference(const Doubles& dy, const Doubles& q, const Doubles& k, const Doubles& v,
                                      const Doubles& y, const Doubles& lse, const Ints& offsets,
                                      const AttentionShape& a) {
  const int64_t Q = a.heads * a.headDim, C = a.kvHeads * a.headDim, rows = offsets.back();
  AttentionGrads g{Doubles(rows * Q, 0.0), Doubles(rows * C, 0.0), Doubles(rows * C, 0.0)};
  for (size_t s = 0; s + 1 < offsets.size(); ++s) {
    for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t end = a.causal ? r + 1 : offsets[s + 1];
        for (int64_t j = a.first(offsets[s], r); j < end; ++j) {
          const int64_t at = r * Q + h * a.headDim, to = j * C + h / (a.heads / a.kvHeads) * a.headDim;
          double score = 0, dp = 0, delta = 0;
          for (int64_t i = 0; i < a.headDim; ++i) {
            score += a.scale * q[at + i] * k[to + i];
            dp += dy[at + i] * v[to + i];
            delta += dy[at + i] * y[at + i];
          }
          score = a.capped(score);
          const double slope = a.softcap > 0 ? 1 - score / a.softcap * score / a.softcap : 1;
          const double p = std::exp(score - lse[r * a.heads + h]), ds = p * (dp - delta) * slope * a.scale;
          for (int64_t i = 0; i < a.headDim; ++i) {
            g.dq[at + i] += ds * k[to + i];
            g.dk[to + i] += ds * q[at + i];
            g.dv[to + i] += p * dy[at + i];
          }
        }
      }
    }
  }
  return g;
}

// Some rows of every segment: none, a third, two thirds or all of them.
struct Selection {
  Ints rows, offsets{0};

  explicit Selection(const Ints& segments) {
    for (size_t s = 0; s + 1 < segments.size(); ++s) {
      const int64_t share = below(4);
      for (int32_t i = segments[s]; i < segments[s + 1]; ++i) {
        if (below(3) < share) rows.push_back(i);
      }
      offsets.push_back(static_cast<int32_t>(rows.size()));
    }
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }

  Value of(Value& x) const {
    const int64_t width = x.view.dim(1);
    Value y = make(DType::F32, {count(), width});
    for (int64_t r = 0; r < count(); ++r) std::copy_n(x.f32() + rows[r] * width, width, y.f32() + r * width);
    return y;
  }
};

// Segments in slots of which there is one more, last ones first, whose pages lie anywhere in pools.
struct Paged {
  int64_t pageRows, perSlot, pool;
  Ints slots, pages;

  Paged(int64_t segments, int64_t capacity, int64_t pageRows)
      : pageRows(pageRows), perSlot((capacity + pageRows - 1) / pageRows), pool((segments + 1) * perSlot + 2) {
    for (int64_t s = segments; s-- > 0;) slots.push_back(static_cast<int32_t>(s));
    for (int32_t i = 0; i < pool; ++i) pages.push_back(i);
    for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[below(static_cast<int64_t>(i))]);
    pages.resize((segments + 1) * perSlot);
  }
};

bool sameBits(Value& a, Value& b) { return a.bytes() == b.bytes() && !std::memcmp(a.f32(), b.f32(), a.bytes()); }

void testAttention() {
  const std::vector<Ints> batches{{}, {0}, {1}, {2, 0, 1}, {7, 3}, {64}, {65, 48, 1}, {140, 20}};
  for (const auto& [heads, kvHeads] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {4, 2}, {12, 1}, {3, 3}}) {
    for (const int64_t headDim : {1, 3, 17, 64, 100}) {
      for (const Ints& lengths : batches) {
        struct Variant {
          bool causal;
          int64_t window;
          double softcap;
        };
        for (const auto& [causal, window, softcap] :
             {Variant{true, 0, 0}, Variant{true, 5, 0.7}, Variant{false, 0, 0.7}}) {
          const AttentionShape a{heads, kvHeads, headDim, causal, 1.5 / std::sqrt(headDim), window, softcap};
          const Ints offsets = offsetsOf(lengths);
          const int64_t rows = offsets.back(), Q = heads * headDim, C = kvHeads * headDim;
          Value q = noise({rows, Q}), k = noise({rows, C}), v = noise({rows, C}), o = ints(offsets);
          Value y = empty({rows, Q}), lse = empty({rows, heads});
          const Doubles DQ = q.doubles(), DK = k.doubles(), DV = v.doubles();
          const std::vector<double> attr{static_cast<double>(heads), static_cast<double>(kvHeads), causal ? 1. : 0.,
                                         a.scale, static_cast<double>(window), softcap};
          Op forward{"attention", {&q, &k, &v, &o}, {&y, &lse}, attr};
          forward.run();
          Doubles wantLse;
          const Doubles want = attentionReference(DQ, DK, DV, offsets, a, &wantLse);
          near(y, want, 3e-6, "y");
          near(lse, wantLse, 3e-6, "lse");
          double pairs = 0;
          const auto seenBy = [&](int64_t i, int64_t n) {
            return static_cast<double>(!causal ? n : window > 0 ? std::min(i + 1, window) : i + 1);
          };
          for (const int64_t n : lengths) {
            for (int64_t i = 0; i < n; ++i) pairs += seenBy(i, n);
          }
          expect(forward.counters.flops == 4 * headDim * heads * pairs, "flops");

          Value dy = noise({rows, Q}), dq = empty({rows, Q}), dk = empty({rows, C}), dv = empty({rows, C});
          Op backward{"attention_grad", {&dy, &q, &k, &v, &y, &lse, &o}, {&dq, &dk, &dv}, attr};
          backward.run();
          const Doubles DDY = dy.doubles();
          const AttentionGrads g = attentionGradReference(DDY, DQ, DK, DV, want, wantLse, offsets, a);
          near(dq, g.dq, 2e-5, "dq");
          near(dk, g.dk, 2e-5, "dk");
          near(dv, g.dv, 2e-5, "dv");
          expect(backward.counters.flops == 10 * headDim * heads * pairs, "flops");
          if (rows <= 10 && headDim <= 3 && heads <= 4) {
            const auto loss = [&](const Doubles& x, const Doubles& b, const Doubles& c) {
              return inner(attentionReference(x, b, c, offsets, a, nullptr), DDY);
            };
            near(dq, slope([&](const Doubles& x) { return loss(x, DK, DV); }, DQ), 5e-5, "dq by differences");
            near(dk, slope([&](const Doubles& x) { return loss(DQ, x, DV); }, DK), 5e-5, "dk by differences");
            near(dv, slope([&](const Doubles& x) { return loss(DQ, DK, x); }, DV), 5e-5, "dv by differences");
          }

          // When only some rows are queries, each gets the bits it got among all; the gradients of keys are those of a
          // dy that is zero at the other rows.
          {
            const Selection selection(offsets);
            const int64_t count = selection.count();
            Value at = ints(selection.rows), starts = ints(selection.offsets), sq = selection.of(q);
            Value sy = empty({count, Q}), slse = empty({count, heads});
            Op some{"attention", {&sq, &k, &v, &o, &at, &starts}, {&sy, &slse}, attr};
            some.run();
            Value wantY = selection.of(y), wantLses = selection.of(lse);
            expect(sameBits(sy, wantY) && sameBits(slse, wantLses), "a query differs from what it was among all rows");
            double seen = 0;
            for (size_t s = 0; s < lengths.size(); ++s) {
              for (int32_t i = selection.offsets[s]; i < selection.offsets[s + 1]; ++i) {
                seen += seenBy(selection.rows[i] - offsets[s], lengths[s]);
              }
            }
            expect(some.counters.flops == 4 * headDim * heads * seen, "flops of some queries");

            Value sdy = selection.of(dy), sdq = empty({count, Q}), sdk = empty({rows, C}), sdv = empty({rows, C});
            Op someGrad{"attention_grad", {&sdy, &sq, &k, &v, &sy, &slse, &o, &at, &starts}, {&sdq, &sdk, &sdv}, attr};
            someGrad.run();
            Value wantDq = selection.of(dq), rest = make(DType::F32, {rows, Q});
            expect(sameBits(sdq, wantDq), "dq of a query differs from what it was among all rows");
            for (int64_t r = 0; r < count; ++r) {
              std::copy_n(sdy.f32() + r * Q, Q, rest.f32() + selection.rows[r] * Q);
            }
            Value otherDq = empty({rows, Q}), otherDk = empty({rows, C}), otherDv = empty({rows, C});
            Op{"attention_grad", {&rest, &q, &k, &v, &y, &lse, &o}, {&otherDq, &otherDk, &otherDv}, attr}.run();
            expect(sdk.doubles() == otherDk.doubles(), "dk of some queries");
            expect(sdv.doubles() == otherDv.doubles(), "dv of some queries");
            expect(someGrad.counters.flops == 10 * headDim * heads * seen, "flops of the gradient of some queries");
          }

          // The first segment alone has the bits it had in the batch.
          if (lengths.size() > 1 && lengths[0] > 0) {
            const int64_t n = lengths[0];
            Value q1 = make(DType::F32, {n, Q}), k1 = make(DType::F32, {n, C}), v1 = make(DType::F32, {n, C});
            std::memcpy(q1.f32(), q.f32(), q1.bytes());
            std::memcpy(k1.f32(), k.f32(), k1.bytes());
            std::memcpy(v1.f32(), v.f32(), v1.bytes());
            Value o1 = ints({0, static_cast<int32_t>(n)}), y1 = empty({n, Q});
            Op{"attention", {&q1, &k1, &v1, &o1}, {&y1, nullptr}, attr}.run();
            expect(!std::memcmp(y1.f32(), y.f32(), y1.bytes()), "a segment alone differs");
          }

          // Fed in two parts, then one by one, through a cache: the same bits as at once.
          if (causal && !lengths.empty()) {
            const int64_t segments = static_cast<int64_t>(lengths.size());
            constexpr int64_t kPageRows[] = {1, 3, 16, 32, 1000};
            const Paged paged(segments, *std::max_element(lengths.begin(), lengths.end()) + 1, kPageRows[below(5)]);
            const Shape poolShape{paged.pool, paged.pageRows, C};
            Value cacheK = noise(poolShape), cacheV = noise(poolShape), slots = ints(paged.slots);
            Value cached = ints(Ints(segments + 1, 0)), pages = intTable(paged.pages, paged.perSlot);
            const std::vector<double> cachedAttr{attr[0], attr[1], attr[3], attr[4], attr[5]};
            double flops = 0;
            Ints done(segments, 0);
            const auto feed = [&](const std::function<int64_t(int64_t)>& upTo) {
              Ints counts;
              for (int64_t s = 0; s < segments; ++s) {
                counts.push_back(static_cast<int32_t>(std::min<int64_t>(lengths[s], upTo(s)) - done[s]));
              }
              const Ints partOffsets = offsetsOf(counts);
              const int64_t n = partOffsets.back();
              Value pq = make(DType::F32, {n, Q}), pk = make(DType::F32, {n, C}), pv = make(DType::F32, {n, C});
              Value po = ints(partOffsets), py = empty({n, Q});
              for (int64_t s = 0; s < segments; ++s) {
                const int64_t from = offsets[s] + done[s], to = partOffsets[s];
                std::copy_n(q.f32() + from * Q, counts[s] * Q, pq.f32() + to * Q);
                std::copy_n(k.f32() + from * C, counts[s] * C, pk.f32() + to * C);
                std::copy_n(v.f32() + from * C, counts[s] * C, pv.f32() + to * C);
              }
              const Selection selection(partOffsets);
              Value at = ints(selection.rows), starts = ints(selection.offsets), sq = selection.of(pq);
              Value sy = empty({selection.count(), Q}), sCached = ints(Ints(cached.i32(), cached.i32() + segments + 1));
              Value sK = make(DType::F32, poolShape), sV = make(DType::F32, poolShape);
              std::memcpy(sK.f32(), cacheK.f32(), sK.bytes());
              std::memcpy(sV.f32(), cacheV.f32(), sV.bytes());
              Op{"cache_append", {&pk, &pv, &po, &slots, &sCached, &pages, &sK, &sV}, {}, {}}.run();
              Op{"attention_cached", {&sq, &po, &slots, &sCached, &pages, &sK, &sV, &at, &starts}, {&sy}, cachedAttr}.run();
              Op{"cache_append", {&pk, &pv, &po, &slots, &cached, &pages, &cacheK, &cacheV}, {}, {}}.run();
              Op op{"attention_cached", {&pq, &po, &slots, &cached, &pages, &cacheK, &cacheV}, {&py}, cachedAttr};
              op.run();
              flops += op.counters.flops;
              Value wantY = selection.of(py);
              expect(sameBits(sy, wantY), "a cached query differs from what it was among all rows");
              expect(sameBits(sK, cacheK) && sameBits(sV, cacheV) && sameBits(sCached, cached), "caches differ");
              for (int64_t s = 0; s < segments; ++s) {
                const int64_t from = offsets[s] + done[s];
                if (counts[s] > 0) {
                  expect(!std::memcmp(py.f32() + partOffsets[s] * Q, y.f32() + from * Q, counts[s] * Q * sizeof(float)),
                         "cached differs from whole");
                }
                done[s] += counts[s];
                expect(cached.i32()[paged.slots[s]] == done[s], "length");
              }
            };
            feed([&](int64_t s) { return lengths[s] / 2; });
            feed([&](int64_t s) { return std::max<int64_t>(done[s], lengths[s] - 2); });
            feed([&](int64_t s) { return done[s] + 1; });
            feed([&](int64_t s) { return done[s] + 1; });
            feed([&](int64_t s) { return done[s] + 1; });
            expect(flops == forward.counters.flops, "flops through the cache");
          }
        }
      }
    }
  }

  // Group larger than a block of queries; scores far apart.
  {
    const AttentionShape a{100, 1, 8, true, 4};
    Value q = noise({70, 800}, 3), k = noise({70, 8}, 3), v = noise({70, 8}), o = ints({0, 70}), y = empty({70, 800});
    Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {100, 1, 1, 4, 0, 0}}.run();
    near(y, attentionReference(q.doubles(), k.doubles(), v.doubles(), {0, 70}, a, nullptr), 5e-5, "y");
  }

  Value q = noise({2, 8}), k = noise({2, 4}), v = noise({2, 4}), o = ints({0, 2}), y = empty({2, 8});
  Value lse = empty({2, 2}), wrong = empty({2, 3});
  for (const Ints& bad :
       {Ints{1, 2}, Ints{0, 1}, Ints{0, 3}, Ints{0, 2, 1, 2}, Ints{0, -1, 2}, Ints{0, INT32_MAX, 2}}) {
    Value b = ints(bad), lengths = ints(Ints(bad.size() - 1, 0));
    const int64_t s = static_cast<int64_t>(bad.size()) - 1;
    Value ck = noise({s, 4, 4}), cv = noise({s, 4, 4}), slots = ints(Ints(s, 0)), pages = intTable(Ints(s, 0), 1);
    for (int32_t i = 0; i < s; ++i) slots.i32()[i] = pages.i32()[i] = i;
    Op{"attention", {&q, &k, &v, &b}, {&y, nullptr}, {2, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidData, "offsets");
    Op{"attention_grad", {&y, &q, &k, &v, &y, &lse, &b}, {&y, &k, &v}, {2, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidData,
                                                                                         "offsets");
    Op{"cache_append", {&k, &v, &b, &slots, &lengths, &pages, &ck, &cv}, {}, {}}.throws(ErrorCode::InvalidData, "offsets");
    Op{"attention_cached", {&q, &b, &slots, &lengths, &pages, &ck, &cv}, {&y}, {2, 1, 1, 0, 0}}.throws(ErrorCode::InvalidData,
                                                                                                  "offsets");
  }
  // Queries: out of order, out of their segment, badly counted, or with one operand of two.
  Value two = ints({0, 1, 2}), q1 = noise({1, 8}), y1 = empty({1, 8}), lse1 = empty({1, 2});
  Value lengths2 = ints({1, 1}), ck2 = noise({2, 4, 4}), cv2 = noise({2, 4, 4}), slots2 = ints({0, 1});
  Value pages2 = intTable({0, 1}, 1);
  const auto allThrow = [&](Value* rows, Value* starts, Value& query, Value& out, Value& stats, ErrorCode code,
                            const std::string& what) {
    Op{"attention", {&query, &k, &v, &two, rows, starts}, {&out, nullptr}, {2, 1, 1, 1, 0, 0}}.throws(code, what);
    Op{"attention_grad", {&out, &query, &k, &v, &out, &stats, &two, rows, starts}, {&out, &k, &v}, {2, 1, 1, 1, 0, 0}}.throws(
        code, what);
    Op{"attention_cached", {&query, &two, &slots2, &lengths2, &pages2, &ck2, &cv2, rows, starts}, {&out}, {2, 1, 1, 0, 0}}.throws(
        rows || starts ? code : ErrorCode::InvalidData, what);
  };
  Value all = ints({0, 1}), allStarts = ints({0, 1, 2}), second = ints({1}), secondStarts = ints({0, 0, 1});
  for (const Ints& bad : {Ints{1, 0}, Ints{0, 0}, Ints{-1, 1}, Ints{0, 2}, Ints{0, INT32_MAX}, Ints{INT32_MIN, 1}}) {
    Value b = ints(bad);
    allThrow(&b, &allStarts, q, y, lse, ErrorCode::InvalidData, "rows");
  }
  for (const Ints& bad : {Ints{0, 2, 2}, Ints{0, 0, 2}, Ints{0, 1, 3}, Ints{1, 1, 2}, Ints{0, -1, 2}, Ints{0, 2, 1}}) {
    Value b = ints(bad);
    allThrow(&all, &b, q, y, lse, ErrorCode::InvalidData, "row_offsets");
  }
  Value firstStarts = ints({0, 1, 1});
  allThrow(&second, &firstStarts, q1, y1, lse1, ErrorCode::InvalidData, "a row of another segment");
  allThrow(&all, nullptr, q, y, lse, ErrorCode::InvalidProgram, "rows alone");
  allThrow(nullptr, &allStarts, q, y, lse, ErrorCode::InvalidProgram, "row_offsets alone");
  allThrow(nullptr, nullptr, q1, y1, lse1, ErrorCode::InvalidProgram, "fewer queries than rows");
  Op{"attention", {&q1, &k, &v, &two, &second, &secondStarts}, {&y1, nullptr}, {2, 1, 1, 1, 0, 0}}.run();
  // Queries of other sequences: only in full attention, and only where there are keys.
  Op{"attention", {&q1, &k, &v, &two, nullptr, &firstStarts}, {&y1, nullptr}, {2, 1, 0, 1, 0, 0}}.run();
  Value bias = noise({2, 5}), even = noise({2, 4}), wrongHeads = noise({3, 5});
  Op{"attention", {&q, &k, &v, &two, nullptr, nullptr, &bias}, {&y, nullptr}, {2, 1, 1, 1, 0, 0}}.run();
  for (Value* wrong : {&even, &wrongHeads}) {
    Op{"attention", {&q, &k, &v, &two, nullptr, nullptr, wrong}, {&y, nullptr}, {2, 1, 1, 1, 0, 0}}.throws(
        ErrorCode::InvalidProgram, "bias");
  }
  Op{"attention", {&q, &k, &v, &two, nullptr, nullptr, &bias}, {&y, nullptr}, {2, 1, 1, 1, 0, 3}}.throws(
      ErrorCode::InvalidProgram, "bias");
  Op{"attention", {&q1, &k, &v, &two, nullptr, &firstStarts, &bias}, {&y1, nullptr}, {2, 1, 0, 1, 0, 0}}.throws(
      ErrorCode::InvalidProgram, "bias");
  Value keyless = ints({0, 2, 2}), tooMany = ints({0, 1, 2});
  for (Value* starts : {&secondStarts, &tooMany}) {
    Op{"attention", {&q1, &k, &v, starts == &tooMany ? &two : &keyless, nullptr, starts}, {&y1, nullptr}, {2, 1, 0, 1, 0, 0}}
        .throws(ErrorCode::InvalidData, starts == &tooMany ? "row_offsets" : "no keys");
    Op{"attention_grad", {&y1, &q1, &k, &v, &y1, &lse1, starts == &tooMany ? &two : &keyless, nullptr, starts},
       {&q1, &k, &v}, {2, 1, 0, 1, 0, 0}}
        .throws(ErrorCode::InvalidData, starts == &tooMany ? "row_offsets" : "no keys");
  }

  Value none = ints({});
  Op{"attention", {&q, &k, &v, &none}, {&y, nullptr}, {2, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "no offsets");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {3, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "heads 3");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 2, 1, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "kv_heads 2");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {0, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "heads 0");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 2, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "causal 2");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 1, NAN, 0, 0}}.throws(ErrorCode::InvalidProgram, "scale NaN");
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 0, 1, 3, 0}}.throws(ErrorCode::InvalidProgram, "full window");
  for (const double bad : {-1.0, 0.5, 4294967296.0, std::nan("")}) {
    Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 1, 1, bad, 0}}.throws(ErrorCode::InvalidProgram, "window");
  }
  for (const double bad : {-1.0, HUGE_VAL, std::nan(""), 1e-60}) {
    Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 1, 1, 0, bad}}.throws(ErrorCode::InvalidProgram, "softcap");
  }
  Op{"attention", {&q, &k, &v, &o}, {&y, nullptr}, {2, 1, 1, 1, INT32_MAX, 1e30}}.run();
  Op{"attention", {&q, &k, &v, &o}, {&y, &wrong}, {2, 1, 1, 1, 0, 0}}.throws(ErrorCode::InvalidProgram, "lse width");

  // Caches: all is checked before anything is written. Slot 1 of three has one page, and room for two.
  struct Cache {
    Value slots = ints({1}), lengths = ints({0, 0, 0}), pages = intTable({0, -1, 1, -1, 2, -1}, 2);
    Value k = noise({3, 4, 4}), v = noise({3, 4, 4});
  };
  const auto refuses = [&](Cache& c, Value& offsets, ErrorCode code, const std::string& append, const std::string& attend) {
    const Doubles before = c.k.doubles();
    const Ints held(c.lengths.i32(), c.lengths.i32() + 3);
    if (!append.empty()) {
      Op{"cache_append", {&k, &v, &offsets, &c.slots, &c.lengths, &c.pages, &c.k, &c.v}, {}, {}}.throws(code, append, append);
    }
    expect(c.k.doubles() == before && Ints(c.lengths.i32(), c.lengths.i32() + 3) == held, "a refused cache was written to");
    if (!attend.empty()) {
      Op{"attention_cached", {&q, &offsets, &c.slots, &c.lengths, &c.pages, &c.k, &c.v}, {&y}, {2, 1, 1, 0, 0}}.throws(
          code, attend, attend);
    }
  };
  for (const int32_t used : {-1, 7, INT32_MAX, INT32_MIN}) {
    Cache c;
    c.lengths.i32()[1] = used;
    refuses(c, o, ErrorCode::InvalidData, "lengths[1] must be in [0, 6]", used == 7 ? "" : "lengths[1] must be in [2, 8]");
  }
  for (const int32_t used : {0, 1}) {
    Cache c;
    c.lengths.i32()[1] = used;
    refuses(c, o, ErrorCode::InvalidData, "", "lengths[1] must be in [2, 8]");
  }
  for (const int32_t page : {-1, 3, INT32_MAX, INT32_MIN}) {
    Cache c;
    c.lengths.i32()[1] = 3;
    c.pages.i32()[3] = page;
    refuses(c, o, ErrorCode::InvalidData, "that of row 4 of slot 1 must be in [0, 3), got " + std::to_string(page), "");
    c.lengths.i32()[1] = 5;
    refuses(c, o, ErrorCode::InvalidData, "that of row 5 of slot 1", "that of row 4 of slot 1");
  }
  for (const int32_t slot : {-1, 3, INT32_MAX, INT32_MIN}) {
    Cache c;
    c.slots.i32()[0] = slot;
    refuses(c, o, ErrorCode::InvalidData, "slots[0] must be in [0, 3)", "slots[0] must be in [0, 3)");
  }
  {
    Cache twice, few;
    twice.slots = ints({2, 2});
    twice.lengths.i32()[2] = 2;
    refuses(twice, two, ErrorCode::InvalidData, "slots[0] must be no other segment's, got 2", "slots[0]");
    refuses(few, two, ErrorCode::InvalidProgram, "one slot per segment", "one slot per segment");
    // What counts may not be what says where.
    Value ends = ints({0, 1, 2});
    Op{"cache_append", {&k, &v, &ends, &two, &ends, &twice.pages, &twice.k, &twice.v}, {}, {}}.throws(
        ErrorCode::InvalidProgram, "lengths and offsets");
    Op{"cache_append", {&k, &v, &two, &slots2, &slots2, &pages2, &ck2, &cv2}, {}, {}}.throws(ErrorCode::InvalidProgram,
                                                                                          "lengths and slots");
    Op{"cache_append", {&k, &v, &two, &slots2, &pages2, &pages2, &ck2, &cv2}, {}, {}}.throws(ErrorCode::InvalidProgram,
                                                                                          "lengths and pages");
  }
}

// ---- routing

void testCredit() {
  for (const Ints& lengths : {Ints{}, Ints{0}, Ints{1}, Ints{7, 0, 64}, Ints{100, 17, 3}, Ints{500}}) {
    for (const int64_t width : {1, 17, 300}) {
      const Ints offsets = offsetsOf(lengths);
      const int64_t n = offsets.back();
      Ints counts;
      for (const int32_t length : lengths) counts.push_back(static_cast<int32_t>(below(length + 1)));
      const Ints starts = offsetsOf(counts);
      Value dy = noise({n, width}), from = noise({n, width}), to = noise({n, width}), z = noise({n, 1}, 3);
      Value weight = noise({n}), o = ints(offsets), ro = ints(starts), dz = empty({n, 1});
      const Doubles DY = dy.doubles(), A = from.doubles(), B = to.doubles(), Z = z.doubles(), W = weight.doubles();
      Doubles want(n, 0.0);
      for (size_t s = 0; s < lengths.size(); ++s) {
        const int64_t first = offsets[s], length = lengths[s], k = counts[s];
        if (k == 0 || k == length) continue;
        Doubles sorted(Z.begin() + first, Z.begin() + first + length), e(length, 0.0), g(length);
        std::sort(sorted.rbegin(), sorted.rend());
        const double tau = (sorted[k - 1] + sorted[k]) / 2;
        double mean = 0, total = 0, size = 0;
        for (int64_t i = 0; i < length; ++i) {
          for (int64_t c = (first + i) * width; c < (first + i + 1) * width; ++c) e[i] += DY[c] * (B[c] - A[c]);
          size += std::fabs(e[i]) / static_cast<double>(length);
          g[i] = 1 / (2 + 2 * std::cosh(Z[first + i] - tau));
          total += g[i];
          mean += e[i] * g[i];
        }
        for (int64_t i = 0; i < length; ++i) want[first + i] = W[first + i] * (e[i] - mean / total) / size * g[i];
      }
      Op{"topk_credit", {&dy, &from, &to, &z, &o, &ro, &weight}, {&dz}, {}}.run();
      near(dz, want, 1e-6, "dz");
    }
  }
  Value x = noise({3, 2}), z = noise({3, 1}), weight = noise({3}), o = ints({0, 3}), dz = empty({3, 1});
  for (const Ints& bad : {Ints{0, 4}, Ints{1, 2}, Ints{0, -1}, Ints{0, INT32_MAX}, Ints{INT32_MIN, 0}}) {
    Value b = ints(bad);
    Op{"topk_credit", {&x, &x, &x, &z, &o, &b, &weight}, {&dz}, {}}.throws(ErrorCode::InvalidData, "row_offsets");
    Op{"topk_credit", {&x, &x, &x, &z, &b, &o, &weight}, {&dz}, {}}.throws(ErrorCode::InvalidData, "offsets");
  }
  z.f32()[1] = NAN;
  Op{"topk_credit", {&x, &x, &x, &z, &o, &o, &weight}, {&dz}, {}}.throws(ErrorCode::InvalidData, "NaN score");
}

void testRoute() {
  for (const Ints& lengths : {Ints{}, Ints{0}, Ints{1}, Ints{7, 0, 64}, Ints{100, 17, 3}, Ints{2000}}) {
    for (const bool ties : {false, true}) {
      const Ints offsets = offsetsOf(lengths);
      const int64_t n = offsets.back(), segments = static_cast<int64_t>(lengths.size());
      Value z = noise({n, 1}), o = ints(offsets), capacity = make(DType::F32, {segments});
      Value rows = make(DType::I32, {n}), rowOffsets = make(DType::I32, {segments + 1});
      for (int64_t i = 0; i < n && ties; ++i) z.f32()[i] = static_cast<float>(below(3)) - 1;
      const std::vector<float> capacities{0.1f, 0.5f, 1, 0, 0.75f, 1.0f / 3};
      for (size_t c = 0; c < capacities.size(); ++c) {
        Ints want, wantOffsets{0};
        for (int64_t s = 0; s < segments; ++s) {
          capacity.f32()[s] = capacities[(c + s) % capacities.size()];
          Ints order;
          for (int32_t i = offsets[s]; i < offsets[s + 1]; ++i) order.push_back(i);
          std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return z.f32()[a] > z.f32()[b]; });
          const double k = std::ceil(static_cast<double>(capacity.f32()[s]) * lengths[s] - 1e-6);
          order.resize(static_cast<size_t>(std::clamp(k, 0.0, 1.0 * lengths[s])));
          std::sort(order.begin(), order.end());
          want.insert(want.end(), order.begin(), order.end());
          wantOffsets.push_back(static_cast<int32_t>(want.size()));
        }
        Op op{"route_topk", {&z, &o, &capacity}, {&rows, &rowOffsets}, {}};
        op.run();
        expect(op.produced[0] == static_cast<int64_t>(want.size()), "count");
        expect(std::equal(want.begin(), want.end(), rows.i32()), "rows");
        expect(std::equal(wantOffsets.begin(), wantOffsets.end(), rowOffsets.i32()), "offsets");

        Value threshold = make(DType::F32, {segments});
        Ints above;
        for (int64_t s = 0; s < segments; ++s) {
          threshold.f32()[s] = std::vector<float>{-INFINITY, 0, 0.5f, INFINITY}[(c + s) % 4];
          for (int32_t i = offsets[s]; i < offsets[s + 1]; ++i) {
            if (z.f32()[i] > threshold.f32()[s]) above.push_back(i);
          }
        }
        Op byThreshold{"route_threshold", {&z, &o, &threshold}, {&rows, &rowOffsets}, {}};
        byThreshold.run();
        expect(byThreshold.produced[0] == static_cast<int64_t>(above.size()), "count");
        expect(std::equal(above.begin(), above.end(), rows.i32()), "rows");
      }

      const Ints picked = someRows(n);
      const int64_t count = static_cast<int64_t>(picked.size());
      Value selection = ints(picked), g = empty({count}), dg = noise({count}), dz = empty({n, 1}), loss = empty({1});
      const Doubles Z = z.doubles(), DG = dg.doubles();
      for (int mode = 0; mode < 3; ++mode) {
        Op{"gate", {&z, &selection}, {&g}, {static_cast<double>(mode)}}.run();
        Op{"gate_grad", {&dg, &z, &selection}, {&dz}, {static_cast<double>(mode)}}.run();
        Doubles want(count), wantGrad(n, 0.0);
        for (int64_t r = 0; r < count; ++r) {
          const double s = 1 / (1 + std::exp(-Z[picked[r]]));
          want[r] = mode == 0 ? 1 : mode * s;
          wantGrad[picked[r]] = DG[r] * (mode == 0 ? 1 - s : mode * s * (1 - s));
        }
        near(g, want, mode == 0 ? 0 : 1e-6, "gate");
        near(dz, wantGrad, 1e-6, "dz");
      }
      const auto bce = [&](const Doubles& x) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
          const bool in = std::binary_search(picked.begin(), picked.end(), static_cast<int32_t>(i));
          sum += std::log(1 + std::exp(in ? -x[i] : x[i])) / static_cast<double>(n);
        }
        return sum;
      };
      Op{"topk_bce", {&z, &selection}, {&loss}, {}}.run();
      near(loss, {bce(Z)}, 1e-6, "loss");
      if (n <= 120) {
        Value dloss = floats({-2});
        Op{"topk_bce_grad", {&dloss, &z, &selection}, {&dz}, {}}.run();
        near(dz, slope([&](const Doubles& x) { return -2 * bce(x); }, Z), 1e-6, "dz");
      }
    }
  }
  testCredit();
  Value z = noise({4, 1}), o = ints({0, 4}), rows = make(DType::I32, {4}), rowOffsets = make(DType::I32, {2});
  for (const float bad : {-0.1f, 1.5f, NAN, INFINITY}) {
    Value c = floats({bad});
    Op{"route_topk", {&z, &o, &c}, {&rows, &rowOffsets}, {}}.throws(ErrorCode::InvalidData, "capacity");
  }
  Value c = floats({0.5f}), nan = floats({NAN}), two = floats({0.5f, 0.5f}), badOffsets = ints({0, 5});
  Op{"route_topk", {&z, &o, &two}, {&rows, &rowOffsets}, {}}.throws(ErrorCode::InvalidProgram, "two capacities");
  Op{"route_topk", {&z, &badOffsets, &c}, {&rows, &rowOffsets}, {}}.throws(ErrorCode::InvalidData, "offsets");
  Op{"route_threshold", {&z, &o, &nan}, {&rows, &rowOffsets}, {}}.throws(ErrorCode::InvalidData, "threshold NaN");
  Value out = ints({4}), g = empty({1}), loss = empty({1});
  Op{"gate", {&z, &out}, {&g}, {0}}.throws(ErrorCode::InvalidData, "row");
  Op{"gate", {&z, &rows}, {&g}, {3}}.throws(ErrorCode::InvalidProgram, "mode");
  Op{"gate_grad", {&g, &z, &out}, {&z}, {0}}.throws(ErrorCode::InvalidData, "row");
  Op{"topk_bce", {&z, &out}, {&loss}, {}}.throws(ErrorCode::InvalidData, "row");
  z.f32()[0] = 1000;
  z.f32()[1] = -1000;
  Value first = ints({0});
  Op{"topk_bce", {&z, &first}, {&loss}, {}}.run();
  expect(std::isfinite(loss.f32()[0]) && loss.f32()[0] < 3, "stable for large scores");
  z.f32()[2] = NAN;
  Op{"route_topk", {&z, &o, &c}, {&rows, &rowOffsets}, {}}.throws(ErrorCode::InvalidData, "NaN score");
}

// ---- optimizer

void testOptimizer() {
  for (const int64_t n : {0, 1, 17, 1000, 70001}) {
    for (const double clip : {0.0, 0.5, 1e6}) {
      Value p = noise({n}), g = noise({n}), m = noise({n}), v = noise({n}), norm = empty({1});
      for (int64_t i = 0; i < n; ++i) v.f32()[i] = std::fabs(v.f32()[i]);
      const Doubles P = p.doubles(), G = g.doubles(), M = m.doubles(), V = v.doubles();
      const float lr = 0.01f, b1 = 0.9f, b2 = 0.95f, eps = 1e-6f, decay = 0.1f;
      Value hyper = floats({lr, b1, b2, eps, decay, static_cast<float>(clip), 0.271f, 0.142625f});
      const int64_t decayed = n / 3;
      const double wantNorm = std::sqrt(inner(G, G));
      const double factor = clip > 0 && wantNorm > clip ? clip / (wantNorm + 1e-6) : 1;
      Doubles wantP(n), wantM(n), wantV(n);
      for (int64_t i = 0; i < n; ++i) {
        const double grad = G[i] * factor;
        wantM[i] = b1 * M[i] + (1.0 - b1) * grad;
        wantV[i] = b2 * V[i] + (1.0 - b2) * grad * grad;
        wantP[i] = P[i] * (i < decayed ? 1.0 - static_cast<double>(lr) * decay : 1.0);
        wantP[i] -= lr / 0.271 * wantM[i] / (std::sqrt(wantV[i]) / std::sqrt(0.142625) + eps);
      }
      Op{"adamw", {&p, &g, &m, &v, &hyper}, {&norm}, {static_cast<double>(decayed)}}.run();
      near(p, wantP, 1e-6, "p");
      near(m, wantM, 1e-6, "m");
      near(v, wantV, 1e-6, "v");
      near(g, Doubles(n, 0.0), 0, "g");
      near(norm, {wantNorm}, 1e-6, "norm");
      if (n > 0) {
        const Doubles before = p.doubles();
        g.f32()[n - 1] = INFINITY;
        Op{"adamw", {&p, &g, &m, &v, &hyper}, {&norm}, {0}}.run();
        expect(p.doubles() == before && !std::isfinite(norm.f32()[0]), "a norm that is not finite");
        near(g, Doubles(n, 0.0), 0, "g after a norm that is not finite");
      }
      Op{"adamw", {&p, &g, &m, &v, &hyper}, {&norm}, {n + 1.0}}.throws(ErrorCode::InvalidProgram, "decay_count");
      hyper.f32()[7] = 0;
      Op{"adamw", {&p, &g, &m, &v, &hyper}, {&norm}, {0}}.throws(ErrorCode::InvalidData, "no bias correction");
      hyper.f32()[0] = NAN;
      Op{"adamw", {&p, &g, &m, &v, &hyper}, {&norm}, {0}}.throws(ErrorCode::InvalidData, "lr NaN");

      Value state = noise({n + 5}), x = noise({n});
      Doubles want = state.doubles();
      for (int64_t i = 0; i < n; ++i) want[i + 3] += x.f32()[i];
      Op{"accumulate", {&state, &x}, {}, {3, 0}}.run();
      near(state, want, 1e-6, "state");
      Op{"accumulate", {&state, &x}, {}, {-1, 0}}.throws(ErrorCode::InvalidProgram, "offset");
      Op{"accumulate", {&state, &x}, {}, {6, 0}}.throws(ErrorCode::InvalidProgram, "offset");

      Value rows = noise({2 * n + 5}), two = noise({2, n});
      want = rows.doubles();
      for (int64_t i = 0; i < 2 * n; ++i) want[i + 3 + (i < n ? 0 : 2)] += two.f32()[i];
      Op{"accumulate", {&rows, &two}, {}, {3, n + 2.0}}.run();
      near(rows, want, 1e-6, "rows of a state");
      if (n == 0) continue;
      Op{"accumulate", {&rows, &two}, {}, {3, n + 3.0}}.throws(ErrorCode::InvalidProgram, "pass the state's end");
      Op{"accumulate", {&rows, &two}, {}, {0, n - 1.0}}.throws(ErrorCode::InvalidProgram, "must not overlap");
    }
  }
}

// ---- sampling

void testSample() {
  for (const int64_t vocabulary : {1, 3, 17, 100, 5000}) {
    for (int round = 0; round < 24; ++round) {
      const float temperature = std::vector<float>{0, 1, 0.7f, 2}[round % 4];
      const int64_t topK = std::vector<int64_t>{0, 1, 5, 90, 100000}[round % 5];
      const float topP = std::vector<float>{1, 0.9f, 0.3f, 0}[round / 4 % 4];
      Value logits = noise({3, vocabulary}, 2), params = make(DType::F32, {3, 4});
      for (int64_t i = 0; i < 3 * vocabulary && round % 3 == 0; ++i) {
        logits.f32()[i] = std::round(logits.f32()[i]);  // ties
      }
      if (vocabulary > 3) logits.f32()[vocabulary + 2] = -INFINITY;
      for (int64_t s = 0; s < 3; ++s) {
        const float u = static_cast<float>(random32() % 1000) / 1000;
        const float row[4] = {temperature, static_cast<float>(topK), topP, u};
        std::memcpy(params.f32() + s * 4, row, sizeof row);
      }
      Value ids = make(DType::I32, {3}), logprob = empty({3});
      Op{"sample", {&logits, &params}, {&ids, &logprob}, {}}.run();
      for (int64_t s = 0; s < 3; ++s) {
        const float* x = logits.f32() + s * vocabulary;
        const int32_t id = ids.i32()[s];
        if (id < 0 || id >= vocabulary) {
          expect(false, "id out of range");
          continue;
        }
        const double largest = *std::max_element(x, x + vocabulary);
        double total = 0;
        for (int64_t i = 0; i < vocabulary; ++i) total += std::exp(x[i] - largest);
        expect(std::fabs(logprob.f32()[s] - (x[id] - largest - std::log(total))) < 1e-5, "logprob");
        if (temperature == 0) {
          expect(id == std::max_element(x, x + vocabulary) - x, "greedy id");
          continue;
        }
        // The kept set: sort, cut at k, cut where the mass reaches p.
        std::vector<int64_t> order(vocabulary);
        for (int64_t i = 0; i < vocabulary; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
        if (topK > 0) order.resize(std::min(topK, vocabulary));
        const auto weight = [&](int64_t i) { return std::exp((x[i] - largest) / temperature); };
        double mass = 0, kept = 0;
        for (const int64_t i : order) mass += weight(i);
        size_t count = 0;
        while (count < order.size() && (count == 0 || kept < topP * mass)) kept += weight(order[count++]);
        if (topP == 1) count = order.size();
        order.resize(count);
        // The winner of the race among them, to rounding.
        const uint32_t noise = mixed(std::bit_cast<uint32_t>(params.f32()[s * 4 + 3]));
        const auto score = [&](int64_t i) {
          const uint32_t bits = mixed(noise + static_cast<uint32_t>(i) * 0x9e3779b9u);
          return weight(i) / -std::log1p(-(bits + 0.5) / 4294967296.0);
        };
        double most = 0;
        for (const int64_t i : order) most = std::max(most, score(i));
        const bool found = std::find(order.begin(), order.end(), id) != order.end();
        expect(!found || score(id) >= most * (1 - 1e-5), "another token's score is larger");
        expect(found, "id outside the kept set");
      }
    }
  }
  Value logits = noise({1, 4}), ids = make(DType::I32, {1}), logprob = empty({1});
  for (const std::vector<float>& bad : std::vector<std::vector<float>>{
           {-1, 0, 1, 0},
           {NAN, 0, 1, 0},
           {1, -1, 1, 0},
           {1, 1.5f, 1, 0},
           {1, 0, 1.5f, 0},
           {1, 0, -1, 0},
           {1, 0, 1, 1},
           {1, 0, 1, NAN}}) {
    Value params = make(DType::F32, {1, 4});
    std::copy(bad.begin(), bad.end(), params.f32());
    Op{"sample", {&logits, &params}, {&ids, &logprob}, {}}.throws(ErrorCode::InvalidData, "params");
  }
  Value params = make(DType::F32, {1, 4});
  params.f32()[2] = 1;
  logits.f32()[3] = NAN;
  Op{"sample", {&logits, &params}, {&ids, &logprob}, {}}.throws(ErrorCode::InvalidData, "NaN logit");
  logits.f32()[3] = INFINITY;
  Op{"sample", {&logits, &params}, {&ids, &logprob}, {}}.throws(ErrorCode::InvalidData, "infinite logit");
  std::fill_n(logits.f32(), 4, -INFINITY);
  Op{"sample", {&logits, &params}, {&ids, &logprob}, {}}.throws(ErrorCode::InvalidData, "no logit");
}

void testTable() {
  where = "findKernel";
  for (const OpDef& op : opDefs()) expect(findKernel(op.name) != nullptr, std::string("no kernel for ") + op.name);
  expect(findKernel("nonsense") == nullptr, "a kernel for nonsense");
}

}  // namespace

int testKernels() {
  const int threads = threadCount();
  testTable();
  for (const Isa candidate : {Isa::Portable, Isa::Avx2, Isa::Avx512}) {
    if (!useVectorOps(candidate)) continue;
    testing = candidate;
    testElementwise();
    testRows();
    testNorms();
    testRope();
    testAttention();
    testRoute();
    testOptimizer();
    testSample();
  }
  useVectorOps(isa());
  setThreadCount(threads);
  return failures;
}
