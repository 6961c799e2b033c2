// Operands to slots: registers, constants, special registers, predicates, and the addresses of memory.
#include "decode.h"
#include "module.h"

namespace ptx_emulator {

namespace {
const std::unordered_map<std::string_view, Special>& special_names() {
  static const std::unordered_map<std::string_view, Special> names = {
      {"%tid.x", Special::kTidX},
      {"%tid.y", Special::kTidY},
      {"%tid.z", Special::kTidZ},
      {"%ntid.x", Special::kNtidX},
      {"%ntid.y", Special::kNtidY},
      {"%ntid.z", Special::kNtidZ},
      {"%ctaid.x", Special::kCtaidX},
      {"%ctaid.y", Special::kCtaidY},
      {"%ctaid.z", Special::kCtaidZ},
      {"%nctaid.x", Special::kNctaidX},
      {"%nctaid.y", Special::kNctaidY},
      {"%nctaid.z", Special::kNctaidZ},
      {"%laneid", Special::kLaneId},
      {"%warpid", Special::kWarpId},
      {"%nwarpid", Special::kNwarpId},
      {"%smid", Special::kSmId},
      {"%nsmid", Special::kNsmId},
      {"%gridid", Special::kGridId},
      {"%lanemask_eq", Special::kLanemaskEq},
      {"%lanemask_le", Special::kLanemaskLe},
      {"%lanemask_lt", Special::kLanemaskLt},
      {"%lanemask_ge", Special::kLanemaskGe},
      {"%lanemask_gt", Special::kLanemaskGt},
      {"%dynamic_smem_size", Special::kDynamicShared},
      {"%total_smem_size", Special::kTotalShared},
      // A launch without clusters has clusters of one block.
      {"%clusterid.x", Special::kCtaidX},
      {"%clusterid.y", Special::kCtaidY},
      {"%clusterid.z", Special::kCtaidZ},
      {"%nclusterid.x", Special::kNctaidX},
      {"%nclusterid.y", Special::kNctaidY},
      {"%nclusterid.z", Special::kNctaidZ},
      {"%cluster_ctaid.x", Special::kZero},
      {"%cluster_ctaid.y", Special::kZero},
      {"%cluster_ctaid.z", Special::kZero},
      {"%cluster_nctaid.x", Special::kOne},
      {"%cluster_nctaid.y", Special::kOne},
      {"%cluster_nctaid.z", Special::kOne},
      {"%cluster_ctarank", Special::kZero},
      {"%cluster_nctarank", Special::kOne},
  };
  return names;
}
}  // namespace

uint32_t Decoder::source(const Operand& operand, Type type) {
  const int width = type_width(type);
  if (width == 0) return predicate(operand);
  if (operand.negated) fail("only predicates can be negated");
  switch (operand.kind) {
    case Operand::Kind::kRegister: {
      const int actual = slot_width(operand);
      if (actual != width)
        fail("operand '" + function().register_names[operand.reg] + "' has the wrong width for ." + type_name(type));
      return register_slots_[operand.reg];
    }
    case Operand::Kind::kInteger: {
      if (type == Type::kF32)
        return constant(std::bit_cast<uint32_t>(static_cast<float>(static_cast<int64_t>(operand.bits))), 4);
      if (type == Type::kF64)
        return constant(std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(operand.bits))), 8);
      return constant(operand.bits, width);
    }
    case Operand::Kind::kFloat: {
      const bool single = operand.offset == 4;
      if (width == 4 && single) return constant(operand.bits, 4);
      if (width == 8 && !single) return constant(operand.bits, 8);
      if (width == 4)
        return constant(std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(operand.bits))), 4);
      if (width == 8)
        return constant(
            std::bit_cast<uint64_t>(static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(operand.bits)))), 8);
      fail("a floating-point constant does not fit ." + std::string(type_name(type)));
    }
    case Operand::Kind::kSpecial: {
      const auto at = special_names().find(operand.name);
      if (at != special_names().end()) {
        if (width != 4 && !(width == 8 && at->second == Special::kGridId))
          fail("'" + operand.name + "' is a 32-bit value");
        return special(at->second, width);
      }
      if (operand.name.starts_with("%reserved_smem_offset_") && width == 4) {
        kernel_.reserved_shared = true;
        const bool end = operand.name.ends_with("end") || operand.name.ends_with("cap");
        return special(end ? Special::kReservedEnd : Special::kReservedBegin, 4);
      }
      // cooperative_groups finds the grid's barrier through these two.
      if (operand.name == "%envreg1" && width == 4) return special(Special::kWorkspaceHigh, 4);
      if (operand.name == "%envreg2" && width == 4) return special(Special::kWorkspaceLow, 4);
      if (operand.name.starts_with("%envreg")) return constant(0, width);
      if (operand.name == "%is_explicit_cluster") return constant(0, 0);
      fail("unknown special register '" + operand.name + "'");
    }
    case Operand::Kind::kVariable: {
      const Variable& variable = *operand.variable;
      const bool in_frame = code_.local_offsets.contains(&variable);
      if (in_frame || variable.space == Space::kParam)
        fail("the address of '" + variable.name + "' is known to mov only");
      Space space = Space::kGeneric;
      return constant(variable_address(variable, space) + static_cast<uint64_t>(operand.offset), width);
    }
    case Operand::Kind::kFunction: {
      const Function* target = module_.ptx.find(operand.name);
      if (!target || width != 8) fail("unknown function '" + operand.name + "'");
      return constant(reinterpret_cast<uint64_t>(target), 8);
    }
    default:
      fail("unexpected operand");
  }
}

uint32_t Decoder::predicate(const Operand& operand) {
  if (operand.kind == Operand::Kind::kInteger)
    return constant((operand.bits != 0) != operand.negated ? kAllLanes : 0, 0);
  if (operand.kind == Operand::Kind::kSpecial && operand.name == "%is_explicit_cluster") return constant(0, 0);
  if (operand.kind != Operand::Kind::kRegister || register_type(operand) != Type::kPred) fail("expected a predicate");
  const uint32_t slot = register_slots_[operand.reg];
  if (!operand.negated) return slot;
  const uint32_t inverted = temporary(0);
  emit([](Warp& w, const Instruction& i) { w.predicate(i.slots[0]) = ~w.predicate(i.slots[1]); }, {inverted, slot});
  return inverted;
}

const Variable* Decoder::variable_of(const Operand& operand) const {
  const Operand& base = operand.kind == Operand::Kind::kAddress ? operand.elements[0] : operand;
  return base.kind == Operand::Kind::kVariable ? base.variable : nullptr;
}

uint64_t Decoder::variable_address(const Variable& variable, Space& space) {
  space = variable.space;
  if (variable.space == Space::kShared) {
    const auto at = shared_.find(&variable);
    if (at == shared_.end()) fail("'" + variable.name + "' has no place in shared memory");
    return at->second;
  }
  const auto at = module_.addresses.find(&variable);
  if (at == module_.addresses.end()) fail("'" + variable.name + "' has no address");
  return reinterpret_cast<uint64_t>(at->second);
}

Decoder::Address Decoder::address(const Operand& operand, Space space) {
  addresses_.push_back(find_address(operand, space));
  return addresses_.back();
}

Decoder::Address Decoder::find_address(const Operand& operand, Space space) {
  if (operand.kind != Operand::Kind::kAddress || operand.elements.size() != 1) fail("expected an address in brackets");
  const Operand& base = operand.elements[0];
  Address result{space, 0, false, operand.offset, false};
  switch (base.kind) {
    case Operand::Kind::kRegister: {
      const int width = slot_width(base);
      if (width != 4 && width != 8) fail("an address must be a 32- or 64-bit register");
      result.narrow = width == 4;
      result.base = register_slots_[base.reg];
      if (space == Space::kParam) result.space = code_.entry ? Space::kGlobal : Space::kLocal;
      return result;
    }
    case Operand::Kind::kInteger:
      result.base = constant(base.bits, 8);
      if (space == Space::kParam) fail("a constant address in parameter space");
      return result;
    case Operand::Kind::kVariable: {
      const Variable& variable = *base.variable;
      if (const auto at = code_.local_offsets.find(&variable); at != code_.local_offsets.end()) {
        if (space != Space::kParam && space != Space::kLocal && space != Space::kGeneric)
          fail("'" + variable.name + "' is not in that state space");
        result.space = Space::kLocal;
        result.base = special(Special::kLocalBase, 8);
        result.offset += at->second;
        return result;
      }
      if (variable.space == Space::kParam) {
        if (space != Space::kParam && space != Space::kGeneric)
          fail("'" + variable.name + "' is not in that state space");
        for (size_t i = 0; i < kernel_.parameters.size(); ++i)
          if (function().parameters[i] == &variable) result.offset += kernel_.parameters[i].offset;
        result.space = Space::kGlobal;
        result.base = special(Special::kParameterBase, 8);
        result.kernel_parameter = true;
        return result;
      }
      Space actual;
      const uint64_t at = variable_address(variable, actual);
      if (space != Space::kGeneric && space != actual) fail("'" + variable.name + "' is not in that state space");
      result.space = actual;
      result.base = constant(at, 8);
      return result;
    }
    default:
      fail("malformed address");
  }
}
}  // namespace ptx_emulator
