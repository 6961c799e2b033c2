#include "module.h"

#include <cstdlib>
#include <cstring>

#include "decode.h"
#include "memory.h"
#include "schedule.h"

namespace pop::emulator {

namespace {

std::atomic<uint32_t> g_stack_limit{1024};

DeviceLimits choose_limits() {
  DeviceLimits d;
  const char* text = std::getenv("POP_EMULATOR_SM");
  const int sm = text ? std::atoi(text) : 80;
  if (sm == 86) {
    d.sm_count = 84, d.capability_minor = 6, d.shared_per_block_optin = 99 * 1024, d.shared_per_sm = 100 * 1024,
    d.threads_per_sm = 1536, d.blocks_per_sm = 16;
    d.name = "POP software device (sm_86 model)";
  } else if (sm == 90) {
    d.sm_count = 132, d.capability_major = 9, d.shared_per_block_optin = 227 * 1024, d.shared_per_sm = 228 * 1024;
    d.name = "POP software device (sm_90 model)";
  }
  return d;
}

}  // namespace

const DeviceLimits& device_limits() {
  static const DeviceLimits limits = choose_limits();
  return limits;
}

uint32_t stack_limit() { return g_stack_limit; }
void set_stack_limit(uint32_t bytes) { g_stack_limit = bytes; }

std::string source_file(const Kernel& kernel, int index) {
  const auto& files = kernel.module->ptx.files;
  const auto at = files.find(index);
  if (at == files.end()) return "";
  const std::string& name = at->second;  // in quotes, as the PTX has it
  return name.size() >= 2 && name.front() == '"' ? name.substr(1, name.size() - 2) : name;
}

Module::~Module() {
  for (const auto& [variable, address] : addresses) Memory::instance().release(address);
}

Kernel* Module::kernel(const std::string& name) {
  const std::lock_guard lock(mutex);
  if (const auto known = kernels.find(name); known != kernels.end()) return known->second.get();
  const Function* function = ptx.find(name);
  if (!function || !function->entry || function->declared_only) return nullptr;
  return (kernels[name] = decode_kernel(*this, *function)).get();
}

void Module::decode_all() {
  for (const auto& function : ptx.functions)
    if (function->entry && !function->declared_only) kernel(function->name);
}

const Variable* Module::variable(const std::string& name) const {
  for (const auto& variable : ptx.variables)
    if (variable->name == name) return variable.get();
  return nullptr;
}

std::unique_ptr<Module> load_module(std::string_view text) {
  auto module = std::make_unique<Module>();
  module->text = std::make_shared<std::string>(text);
  module->ptx = parse_ptx(*module->text);
  const DeviceLimits& d = device_limits();
  const int sm = d.capability_major * 10 + d.capability_minor;
  if (module->ptx.target_sm > sm)
    throw PtxError("the module is for " + module->ptx.target + ", the device is sm_" + std::to_string(sm));
  for (const auto& variable : module->ptx.variables) {
    if (variable->space != Space::kGlobal && variable->space != Space::kConst) continue;
    if (variable->external) continue;
    uint8_t* address = Memory::instance().allocate(variable->bytes, Allocation::Kind::kVariable, variable->name);
    if (!address) throw PtxError("no memory for '" + variable->name + "'");
    module->addresses[variable.get()] = address;
    std::memset(address, 0, variable->bytes);
    if (!variable->initial.empty())
      std::memcpy(address, variable->initial.data(), std::min<size_t>(variable->initial.size(), variable->bytes));
  }
  for (const auto& variable : module->ptx.variables)
    for (const Relocation& r : variable->relocations) {
      uint64_t value = 0;
      if (const Variable* target = module->variable(r.symbol); target && module->addresses.contains(target))
        value = reinterpret_cast<uint64_t>(module->addresses[target]);
      else if (const Function* function = module->ptx.find(r.symbol))
        value = reinterpret_cast<uint64_t>(function);
      else
        throw PtxError("unknown name '" + r.symbol + "' in the initial value of '" + variable->name + "'");
      value += static_cast<uint64_t>(r.addend);
      const auto at = module->addresses.find(variable.get());
      if (at != module->addresses.end() && r.bytes == 8)
        std::memcpy(at->second + r.offset, &value, 8);
      else
        throw PtxError("an address in the initial value of '" + variable->name + "' needs 64 bits of global memory");
    }
  return module;
}

}  // namespace pop::emulator
