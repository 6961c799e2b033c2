#pragma once

// What the microbenchmark programs share: sizes of real models, buffers, timing, counting, checking, and the report.
//
//   PROGRAM [--model NAME ...] [--tokens N ...] [--context N] [--json] [--time]
//
// On a GPU: median and spread of a launch's time over samples of many launches each, captured as one graph, on buffers
// that rotate so that twice the L2 cache passes before one is used again. Beside it the share of the limit: the time
// that the operation's multiplications need at the rate of a large multiplication, or its compulsory bytes (inputs read
// once, outputs written once) at the rate of a large copy, whichever is longer; both rates are taken in the same run.
//
// On the PTX emulator time means nothing; sizes are cut to what it can bear, and warp instructions are counted. The
// least that there could be: an mma.m16n8k16 for every 4,096 operations, and a 16-byte access of each lane for every
// 512 compulsory bytes. --time takes times there all the same, to show that this part works.
//
// Everywhere, a sample of the outputs is compared with the same computation in float64 on the host.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "pop/linear.h"

namespace bench {

using bf16 = __nv_bfloat16;

inline void ok(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}
#define BENCH_OK(call) ::bench::ok((call), #call)

// Models

struct Model {
  const char* name;
  int64_t hidden, intermediate, layers, query_heads, kv_heads, head_size, vocabulary;
  bool qk_norm, gelu, sandwich_norms;  // sandwich norms: the residual is added after a norm, not by a projection
  int64_t window, window_period;       // all layers but every period-th see `window` keys; 0: all of them see all

  /// Layers that prefill at two thirds of the depth skips.
  int64_t skipped() const { return layers - (2 * layers + 1) / 3; }
};

// From the config.json (its text_config where it has one) of meta-llama/Llama-3.1-8B, Qwen/Qwen3-VL-8B-Instruct,
// google/gemma-3-4b-pt and HuggingFaceTB/SmolLM2-135M.
inline constexpr Model kModels[] = {
    {"Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, false, false, false, 0, 0},
    {"Qwen3-VL-8B", 4096, 12288, 36, 32, 8, 128, 151936, true, false, false, 0, 0},
    {"Gemma-3-4B", 2560, 10240, 34, 8, 4, 256, 262208, true, true, true, 1024, 6},
    {"SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, false, false, false, 0, 0},
};
inline constexpr int64_t kDecodeTokens[] = {1, 8, 64}, kPromptTokens[] = {512, 2048, 8192};
inline constexpr int64_t kMostDecodeTokens = 64;  // more are a prompt
inline constexpr int64_t kDecodeContext = 4096;   // that each decoded token sees
inline constexpr int64_t kCacheBlock = 64;        // tokens
inline constexpr float kEps = 1e-6f;
inline constexpr double kUnit = 0x1p-8;  // of bf16: half the distance of two neighbours, relative

/// The model with sizes that the PTX emulator can bear: ratios of heads and shapes of a head stay.
inline Model cut(Model m) {
  m.hidden = std::min<int64_t>(m.hidden, 2048);
  m.intermediate = std::min<int64_t>(m.intermediate, 2048);
  m.query_heads = m.query_heads / m.kv_heads * 2;
  m.kv_heads = 2;
  m.vocabulary = 4096;
  m.layers = 6;
  m.window = std::min<int64_t>(m.window, 192);
  return m;
}
inline constexpr int64_t kCutPrompt = 512, kCutContext = 1024;

// Data

/// `count` values of unit variance times `scale`, around `mean`.
template <typename T>
std::vector<T> random_values(int64_t count, float scale = 1, float mean = 0) {
  static uint64_t state = 0;
  std::vector<T> values(count);
  for (T& value : values) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    z ^= z >> 31;
    value = T(mean + scale * 1.7320508f * (static_cast<float>(z >> 40) * 0x1p-23f - 1));
  }
  return values;
}

/// An operand on the device, once for each of the sets that launches rotate through.
template <typename T>
class Buffer {
 public:
  /// The same values in every set.
  Buffer(std::vector<T> values, int sets) : host_(std::move(values)) {
    allocate(sets);
    for (int set = 0; set < sets; ++set)
      BENCH_OK(cudaMemcpy((*this)[set], host_.data(), bytes(), cudaMemcpyHostToDevice));
  }
  /// An output, NaN until it is written.
  Buffer(int64_t count, int sets) : host_(count) {
    allocate(sets);
    BENCH_OK(cudaMemset(device_, 0xff, pitch_ * sets));
  }
  ~Buffer() { cudaFree(device_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* operator[](int set) { return reinterpret_cast<T*>(static_cast<char*>(device_) + pitch_ * set); }
  /// The host's copy: of an input its values, of an output those of set 0 at the last download.
  double at(int64_t i) const { return static_cast<double>(static_cast<float>(host_[i])); }
  void download() { BENCH_OK(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost)); }

 private:
  size_t bytes() const { return host_.size() * sizeof(T); }
  void allocate(int sets) {
    pitch_ = (bytes() + 255) / 256 * 256;
    BENCH_OK(cudaMalloc(&device_, std::max<size_t>(pitch_ * sets, 256)));
  }

  std::vector<T> host_;
  void* device_ = nullptr;
  size_t pitch_ = 0;
};

/// What an output should be, and the same computation on absolute values.
struct Expected {
  double value, magnitude;
};

/// x[x0 + i] . y[y0 + i], i < count.
template <typename X, typename Y>
Expected dot(const Buffer<X>& x, int64_t x0, const Buffer<Y>& y, int64_t y0, int64_t count) {
  Expected sum{};
  for (int64_t i = 0; i < count; ++i) {
    const double product = x.at(x0 + i) * y.at(y0 + i);
    sum.value += product;
    sum.magnitude += std::abs(product);
  }
  return sum;
}

/// A head of sums through RMS norm (gains null: none) and RoPE at angles[token], in float64; float32 cos and sin.
inline std::vector<Expected> finish_head(std::vector<Expected> head, const Buffer<float>* gains, int64_t gains0,
                                         const Buffer<float>& cos, const Buffer<float>& sin, int64_t angles0) {
  if (gains) {
    double squares = 0;
    for (const Expected& e : head) squares += e.value * e.value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(head.size()) + double{kEps});
    for (size_t i = 0; i < head.size(); ++i) {
      const double gain = scale * gains->at(gains0 + static_cast<int64_t>(i));
      head[i].value *= gain;
      head[i].magnitude *= std::abs(gain);
    }
  }
  const size_t half = head.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double c = cos.at(angles0 + static_cast<int64_t>(i)), s = sin.at(angles0 + static_cast<int64_t>(i));
    const Expected first = head[i], second = head[i + half];
    head[i] = {first.value * c - second.value * s, first.magnitude * std::abs(c) + second.magnitude * std::abs(s)};
    head[i + half] = {second.value * c + first.value * s,
                      second.magnitude * std::abs(c) + first.magnitude * std::abs(s)};
  }
  return head;
}

/// cos and sin of RoPE, [ropes, tokens, head_size / 2], rope r of base 10,000 * 100^r.
inline std::vector<float> angles(int64_t ropes, int64_t tokens, int64_t head_size, double (*function)(double)) {
  std::vector<float> values;
  for (int64_t r = 0; r < ropes; ++r)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < head_size / 2; ++i) {
        const double base = 1e4 * std::pow(100.0, static_cast<double>(r));
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(head_size);
        values.push_back(static_cast<float>(function(static_cast<double>(t) * std::pow(base, exponent))));
      }
  return values;
}

/// Tokens 0, 1, ... in cache blocks that lie in reverse order: the slots [tokens] of a sequence.
inline int64_t cache_blocks(int64_t tokens) { return (tokens + kCacheBlock - 1) / kCacheBlock; }
inline std::vector<int64_t> reversed_slots(int64_t tokens) {
  std::vector<int64_t> slots;
  for (int64_t t = 0; t < tokens; ++t)
    slots.push_back((cache_blocks(tokens) - 1 - t / kCacheBlock) * kCacheBlock + t % kCacheBlock);
  return slots;
}

inline pop::PagedCache paged_cache(void* data, int64_t blocks, int64_t heads, int64_t head_size) {
  return {data, blocks, kCacheBlock, heads, head_size, kCacheBlock * heads * head_size, heads * head_size, head_size};
}

// cuBLAS, where it is installed

/// y [tokens, out] = x weight^T in bf16 through cublasGemmEx, whose library is opened while the program runs.
class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    void* const library = dlopen("libcublas.so.13", RTLD_NOW);
    if (!library) return;
    const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
    const auto set_stream = reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(library, "cublasSetStream_v2"));
    const auto set_workspace = reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(library, "cublasSetWorkspace_v2"));
    const auto multiply = reinterpret_cast<Multiply>(dlsym(library, "cublasGemmEx"));
    if (!create || !set_stream || !set_workspace || !multiply || create(&handle_)) return;
    // A workspace of its own (the size that cuBLAS advises for Hopper), so that nothing is allocated under capture.
    constexpr size_t kWorkspace = 32 << 20;
    BENCH_OK(cudaMalloc(&workspace_, kWorkspace));
    if (!set_stream(handle_, stream) && !set_workspace(handle_, workspace_, kWorkspace)) multiply_ = multiply;
  }
  ~Cublas() { cudaFree(workspace_); }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  bool present() const { return multiply_; }

  void linear(int64_t tokens, int64_t in, int64_t out, const bf16* x, const bf16* weight, bf16* y) const {
    const float one = 1, zero = 0;
    // cuBLAS's matrices are column-major: y^T [out, tokens] = (weight^T [in, out])^T x^T [in, tokens].
    constexpr int kTransposed = 1, kPlain = 0, kCompute32F = 68, kDefaultAlgorithm = -1;
    const int n = static_cast<int>(tokens), m = static_cast<int>(out), k = static_cast<int>(in);
    const int status = multiply_(handle_, kTransposed, kPlain, m, n, k, &one, weight, CUDA_R_16BF, k, x, CUDA_R_16BF, k,
                                 &zero, y, CUDA_R_16BF, m, kCompute32F, kDefaultAlgorithm);
    if (status) throw std::runtime_error("cublasGemmEx: status " + std::to_string(status));
  }

 private:
  using Multiply = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType_t, int, const void*,
                           cudaDataType_t, int, const void*, void*, cudaDataType_t, int, int, int);
  void *handle_ = nullptr, *workspace_ = nullptr;
  Multiply multiply_ = nullptr;
};

// Running

/// One measured thing: what it is called, what it must do at least, and how it is launched and checked.
struct Case {
  std::string part;  // which of the model's, such as "down"
  int64_t tokens;
  std::string shape;
  double operations, bytes;    // two for a multiply-add; inputs read once and outputs written once
  double rounding, tolerance;  // |error| <= rounding |value| + tolerance magnitude
  std::function<void(int set, cudaStream_t)> launch;
  std::function<void()> download;                                      // outputs of set 0, before `output` is asked
  std::function<std::pair<double, Expected>(uint64_t random)> output;  // some output, and what it should be
  std::string peer = {};                                               // another program that does the same
  std::function<void(int set, cudaStream_t)> peer_launch = {};
};

struct Times {  // seconds
  double median, p10, p90;
};

struct Options {
  std::vector<Model> models;
  std::vector<int64_t> decode_tokens, prompt_tokens;
  int64_t context = kDecodeContext;
  bool json = false, time = false;
};

class Bench {
 public:
  Bench(const char* operation, const Options& options) : options(options), operation_(operation) {
    int device;
    BENCH_OK(cudaGetDevice(&device));
    BENCH_OK(cudaGetDeviceProperties(&properties_, device));
    BENCH_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    totals_ = reinterpret_cast<Totals>(dlsym(RTLD_DEFAULT, "ptx_emulator_totals"));
  }

  const Options options;
  cudaStream_t stream;

  /// The device is software that runs PTX on the processor.
  bool software() const { return totals_; }
  bool timed() const { return !software() || options.time; }

  /// Sets of buffers of `bytes` each, so that twice the L2 cache passes between two uses of one.
  int sets(double bytes) const {
    if (software()) return options.time ? 2 : 1;
    return static_cast<int>(std::min(1 + std::ceil(2.0 * properties_.l2CacheSize / bytes), double{kMaxSets}));
  }

  void begin() {
    if (timed()) measure_ceilings();
    if (options.json) return;
    printf("%s on %s, bf16\n", operation_, properties_.name);
    if (software()) printf("the PTX emulator: sizes are cut; warp instructions instead of time\n");
    if (timed()) {
      printf("ceilings of this run: %.1f TFLOP/s (%s, %lld^3), %.0f GB/s (a copy of %lld MiB, read and written)\n",
             gemm_rate_ * 1e-12, gemm_by_, static_cast<long long>(ceiling_size()), copy_rate_ * 1e-9,
             static_cast<long long>(copy_bytes() >> 20));
      printf("%-13s %-16s %6s %-26s %10s %19s %8s %7s %6s\n", "model", "part", "tokens", "shape", "us", "p10 - p90",
             "TFLOP/s", "GB/s", "limit");
    }
    if (software())
      printf("%-13s %-16s %6s %-26s %12s %10s %10s %6s %6s\n", "model", "part", "tokens", "shape", "instructions",
             "mma", "accesses", "ratio", "error");
  }

  void run(const Model& model, const Case& c) {
    c.launch(0, stream);
    BENCH_OK(cudaStreamSynchronize(stream));
    const double error = check(c);  // before anything is measured: what computes wrong has no speed
    std::string line = "{\"operation\": \"" + std::string(operation_) + "\", \"model\": \"" + model.name +
                       "\", \"part\": \"" + c.part + "\", \"tokens\": " + std::to_string(c.tokens) + ", \"shape\": \"" +
                       c.shape + "\"" + field("operations", c.operations) + field("bytes", c.bytes) +
                       field("error", error);
    if (timed()) {
      const int rotation = sets(c.bytes);
      const Times t = time(c.launch, rotation);
      const double by_gemm = c.operations / gemm_rate_, by_copy = c.bytes / copy_rate_;
      const double limit = std::max(by_gemm, by_copy) / t.median;
      const bool in_cache = !software() && (rotation - 1) * c.bytes < 2.0 * properties_.l2CacheSize;
      line += field("seconds", t.median) + field("seconds_p10", t.p10) + field("seconds_p90", t.p90) +
              field("operations_per_second", c.operations / t.median) + field("bytes_per_second", c.bytes / t.median) +
              field("limit_share", limit) + ", \"limited_by\": \"" + (by_gemm > by_copy ? "gemm" : "copy") +
              "\", \"in_cache\": " + (in_cache ? "true" : "false");
      if (!options.json)
        printf("%-13s %-16s %6lld %-26s %10.2f %8.2f - %8.2f %8.1f %7.0f %5.0f%%%s", model.name, c.part.c_str(),
               static_cast<long long>(c.tokens), c.shape.c_str(), t.median * 1e6, t.p10 * 1e6, t.p90 * 1e6,
               c.operations / t.median * 1e-12, c.bytes / t.median * 1e-9, limit * 100, in_cache ? " in L2" : "");
      if (c.peer_launch) {
        const Times other = time(c.peer_launch, rotation);
        line += ", \"peer\": \"" + c.peer + "\"" + field("peer_seconds", other.median);
        if (!options.json)
          printf("  %s %.2f us, %.2f of ours", c.peer.c_str(), other.median * 1e6, other.median / t.median);
      }
      if (!options.json) printf("\n");
    }
    if (software()) {
      const auto instructions = static_cast<double>(count(c.launch));
      const double mma = c.operations / kMmaOperations, accesses = c.bytes / kAccessBytes;
      const double ratio = instructions / (mma + accesses);
      line += field("warp_instructions", instructions) + field("compulsory_mma", mma) +
              field("compulsory_accesses", accesses) + field("instruction_ratio", ratio);
      if (!options.json)
        printf("%-13s %-16s %6lld %-26s %12.0f %10.0f %10.0f %6.2f %6.2f", model.name, c.part.c_str(),
               static_cast<long long>(c.tokens), c.shape.c_str(), instructions, mma, accesses, ratio, error);
      if (c.peer_launch) {
        const auto other = static_cast<double>(count(c.peer_launch));
        line += ", \"peer\": \"" + c.peer + "\"" + field("peer_warp_instructions", other) +
                field("peer_ratio", instructions / other);
        if (!options.json) printf("  %s %.0f, ours %.3f of it", c.peer.c_str(), other, instructions / other);
      }
      if (!options.json) printf("\n");
    }
    fflush(stdout);
    lines_.push_back(line + "}");
  }

  void end() const {
    if (!options.json) return;
    printf("{\"device\": \"%s\", \"software\": %s", properties_.name, software() ? "true" : "false");
    if (timed())
      printf("%s%s, \"gemm_by\": \"%s\"", field("gemm_operations_per_second", gemm_rate_).c_str(),
             field("copy_bytes_per_second", copy_rate_).c_str(), gemm_by_);
    printf(", \"lines\": [");
    for (size_t i = 0; i < lines_.size(); ++i) printf("%s\n  %s", i ? "," : "", lines_[i].c_str());
    printf("\n]}\n");
  }

 private:
  using Totals = void (*)(uint64_t* launches, uint64_t* warp_instructions, double* seconds);
  static constexpr int kSamples = 30, kLaunches = 20, kMaxSets = 512, kChecks = 64;
  static constexpr double kMmaOperations = 2 * 16 * 8 * 16, kAccessBytes = 32 * 16;

  static std::string field(const char* name, double value) {
    char text[96];
    snprintf(text, sizeof text, ", \"%s\": %.9g", name, value);
    return text;
  }

  /// The largest error of a sample of the outputs, in units of what is allowed.
  double check(const Case& c) const {
    c.download();
    double worst = 0;
    uint64_t random = 88172645463325252;
    for (int i = 0; i < kChecks; ++i) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;  // xorshift64
      const auto [value, expected] = c.output(random);
      const double allowed = c.rounding * std::abs(expected.value) + c.tolerance * expected.magnitude;
      const double error = std::abs(value - expected.value) / std::max(allowed, 1e-30);
      if (!(error <= 1))
        throw std::runtime_error(c.part + " " + c.shape + ": an output is " + std::to_string(value) + ", expected " +
                                 std::to_string(expected.value) + ", " + std::to_string(error) + " times the bound");
      worst = std::max(worst, error);
    }
    return worst;
  }

  uint64_t count(const std::function<void(int, cudaStream_t)>& launch) const {
    uint64_t launches, before, after;
    double seconds;
    totals_(&launches, &before, &seconds);
    launch(0, stream);
    BENCH_OK(cudaStreamSynchronize(stream));
    totals_(&launches, &after, &seconds);
    return after - before;
  }

  Times time(const std::function<void(int, cudaStream_t)>& launch, int rotation) const {
    const int launches = software() ? rotation : std::max(kLaunches, rotation), samples = software() ? 3 : kSamples;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaEvent_t begin, end;
    for (int set = 0; set < rotation; ++set) launch(set, stream);  // warms up, and opts kernels in before the capture
    BENCH_OK(cudaStreamSynchronize(stream));
    BENCH_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) launch(i % rotation, stream);
    BENCH_OK(cudaStreamEndCapture(stream, &graph));
    BENCH_OK(cudaGraphInstantiate(&executable, graph, 0));
    BENCH_OK(cudaEventCreate(&begin));
    BENCH_OK(cudaEventCreate(&end));
    std::vector<double> seconds;
    for (int i = -2; i < samples; ++i) {  // two more to warm up
      BENCH_OK(cudaEventRecord(begin, stream));
      BENCH_OK(cudaGraphLaunch(executable, stream));
      BENCH_OK(cudaEventRecord(end, stream));
      BENCH_OK(cudaEventSynchronize(end));
      float milliseconds;
      BENCH_OK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (i >= 0) seconds.push_back(milliseconds * 1e-3 / launches);
    }
    BENCH_OK(cudaEventDestroy(begin));
    BENCH_OK(cudaEventDestroy(end));
    BENCH_OK(cudaGraphExecDestroy(executable));
    BENCH_OK(cudaGraphDestroy(graph));
    std::sort(seconds.begin(), seconds.end());
    const auto quantile = [&](int percent) { return seconds[(seconds.size() - 1) * percent / 100]; };
    return {quantile(50), quantile(10), quantile(90)};
  }

  int64_t ceiling_size() const { return software() ? 128 : 8192; }
  int64_t copy_bytes() const { return int64_t{1} << (software() ? 20 : 30); }

  void measure_ceilings() {
    const int64_t n = ceiling_size();
    {
      Buffer<bf16> x(random_values<bf16>(n * n), 1), weight(random_values<bf16>(n * n), 1), y(n * n, 1);
      const Cublas cublas(stream);
      gemm_by_ = cublas.present() ? "cuBLAS" : "linear";
      const pop::Linear l{pop::DType::kBFloat16, n, n, n, x[0], n, weight[0], n, nullptr, nullptr, 0, y[0], false};
      Buffer<char> workspace(pop::cuda::linear_workspace(l), 1);
      const auto multiply = [&](int, cudaStream_t s) {
        cublas.present() ? cublas.linear(n, n, n, x[0], weight[0], y[0]) : pop::cuda::linear(l, workspace[0], s);
      };
      const auto size = static_cast<double>(n);
      gemm_rate_ = 2 * size * size * size / time(multiply, 1).median;
    }
    Buffer<char> memory(2 * copy_bytes(), 1);
    const auto copy = [&](int, cudaStream_t s) {
      BENCH_OK(cudaMemcpyAsync(memory[0], memory[0] + copy_bytes(), copy_bytes(), cudaMemcpyDeviceToDevice, s));
    };
    copy_rate_ = 2 * static_cast<double>(copy_bytes()) / time(copy, 1).median;
  }

  const char* operation_;
  Totals totals_;
  cudaDeviceProp properties_;
  double gemm_rate_ = 0, copy_rate_ = 0;
  const char* gemm_by_ = "";
  std::vector<std::string> lines_;
};

inline Options parse(int argc, char** argv) {
  Options o;
  std::vector<int64_t> tokens;
  const auto number = [&](const char* option, const char* text) {
    char* end;
    const long long value = strtoll(text, &end, 10);
    if (!*text || *end || value < 1 || value > 1 << 20)
      throw std::invalid_argument(std::string(option) + " takes numbers from 1 to 1048576, not " + text);
    return static_cast<int64_t>(value);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto has_value = [&] { return i + 1 < argc && std::string_view(argv[i + 1]).substr(0, 2) != "--"; };
    if ((argument == "--model" || argument == "--tokens" || argument == "--context") && !has_value())
      throw std::invalid_argument(std::string(argument) + " needs a value");
    if (argument == "--model") {
      while (has_value()) {
        const std::string_view name = argv[++i];
        const auto* const model =
            std::find_if(std::begin(kModels), std::end(kModels), [&](auto& m) { return m.name == name; });
        if (model == std::end(kModels)) {
          std::string names;
          for (const Model& m : kModels) names += std::string(names.empty() ? "" : ", ") + m.name;
          throw std::invalid_argument("--model takes " + names + ", not " + std::string(name));
        }
        o.models.push_back(*model);
      }
    } else if (argument == "--tokens") {
      while (has_value()) tokens.push_back(number("--tokens", argv[++i]));
    } else if (argument == "--context") {
      o.context = number("--context", argv[++i]);
    } else if (argument == "--json") {
      o.json = true;
    } else if (argument == "--time") {
      o.time = true;
    } else {
      throw std::invalid_argument("unknown argument " + std::string(argument) +
                                  ": [--model NAME ...] [--tokens N ...] [--context N] [--json] [--time]");
    }
  }
  if (o.models.empty()) o.models.assign(std::begin(kModels), std::end(kModels));
  if (tokens.empty()) {
    o.decode_tokens.assign(std::begin(kDecodeTokens), std::end(kDecodeTokens));
    o.prompt_tokens.assign(std::begin(kPromptTokens), std::end(kPromptTokens));
  }
  for (const int64_t n : tokens) (n <= kMostDecodeTokens ? o.decode_tokens : o.prompt_tokens).push_back(n);
  return o;
}

/// The program: runs `cases(bench, model, tokens)` for every model and token count, and reports.
inline int main(const char* operation, int argc, char** argv,
                const std::function<void(Bench&, const Model&, int64_t tokens)>& cases) {
  try {
    Bench b(operation, parse(argc, argv));
    b.begin();
    for (const Model& whole : b.options.models) {
      const Model model = b.software() ? cut(whole) : whole;
      std::vector<int64_t> counts = b.options.decode_tokens;
      for (const int64_t n : b.options.prompt_tokens) {
        const int64_t tokens = b.software() ? std::min(n, kCutPrompt) : n;
        if (std::find(counts.begin(), counts.end(), tokens) == counts.end()) counts.push_back(tokens);
      }
      for (const int64_t tokens : counts) cases(b, model, tokens);
    }
    b.end();
    return 0;
  } catch (const std::exception& e) {
    fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}

/// "a x b x c"
template <typename... Sizes>
std::string shape(int64_t first, Sizes... others) {
  std::string text = std::to_string(first);
  ((text += " x " + std::to_string(others)), ...);
  return text;
}

}  // namespace bench
