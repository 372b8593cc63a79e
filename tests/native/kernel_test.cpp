// Every kernel of every usable table against the scalar table, bit for bit. There is no Python, so
// that it also runs where an ISA is only emulated. Arguments are tables that must be among them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernel_table.h"

namespace {

using namespace gptx;
using namespace gptx::cpu;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// An array that ends where readable memory ends: a kernel that goes beyond it stops the test.
// Filled with bytes that are NaN in every type.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = round_up(count * sizeof(T), page);
    mapped_ = bytes + page;
    base_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(base_ != MAP_FAILED, "mmap");
    require(mprotect(base_ + bytes, page, PROT_NONE) == 0, "mprotect");
    data_ = reinterpret_cast<T*>(base_ + bytes - count * sizeof(T));
    std::memset(static_cast<void*>(data_), 0xFF, count * sizeof(T));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { munmap(base_, mapped_); }

  T* data() const { return data_; }
  T* last(size_t n) const { return data_ + (count_ - n); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }
  std::span<T> span() const { return {data_, count_}; }

 private:
  std::byte* base_;
  size_t mapped_;
  size_t count_;
  T* data_;
};

// --- random numbers ---

enum class Kind { kNormal, kOutliers, kPositive, kZero, kSubnormal, kHuge, kNaN, kInfinite };
constexpr Kind kKinds[] = {Kind::kNormal,    Kind::kOutliers, Kind::kPositive, Kind::kZero,
                           Kind::kSubnormal, Kind::kHuge,     Kind::kNaN,      Kind::kInfinite};

std::mt19937 random_bits{1};

float normal() { return std::normal_distribution<float>()(random_bits); }
size_t below(size_t n) { return random_bits() % n; }

float number(Kind kind) {
  switch (kind) {
    case Kind::kOutliers: return normal() * (below(16) == 0 ? 100.0f : 1.0f);
    case Kind::kPositive: return std::fabs(normal()) + 1.0f;
    case Kind::kZero: return below(2) == 0 ? 0.0f : -0.0f;
    case Kind::kSubnormal: return normal() * 1e-39f;
    case Kind::kHuge: return normal() * 3e37f;
    default: return normal();
  }
}

// The usual ones, those that become zero where they are rounded as numbers, and one that becomes
// infinite.
constexpr uint32_t kNaNs[] = {0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001};

void fill(std::span<float> row, Kind kind) {
  for (float& x : row) x = number(kind);
  if (kind == Kind::kNaN) row[below(row.size())] = std::bit_cast<float>(kNaNs[below(5)]);
  if (kind == Kind::kInfinite) row[below(row.size())] = -std::numeric_limits<float>::infinity();
}

// Every second row is ordinary.
Kind kind_of_row(size_t row) {
  return row % 2 == 0 ? Kind::kNormal : kKinds[(row / 2 + 1) % std::size(kKinds)];
}

float largest(std::span<const float> values) {
  float top = 0.0f;
  for (const float x : values) top = std::max(top, std::fabs(x));
  return top;
}

// --- what is compared ---

struct Subject {
  const KernelTable* table;
  size_t comparisons = 0;
  size_t values = 0;
  size_t failures = 0;
};

const KernelTable* scalar;
std::vector<Subject> subjects;

// Whether a table multiplies bfloat16 by an instruction that flushes subnormal numbers: its results
// are close, not equal.
bool flushes(const KernelTable& table) {
  const std::string_view name = table.name;
  return name == "avx512_bf16" || name == "avx512_amx";
}

// Which operand's sign and payload a NaN inherits is up to the compiler: NaN equals NaN.
bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (a != a && b != b);
}

void fail(Subject& subject, const std::string& what, size_t at, double got, double expected) {
  if (++subject.failures > 5) return;
  std::fprintf(stderr, "%s: %s: value %zu is %.9g, expected %.9g\n", subject.table->name,
               what.c_str(), at, got, expected);
}

void compare(Subject& subject, const std::string& what, std::span<const float> got,
             std::span<const float> expected, float tolerance = 0.0f) {
  subject.comparisons += 1;
  subject.values += got.size();
  for (size_t i = 0; i < got.size(); ++i) {
    const bool near = tolerance > 0.0f && std::fabs(got[i] - expected[i]) <= tolerance;
    if (same(got[i], expected[i]) || near) continue;
    return fail(subject, what, i, got[i], expected[i]);
  }
}

void compare_bytes(Subject& subject, const std::string& what, std::span<const std::byte> got,
                   std::span<const std::byte> expected) {
  subject.comparisons += 1;
  subject.values += got.size();
  const auto at = static_cast<size_t>(std::ranges::mismatch(got, expected).in1 - got.begin());
  if (at == got.size()) return;
  fail(subject, what, at, std::to_integer<int>(got[at]), std::to_integer<int>(expected[at]));
}

// --- linear ---

constexpr const char* kPrecisionNames[kPrecisions] = {"float32", "bfloat16", "int8", "int8-fast"};
constexpr size_t kGuard = 7;  // floats between rows that nobody may write

struct Matrix {
  Matrix(Precision p, size_t outputs, size_t inputs)
      : precision(p),
        n(outputs),
        depth(inputs),
        panel_bytes(round_up(depth, inputs_per_line(p)) / inputs_per_line(p) * kLineBytes),
        panels(n / kPanel * panel_bytes),
        scale(n),
        colsum(n),
        bias(n) {
    std::ranges::fill(panels.span(), std::byte{0});
    std::ranges::fill(colsum.span(), 0);
    fill(bias.span(), Kind::kNormal);
    for (float& x : scale.span()) x = std::fabs(normal()) * 0.01f;
    for (size_t column = 0; column < n; ++column) {
      for (size_t k = 0; k < depth; ++k) set(column, k);
    }
  }

  void set(size_t column, size_t k) {
    const size_t inputs = inputs_per_line(precision);
    const size_t bytes = kLineBytes / kPanel / inputs;
    std::byte* const p = panels.data() + column / kPanel * panel_bytes + k / inputs * kLineBytes +
                         (column % kPanel * inputs + k % inputs) * bytes;
    if (bytes == 1) {
      const auto q = static_cast<int8_t>(static_cast<int>(below(255)) - 127);
      std::memcpy(p, &q, sizeof q);
      colsum[column] += q;
      return;
    }
    const Kind kind = below(50) == 0 ? Kind::kSubnormal : Kind::kNormal;
    const auto bits = std::bit_cast<uint32_t>(number(kind));
    if (bytes == 4) {
      std::memcpy(p, &bits, sizeof bits);
    } else {
      const auto half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(p, &half, sizeof half);
    }
  }

  Precision precision;
  size_t n, depth, panel_bytes;
  Array<std::byte> panels;
  Array<float> scale;
  Array<int32_t> colsum;
  Array<float> bias;
};

// Rows of activations as one table writes them.
struct Operands {
  Operands(const KernelTable& table, Precision precision, const Array<float>& act, size_t rows,
           size_t depth)
      : stride(round_up(depth * kOperandBytes, kLineBytes) | kLineBytes),
        bytes(rows * stride),
        scales(rows) {
    for (size_t i = 0; i < rows; ++i) {
      // A copy of the row by itself, for its end.
      Array<float> row(depth);
      std::copy_n(act.data() + i * depth, depth, row.data());
      scales[i] = table[precision].operand(bytes.data() + i * stride, row.data(), depth);
    }
  }

  size_t stride;
  Array<std::byte> bytes;
  Array<RowScale> scales;
};

struct Epilogue {
  Activation activation;
  bool add;
};
constexpr Epilogue kEpilogues[] = {{Activation::kNone, false},
                                   {Activation::kGeluNew, false},
                                   {Activation::kGelu, false},
                                   {Activation::kRelu, false},
                                   {Activation::kNone, true}};

// A huge number times a subnormal one is not small: such rows cannot be compared with a tolerance.
void forget_huge_rows(std::span<float> got, std::span<const float> expected, size_t stride) {
  for (size_t at = 0; at < got.size(); at += stride) {
    const Kind kind = kind_of_row(at / stride);
    if (kind != Kind::kHuge && kind != Kind::kInfinite) continue;
    std::ranges::copy(expected.subspan(at, stride), got.subspan(at, stride).begin());
  }
}

// The last n columns of the matrix, in two calls, onto `out`.
void run_linear(const KernelTable& table, const Matrix& m, const Operands& act, size_t rows,
                size_t n, Epilogue epilogue, std::span<float> out) {
  const size_t panels = n / kPanel;
  const LinearTask task{.out = out.data(),
                        .out_stride = n + kGuard,
                        .act = act.bytes.data(),
                        .act_stride = act.stride,
                        .act_scale = act.scales.data(),
                        .panels = m.panels.last(panels * m.panel_bytes),
                        .scale = m.scale.last(n),
                        .colsum = m.colsum.last(n),
                        .bias = m.bias.last(n),
                        .rows = rows,
                        .depth = m.depth,
                        .activation = epilogue.activation,
                        .add = epilogue.add};
  table[m.precision].linear(task, 0, panels / 3);
  table[m.precision].linear(task, panels / 3, panels);
}

void compare_linear(Precision precision, size_t depth) {
  constexpr size_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 33};  // every height of a tile, and several tiles
  constexpr size_t kColumns[] = {16, 48, 80, 144};
  constexpr size_t kMostRows = kRows[std::size(kRows) - 1];
  const Matrix matrix(precision, kColumns[std::size(kColumns) - 1], depth);
  Array<float> act(kMostRows * depth);
  for (size_t i = 0; i < kMostRows; ++i) fill(act.span().subspan(i * depth, depth), kind_of_row(i));
  const std::string name = std::string("linear ") + kPrecisionNames[static_cast<size_t>(precision)];

  const Operands expected_act(*scalar, precision, act, kMostRows, depth);
  std::vector<std::unique_ptr<Operands>> operands;
  for (Subject& s : subjects) {
    operands.push_back(
        std::make_unique<Operands>(*s.table, precision, act, kMostRows, depth));
    for (size_t i = 0; i < kMostRows; ++i) {
      const RowScale &got = operands.back()->scales[i], &expected = expected_act.scales[i];
      const float values[] = {got.scale, static_cast<float>(got.zero)};
      const float wanted[] = {expected.scale, static_cast<float>(expected.zero)};
      compare(s, name + " operand, depth " + std::to_string(depth), values, wanted);
    }
  }
  size_t turn = depth;
  for (const size_t rows : kRows) {
    // Many rows cost time; what they try is the blocks of rows.
    if (rows > 13 && depth > 520) continue;
    for (const size_t n : kColumns) {
      const Epilogue epilogue = kEpilogues[turn++ % std::size(kEpilogues)];
      std::vector<float> before(rows * (n + kGuard));
      fill(before, Kind::kNormal);
      std::vector<float> expected = before;
      run_linear(*scalar, matrix, expected_act, rows, n, epilogue, expected);
      const std::string what = name + ", rows " + std::to_string(rows) + ", n " +
                               std::to_string(n) + ", depth " + std::to_string(depth) +
                               ", activation " +
                               std::to_string(static_cast<int>(epilogue.activation)) +
                               (epilogue.add ? ", added" : "");
      for (size_t s = 0; s < subjects.size(); ++s) {
        const KernelTable& table = *subjects[s].table;
        std::vector<float> got = before;
        run_linear(table, matrix, *operands[s], rows, n, epilogue, got);
        const bool near = precision == Precision::kBFloat16 && flushes(table);
        if (near) forget_huge_rows(got, expected, n + kGuard);
        const float tolerance = 1e-5f * std::sqrt(static_cast<float>(depth));
        compare(subjects[s], what, got, expected, near ? tolerance : 0.0f);
      }
    }
  }
}

// --- attention ---

constexpr const char* kKvNames[kKvTypes] = {"float32", "bfloat16", "int8"};

// Query, key and value of each position, padded with zeros to whole panels.
struct Sequence {
  Sequence(size_t positions, size_t size, Kind kind)
      : length(positions),
        head_size(size),
        stride(3 * round_up(size, kPanel)),
        qkv(length * stride) {
    std::ranges::fill(qkv.span(), 0.0f);
    for (size_t t = 0; t < length; ++t) {
      for (size_t part = 0; part < 3; ++part) {
        fill({row(t, part), head_size}, below(8) == 0 ? kind : Kind::kNormal);
      }
    }
  }
  float* row(size_t t, size_t part) const { return qkv.data() + t * stride + part * stride / 3; }

  size_t length, head_size, stride;
  Array<float> qkv;
};

struct Cache {
  Cache(const KernelTable& table, KvType type, const Sequence& s)
      : block_bytes(kv_head_bytes(type, s.stride / 3)),
        bytes((s.length + kBlock - 1) / kBlock * block_bytes) {
    for (size_t t = 0; t < s.length; ++t) {
      std::byte* const block = bytes.data() + t / kBlock * block_bytes;
      table[type].append_key(block, s.row(t, 1), t, s.head_size);
      table[type].append_value(block, s.row(t, 2), t, s.head_size);
    }
    for (size_t b = 0; b < bytes.size(); b += block_bytes) blocks.push_back(bytes.data() + b);
  }

  size_t block_bytes;
  Array<std::byte> bytes;
  std::vector<const std::byte*> blocks;
};

// The results of all positions from `first` on, up to `step` of a block at a time.
std::vector<float> attend(const KernelTable& table, KvType type, const Sequence& s,
                          const Cache& cache, size_t first, size_t step) {
  const size_t width = s.stride / 3;
  const size_t out_stride = s.head_size + kGuard;
  std::vector<float> out(s.length * out_stride, -1.0f);
  for (size_t t = first; t < s.length;) {
    const size_t rows = std::min({step, s.length - t, kBlock - t % kBlock});
    Array<float> scratch(round_up(attention_scratch(width), kPanel));
    table[type].attention({.out = out.data() + t * out_stride,
                           .out_stride = out_stride,
                           .query = s.row(t, 0),
                           .query_stride = s.stride,
                           .blocks = cache.blocks.data(),
                           .next = cache.blocks[0],
                           .position = t,
                           .rows = rows,
                           .head_size = s.head_size,
                           .scale = 0.37f,
                           .scratch = scratch.data()});
    t += rows;
  }
  return out;
}

void compare_attention(KvType type, size_t head_size, size_t length, Kind kind) {
  const Sequence sequence(length, head_size, kind);
  const Cache expected_cache(*scalar, type, sequence);
  const std::string what = std::string("attention ") + kKvNames[static_cast<size_t>(type)] +
                           ", head size " + std::to_string(head_size) + ", length " +
                           std::to_string(length) + ", kind " +
                           std::to_string(static_cast<int>(kind));
  struct Way {
    size_t first, step;
  };
  std::vector<std::vector<float>> expected;
  const Way ways[] = {{0, kBlock}, {0, 7}, {length - 1, 1}};
  for (const Way& way : ways) {
    expected.push_back(attend(*scalar, type, sequence, expected_cache, way.first, way.step));
  }
  for (Subject& s : subjects) {
    const Cache cache(*s.table, type, sequence);
    compare_bytes(s, what + ", cache", cache.bytes.span(), expected_cache.bytes.span());
    const bool near = type == KvType::kBFloat16 && flushes(*s.table);
    // A query of NaN leaves weights of e^-87, whose products are subnormal.
    if (near && kind == Kind::kNaN) continue;
    for (size_t i = 0; i < std::size(ways); ++i) {
      compare(s, what, attend(*s.table, type, sequence, cache, ways[i].first, ways[i].step),
              expected[i], near ? 1e-2f * largest(sequence.qkv.span()) : 0.0f);
    }
  }
}

// --- rows ---

void compare_layer_norm(size_t n, Kind kind) {
  Array<float> x(n), gain(round_up(n, kPanel)), bias(round_up(n, kPanel));
  fill(x.span(), kind);
  fill(gain.span(), Kind::kNormal);
  fill(bias.span(), Kind::kNormal);
  const auto run = [&](const KernelTable& table) {
    Array<float> out(n);
    table.layer_norm(out.data(), x.data(), gain.data(), bias.data(), n, 1e-5f);
    return std::vector<float>(out.data(), out.data() + n);
  };
  const std::vector<float> expected = run(*scalar);
  for (Subject& s : subjects) {
    const std::string kind_name = std::to_string(static_cast<int>(kind));
    compare(s, "layer_norm, n " + std::to_string(n) + ", kind " + kind_name, run(*s.table),
            expected);
  }
}

// f(table, y, x, n) on the numbers of x.
template <class F>
void compare_function(const std::string& what, const Array<float>& x, F f) {
  const auto run = [&](const KernelTable& table) {
    Array<float> y(x.size());
    f(table, y.data(), x.data(), x.size());
    return std::vector<float>(y.data(), y.data() + y.size());
  };
  const std::vector<float> expected = run(*scalar);
  for (Subject& s : subjects) compare(s, what, run(*s.table), expected);
}

void compare_sum_exp(const Array<float>& x) {
  for (const float shift : {0.0f, largest(x.span()), -3.5f}) {
    const double expected[] = {scalar->sum_exp(x.data(), x.size(), shift)};
    for (Subject& s : subjects) {
      const double got[] = {s.table->sum_exp(x.data(), x.size(), shift)};
      compare_bytes(s, "sum_exp, n " + std::to_string(x.size()), std::as_bytes(std::span(got)),
                    std::as_bytes(std::span(expected)));
    }
  }
}

void compare_functions(const Array<float>& x) {
  compare_function("exp", x, [](const KernelTable& table, float* y, const float* from, size_t n) {
    table.exp_f32(y, from, n);
  });
  compare_sum_exp(x);
  for (const Activation activation :
       {Activation::kNone, Activation::kGeluNew, Activation::kGelu, Activation::kRelu}) {
    compare_function("activation " + std::to_string(static_cast<int>(activation)), x,
                     [&](const KernelTable& table, float* y, const float* from, size_t n) {
                       table.activate_f32(y, from, n, activation);
                     });
  }
}

void compare_rows() {
  for (const size_t n : {1, 2, 15, 16, 17, 31, 32, 48, 257, 768, 1600}) {
    for (const Kind kind : kKinds) compare_layer_norm(n, kind);
  }
  for (size_t n = 1; n < 40; ++n) {
    Array<float> x(n);
    for (float& v : x.span()) v = 4.0f * normal();
    compare_functions(x);
  }
  for (const size_t n : {127, 128, 129, 1000}) {  // about the end of a chain
    Array<float> x(n);
    fill(x.span(), Kind::kNormal);
    compare_sum_exp(x);
  }
  Array<float> range(60'001);
  for (size_t i = 0; i < range.size(); ++i) {
    range[i] = (static_cast<float>(i) - 30'000.0f) * 0.0035f;
  }
  compare_functions(range);
  Array<float> patterns(60'001);
  for (float& x : patterns.span()) x = std::bit_cast<float>(static_cast<uint32_t>(random_bits()));
  compare_functions(patterns);
}

void compare_probes() {
  Array<float> data(64 * 50);
  fill(data.span(), Kind::kNormal);
  for (Subject& s : subjects) {
    for (size_t p = 0; p < kPrecisions; ++p) {
      const float got[] = {s.table->matmul[p].probe(3)}, expected[] = {scalar->matmul[p].probe(3)};
      compare(s, "probe", got, expected);
    }
    const float got[] = {s.table->probe_read(data.data(), data.size())};
    const float expected[] = {scalar->probe_read(data.data(), data.size())};
    compare(s, "probe_read", got, expected);
  }
}

}  // namespace

int main(int count, char** names) {
  for (const KernelTable* table : usable_kernels()) {
    if (std::string_view(table->name) == "scalar") {
      scalar = table;
    } else {
      subjects.push_back({.table = table});
    }
  }
  for (const std::string name : std::span(names, static_cast<size_t>(count)).subspan(1)) {
    const auto is_named = [&](const Subject& s) { return s.table->name == name; };
    require(std::ranges::any_of(subjects, is_named), name.c_str());
  }
  for (const Precision precision : {Precision::kFloat32, Precision::kBFloat16, Precision::kInt8,
                                    Precision::kInt8Fast}) {
    for (const size_t depth : {1, 3, 17, 64, 97, 511, 512, 513, 1100}) {
      compare_linear(precision, depth);
    }
  }
  for (const KvType type : {KvType::kFloat32, KvType::kBFloat16, KvType::kInt8}) {
    for (const size_t head_size : {1, 20, 25, 64}) {
      for (const size_t length : {1, 2, 7, 63, 64, 65, 130}) {
        compare_attention(type, head_size, length, Kind::kNormal);
      }
      for (const Kind kind : kKinds) compare_attention(type, head_size, 81, kind);
    }
  }
  compare_rows();
  compare_probes();
  size_t failures = 0;
  for (const Subject& s : subjects) {
    std::printf("%s: %zu results of %zu values, %zu differ\n", s.table->name, s.comparisons,
                s.values, s.failures);
    failures += s.failures;
  }
  if (failures > 0) return 1;
  std::puts("ok");
}
