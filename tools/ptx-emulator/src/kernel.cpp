// A kernel with all functions that it may call: what they need of shared and local memory and of registers.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "decode.h"
#include "module.h"

namespace ptx_emulator {

namespace {

void visit_operands(const Operand& operand, const std::function<void(const Operand&)>& visit) {
  visit(operand);
  for (const Operand& element : operand.elements) visit_operands(element, visit);
}

uint32_t align_up(uint64_t value, uint64_t alignment, const char* what) {
  if (alignment == 0) alignment = 1;
  const uint64_t result = (value + alignment - 1) / alignment * alignment;
  if (result > (1u << 30)) throw PtxError(std::string(what) + " is too large");
  return static_cast<uint32_t>(result);
}

}  // namespace

std::unique_ptr<Kernel> decode_kernel(Module& module, const Function& function) {
  auto owned = std::make_unique<Kernel>();
  Kernel& kernel = *owned;
  kernel.name = function.name;
  kernel.module = &module;
  kernel.function = &function;

  // Everything the kernel can reach: with an indirect call, or a function's address in memory, that is every function.
  std::vector<const Function*> reachable{&function};
  std::vector<const Variable*> shared_order;
  std::unordered_set<const void*> seen{&function};
  bool indirect = false;
  for (size_t i = 0; i < reachable.size(); ++i) {
    for (const Statement& s : reachable[i]->statements) {
      bool direct = s.opcode != "call";
      for (const Operand& operand : s.operands)
        visit_operands(operand, [&](const Operand& o) {
          if (o.kind == Operand::Kind::kFunction || (o.kind == Operand::Kind::kName && s.opcode == "call")) {
            const Function* callee = module.ptx.find(o.name);
            if (callee) direct = true;
            if (callee && !callee->declared_only && seen.insert(callee).second) reachable.push_back(callee);
          }
          if (o.kind == Operand::Kind::kVariable && o.variable->space == Space::kShared &&
              seen.insert(o.variable).second)
            shared_order.push_back(o.variable);
        });
      if (!direct) indirect = true;
    }
    if (indirect && i + 1 == reachable.size())
      for (const auto& other : module.ptx.functions)
        if (!other->declared_only && !other->entry && seen.insert(other.get()).second) reachable.push_back(other.get());
  }

  std::unordered_map<const Variable*, uint32_t> shared;
  for (const Variable* variable : shared_order) {
    if (variable->external || variable->bytes == 0) continue;
    const uint32_t offset = align_up(kernel.static_shared, variable->alignment, "shared memory");
    shared[variable] = offset;
    kernel.static_shared = align_up(offset + variable->bytes, 1, "shared memory");
  }
  // Dynamic shared memory begins where the static ends, on the strictest alignment asked for.
  uint32_t dynamic_alignment = 1;
  for (const Variable* variable : shared_order)
    if (!shared.contains(variable)) dynamic_alignment = std::max({dynamic_alignment, variable->alignment, 16u});
  kernel.static_shared = align_up(kernel.static_shared, dynamic_alignment, "shared memory");
  for (const Variable* variable : shared_order) shared.try_emplace(variable, kernel.static_shared);

  for (const Variable* parameter : function.parameters) {
    const uint32_t offset = align_up(kernel.parameter_bytes, parameter->alignment, "parameter space");
    kernel.parameters.push_back({offset, static_cast<uint32_t>(parameter->bytes), parameter->alignment, parameter->type,
                                 parameter->bytes != static_cast<uint64_t>(type_bytes(parameter->type))});
    kernel.parameter_bytes = align_up(offset + parameter->bytes, 1, "parameter space");
  }
  if (kernel.parameter_bytes > 32764)
    throw PtxError("line " + std::to_string(function.line) + ": parameters take more than 32764 bytes");

  for (const Function* f : reachable) {
    auto code = std::make_unique<Code>();
    code->function = f;
    code->entry = f->entry;
    for (const auto& variable : f->variables) {
      if (variable->space != Space::kLocal && variable->space != Space::kParam) continue;
      if (f->entry && std::find(f->parameters.begin(), f->parameters.end(), variable.get()) != f->parameters.end())
        continue;
      const uint32_t offset = align_up(code->local_bytes, std::max(variable->alignment, 8u), "local memory");
      code->local_offsets[variable.get()] = offset;
      code->local_bytes = align_up(offset + variable->bytes, 16, "local memory");
    }
    kernel.codes[f] = std::move(code);
  }
  uint32_t most_registers = 0;
  for (const Function* f : reachable) {
    Decoder(module, kernel, *kernel.codes[f], shared).run();
    Code& code = *kernel.codes[f];
    code.first_id = kernel.instructions;
    for (InstructionEffects& effects : code.effects) effects.id = kernel.instructions++;
    kernel.ordered_codes.push_back(&code);
    most_registers = std::max(most_registers, static_cast<uint32_t>(f->registers.size()));
    kernel.local_bytes += kernel.codes[f]->local_bytes;
    kernel.recursive |= reachable.size() > 1;
  }
  kernel.entry = kernel.codes[&function].get();
  // What ptxas would allocate is unknown: PTX registers are values, not registers.
  kernel.registers = static_cast<int>(std::clamp(most_registers / 8, 16u, 128u));
  const uint64_t bound =
      function.max_threads[0] ? uint64_t{function.max_threads[0]} * function.max_threads[1] * function.max_threads[2]
      : function.required_threads[0]
          ? uint64_t{function.required_threads[0]} * function.required_threads[1] * function.required_threads[2]
          : 1024;
  kernel.max_threads = static_cast<int>(std::min<uint64_t>(bound, 1024));
  return owned;
}

}  // namespace ptx_emulator
