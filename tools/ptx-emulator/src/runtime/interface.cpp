// The emulator's own C interface: raw PTX for Python, checks and counts, figures for benchmarks.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "checks/settings.h"
#include "checks/transfers.h"
#include "counts/history.h"
#include "counts/report.h"
#include "device.h"
#include "findings.h"
#include "memory.h"
#include "runtime/state.h"

namespace ptx_emulator {

// Called by the functions of unsupported.cpp.
int unsupported(const char* name) {
  say(std::string(name) + " is not supported");
  return record(cudaErrorNotSupported);
}

namespace {
thread_local std::string interface_error;
}

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API const char* ptx_emulator_error() { return interface_error.c_str(); }

// The device of what is loaded and launched from now on: 80, 86 or 90. 0 on success.
PTX_API int ptx_emulator_device(int sm) {
  if (set_device(sm)) return cudaSuccess;
  return interface_error = "device " + std::to_string(sm) + ": expected 80, 86 or 90", cudaErrorInvalidValue;
}

// Parses and decodes PTX text; null on errors, which ptx_emulator_error then tells.
PTX_API void* ptx_emulator_load(const char* text, size_t bytes) {
  try {
    auto module = load_module(std::string_view(text, bytes));
    module->decode_all();
    return module.release();
  } catch (const std::exception& error) {
    interface_error = error.what();
    return nullptr;
  }
}

PTX_API void ptx_emulator_unload(void* module) { delete static_cast<Module*>(module); }

// Writes up to `capacity` (bytes, type width, is float, is signed, is array) five-tuples; returns the number of
// parameters, or -1 where there is no such kernel.
PTX_API int ptx_emulator_parameters(void* module, const char* name, int* out, int capacity) {
  Kernel* kernel = static_cast<Module*>(module)->kernel(name);
  if (!kernel) return -1;
  for (int k = 0; k < std::min(capacity, static_cast<int>(kernel->parameters.size())); ++k) {
    const Parameter& p = kernel->parameters[static_cast<size_t>(k)];
    const int row[] = {static_cast<int>(p.bytes), type_bytes(p.type), is_float(p.type), is_signed(p.type), p.array};
    std::copy(row, row + 5, out + 5 * k);
  }
  return static_cast<int>(kernel->parameters.size());
}

// The names of the kernels, one a line, valid until the thread's next call.
PTX_API const char* ptx_emulator_kernels(void* module) {
  interface_error.clear();
  for (const auto& function : static_cast<Module*>(module)->ptx.functions)
    if (function->entry && !function->declared_only) interface_error += function->name + "\n";
  return interface_error.c_str();
}

// Runs a kernel to its end. Returns 0, or CUDA's error code with the story in ptx_emulator_error.
PTX_API int ptx_emulator_launch(void* module, const char* name, const uint32_t* grid, const uint32_t* block,
                                uint32_t shared, const void* const* arguments, uint64_t* warp_instructions) {
  Kernel* kernel = static_cast<Module*>(module)->kernel(name);
  if (!kernel) return interface_error = "no such kernel", cudaErrorInvalidDeviceFunction;
  LaunchRequest request;
  request.kernel = kernel;
  request.grid = {grid[0], grid[1], grid[2]};
  request.block = {block[0], block[1], block[2]};
  request.dynamic_shared = shared;
  if (request.grid.count() == 0 || request.block.count() == 0 ||
      request.block.count() > static_cast<uint64_t>(kernel->max_threads) || grid[1] > 65535 || grid[2] > 65535 ||
      uint64_t{shared} + kernel->static_shared > static_cast<uint64_t>(device_limits().shared_per_block_optin))
    return interface_error = "invalid launch configuration", cudaErrorInvalidConfiguration;
  request.parameters.resize(kernel->parameter_bytes);
  for (size_t k = 0; k < kernel->parameters.size(); ++k)
    std::memcpy(request.parameters.data() + kernel->parameters[k].offset, arguments[k], kernel->parameters[k].bytes);
  const LaunchResult result = run_grid(request);
  if (warp_instructions) *warp_instructions = result.warp_instructions;
  interface_error = result.message;
  return result.code;
}

// Totals of all launches through the runtime: kernels, warp instructions, seconds.
PTX_API void ptx_emulator_totals(uint64_t* launches, uint64_t* warp_instructions, double* seconds) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  *launches = r.launches, *warp_instructions = r.warp_instructions, *seconds = r.seconds;
}

// What the last failed kernel or module had to say.
PTX_API const char* ptx_emulator_message() { return Runtime::instance().message.c_str(); }

// Memory of the caller's that kernels may touch; overlapping registrations are one region. written: its bytes count as
// written. 0 on success.
PTX_API int ptx_emulator_register(void* base, size_t bytes, int written, const char* name) {
  if (!base && bytes) return interface_error = "register: a null address", cudaErrorInvalidValue;
  if (bytes > (size_t{1} << 47) || reinterpret_cast<uintptr_t>(base) + bytes < bytes)
    return interface_error = "register: " + std::to_string(bytes) + " bytes are too many", cudaErrorInvalidValue;
  Memory::instance().enroll(base, bytes, written != 0, name ? name : "");
  return cudaSuccess;
}

// Undoes the last registration of that base. 0 on success.
PTX_API int ptx_emulator_unregister(const void* base) {
  if (Memory::instance().dismiss(base)) return cudaSuccess;
  return interface_error = "unregister: nothing is registered at that address", cudaErrorInvalidValue;
}

// Device memory of its own with never-written bytes; null where there is not enough.
PTX_API void* ptx_emulator_allocate(size_t bytes, const char* name) {
  return Memory::instance().allocate(bytes, Allocation::Kind::kDevice, name ? name : "");
}
PTX_API int ptx_emulator_free(const void* base) {
  return Memory::instance().release(base) ? cudaSuccess : cudaErrorInvalidValue;
}

// Checks of the launches to come. names: "memory,init,race,barrier" (a part of them), "all" or "".
PTX_API int ptx_emulator_checks(const char* names) {
  uint32_t checks;
  if (!parse_checks(names, checks))
    return interface_error = "checks '" + std::string(names) + "': expected memory, init, race, barrier, or all",
           cudaErrorInvalidValue;
  launch_settings().checks = checks;
  Memory::instance().track(checks != 0);
  return cudaSuccess;
}
PTX_API int ptx_emulator_schedule(const char* name, uint64_t seed) {
  if (!parse_schedule(name, launch_settings().schedule))
    return interface_error = "schedule '" + std::string(name) + "': expected roundrobin, random or adversarial",
           cudaErrorInvalidValue;
  launch_settings().seed = seed;
  return cudaSuccess;
}
PTX_API void ptx_emulator_count(int on) { launch_settings().count = on != 0; }

// What was found and counted so far, as JSON or text; valid until the thread's next call.
PTX_API const char* ptx_emulator_findings() {
  static thread_local std::string text;
  return (text = Findings::instance().json()).c_str();
}
PTX_API const char* ptx_emulator_counts(int format) {  // 0: JSON, 1: text, 2: text with the annotated PTX
  static thread_local std::string text;
  return (text = format == 0 ? counts_json() : counts_text(format == 2)).c_str();
}
// The PTX of a counted launch's module; null: there is none of that number. Valid until the thread's next call.
PTX_API const char* ptx_emulator_counted_module(size_t number) {
  static thread_local std::shared_ptr<const std::string> text;
  return (text = counted_module(number)) ? text->c_str() : nullptr;
}
PTX_API void ptx_emulator_clear() { Findings::instance().clear(), clear_counts(); }

// The host reads these bytes: a finding where one was never written.
PTX_API int ptx_emulator_host_reads(const void* base, size_t bytes) {
  return host_reads(base, bytes, "the host") ? cudaSuccess : cudaErrorInvalidValue;
}

// Launches through the runtime on another stream are findings, until this is called with on = 0.
PTX_API void ptx_emulator_expect_stream(int on, void* stream) {
  Runtime& r = Runtime::instance();
  r.expected_stream = static_cast<cudaStream_t>(stream);
  r.expects_stream = on != 0;
}

namespace {

// PTX_EMULATOR_REPORT: a file for findings and counts when the program ends; JSON, or text with the annotated PTX. Or a
// folder, for both, and the PTX of all modules with a counted kernel.
struct Reporter {
  static void write(const std::string& name, const std::string& text) {
    const std::string temporary = name + ".part";
    FILE* file = std::fopen(temporary.c_str(), "w");
    const bool written = file && std::fwrite(text.data(), 1, text.size(), file) == text.size();
    if (!file || std::fclose(file) != 0 || !written || std::rename(temporary.c_str(), name.c_str()) != 0)
      std::perror(("PTX emulator: PTX_EMULATOR_REPORT " + name).c_str());
  }

  ~Reporter() {
    const char* path = std::getenv("PTX_EMULATOR_REPORT");
    if (!path || !*path) return;
    const std::string name = path;
    std::error_code unknown;
    const bool folder = std::filesystem::is_directory(name, unknown);
    if (folder || name.ends_with(".json"))
      write(folder ? name + "/report.json" : name,
            "{\"findings\": " + Findings::instance().json() + ",\n\"launches\": " + counts_json() + "}\n");
    if (folder) write(name + "/report.txt", Findings::instance().text() + counts_text(false));
    if (folder || !name.ends_with(".json"))
      write(folder ? name + "/annotated.txt" : name, Findings::instance().text() + counts_text(true));
    if (!folder) return;
    for (size_t k = 0; const auto text = counted_module(k); ++k)
      write(name + "/module" + std::to_string(k) + ".ptx", *text);
  }
} reporter;

}  // namespace
