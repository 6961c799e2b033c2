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

#include "data.h"
#include "models.h"
#include "pop/linear.h"
#include "reference.h"
#include "timing.h"

namespace bench {

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
    return software() ? time_launches(launch, rotation, stream, rotation, 3)
                      : time_launches(launch, rotation, stream, std::max(kLaunches, rotation), kSamples);
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
