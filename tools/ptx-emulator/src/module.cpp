#include "module.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "decode.h"
#include "memory.h"

namespace ptx_emulator {

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
  // sm_90a and its like are for one device alone.
  const std::string& target = module->ptx.target;
  const bool own = !target.empty() && std::isalpha(static_cast<unsigned char>(target.back()));
  if (own ? module->ptx.target_sm != sm : module->ptx.target_sm > sm)
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

}  // namespace ptx_emulator
