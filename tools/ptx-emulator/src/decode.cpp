// Statements to instructions: slots for registers and constants, addresses.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "module.h"

namespace ptx_emulator {

bool Modifiers::take(std::string_view name) {
  for (size_t i = 0; i < taken_.size(); ++i)
    if (!taken_[i] && statement_.modifiers[i] == name) return taken_[i] = true;
  return false;
}

int Modifiers::take_one(std::initializer_list<std::string_view> names) {
  int index = 0;
  for (const std::string_view name : names) {
    if (take(name)) return index;
    ++index;
  }
  return -1;
}

Type Modifiers::take_type() {
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (taken_[i]) continue;
    const Type type = type_from_name(statement_.modifiers[i]);
    if (type == Type::kNone) continue;
    taken_[i] = true;
    return type;
  }
  return Type::kNone;
}

void Modifiers::take_cache_hints() {
  for (size_t i = 0; i < taken_.size(); ++i) {
    const std::string_view name = statement_.modifiers[i];
    for (const std::string_view hint : {"ca",
                                        "cg",
                                        "cs",
                                        "cv",
                                        "lu",
                                        "wb",
                                        "wt",
                                        "nc",
                                        "L1::evict_last",
                                        "L1::evict_normal",
                                        "L1::evict_first",
                                        "L1::evict_unchanged",
                                        "L1::no_allocate",
                                        "L2::evict_last",
                                        "L2::evict_normal",
                                        "L2::evict_first",
                                        "L2::cache_hint",
                                        "L2::64B",
                                        "L2::128B",
                                        "L2::256B"})
      if (name == hint) taken_[i] = true;
  }
}

Space Modifiers::take_space() {
  static constexpr std::pair<std::string_view, Space> kSpaces[] = {
      {"global", Space::kGlobal},      {"shared", Space::kShared},    {"shared::cta", Space::kShared},
      {"local", Space::kLocal},        {"const", Space::kConst},      {"param", Space::kParam},
      {"param::entry", Space::kParam}, {"param::func", Space::kParam}};
  for (const auto& [name, space] : kSpaces)
    if (take(name)) return space;
  return Space::kGeneric;
}

const std::string* Modifiers::untaken() const {
  for (size_t i = 0; i < taken_.size(); ++i)
    if (!taken_[i]) return &statement_.modifiers[i];
  return nullptr;
}

std::string Modifiers::take_next() {
  for (size_t i = 0; i < taken_.size(); ++i)
    if (!taken_[i]) return taken_[i] = true, statement_.modifiers[i];
  return {};
}

std::string describe(const Code& code, const Instruction& instruction) {
  const Statement& s = code.function->statements[instruction.statement];
  return "line " + std::to_string(s.line) + ": " + s.text;
}

Decoder::Decoder(Module& module, Kernel& kernel, Code& code,
                 const std::unordered_map<const Variable*, uint32_t>& shared)
    : module_(module), kernel_(kernel), code_(code), shared_(shared) {}

void Decoder::fail(const std::string& message) const {
  throw PtxError("line " + std::to_string(statement_ ? statement_->line : function().line) + ": " + message +
                 (statement_ ? ": " + statement_->text : ""));
}

const Operand& Decoder::operand(size_t index) const {
  if (index >= statement_->operands.size()) fail("too few operands");
  return statement_->operands[index];
}

void Decoder::expect_operands(size_t at_least, size_t at_most) const {
  if (operand_count() < at_least) fail("too few operands");
  if (operand_count() > at_most) fail("too many operands");
}

Type Decoder::require_type() {
  const Type type = modifiers_->take_type();
  if (type == Type::kNone) fail("a type is missing or unknown");
  return type;
}

Type Decoder::register_type(const Operand& operand) const {
  return operand.kind == Operand::Kind::kRegister ? function().registers[operand.reg] : Type::kNone;
}

const std::string& Decoder::module_target() const { return module_.ptx.target; }

int Decoder::slot_width(const Operand& operand) const {
  const Type type = register_type(operand);
  return type == Type::kNone ? -1 : type_width(type);
}

// Registers of 32 lanes lie on 64-byte boundaries, predicates are packed words.
uint32_t Decoder::allocate(int width) {
  if (width == 0) {
    if (predicate_next_ == predicate_end_) {
      predicate_next_ = code_.frame_bytes;
      predicate_end_ = code_.frame_bytes += 64;
    }
    predicate_next_ += 4;
    return predicate_next_ - 4;
  }
  const uint32_t slot = code_.frame_bytes;
  code_.frame_bytes += static_cast<uint32_t>((width * kLanes + 63) / 64 * 64);
  return slot;
}

uint32_t Decoder::temporary(int width) { return allocate(width); }

uint32_t Decoder::destination(const Operand& operand, int width) {
  if (operand.kind == Operand::Kind::kSink) return temporary(width);
  if (operand.kind != Operand::Kind::kRegister) fail("a destination must be a register");
  if (operand.negated) fail("a destination cannot be negated");
  if (slot_width(operand) != width)
    fail("destination '" + function().register_names[operand.reg] + "' has the wrong width");
  return register_slots_[operand.reg];
}

uint32_t Decoder::constant(uint64_t bits, int width) {
  if (width > 0 && width < 8) bits &= (uint64_t{1} << (8 * width)) - 1;
  const auto [at, inserted] = constants_[width].try_emplace(bits, 0);
  if (inserted) {
    at->second = allocate(width);
    code_.constants.push_back({at->second, bits, static_cast<uint8_t>(width)});
  }
  return at->second;
}

uint32_t Decoder::special(Special special, int width) {
  const auto [at, inserted] =
      specials_.try_emplace(static_cast<uint32_t>(special) * 16 + static_cast<uint32_t>(width), 0);
  if (inserted) {
    at->second = allocate(width);
    code_.presets.push_back({at->second, special, static_cast<uint8_t>(width)});
  }
  return at->second;
}

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

Instruction& Decoder::emit(Handler handler, std::initializer_list<uint32_t> slots, int64_t immediate) {
  return emit(handler, std::vector<uint32_t>(slots), immediate);
}

Instruction& Decoder::emit(Handler handler, const std::vector<uint32_t>& slots, int64_t immediate, size_t hidden) {
  slot_starts_.push_back(code_.slots.size() + hidden);
  code_.slots.insert(code_.slots.end(), slots.begin(), slots.end());
  Instruction instruction;
  instruction.run = handler;
  instruction.immediate = immediate;
  instruction.statement = statement_index_;
  instruction.pseudo = !first_of_statement_;
  first_of_statement_ = false;
  instruction.guard =
      statement_->guard < 0 ? constant(kAllLanes, 0) : register_slots_[static_cast<size_t>(statement_->guard)];
  instruction.guard_flip = statement_->guard_negated ? kAllLanes : 0;
  code_.instructions.push_back(instruction);
  return code_.instructions.back();
}

void Decoder::run() {
  const Function& f = function();
  for (const Type type : f.registers) {
    if (type_bits(type) > 64) fail("128-bit registers are not supported");
    register_slots_.push_back(allocate(type_width(type)));
  }
  std::vector<uint32_t> starts;
  for (size_t i = 0; i < f.statements.size(); ++i) {
    statement_ = &f.statements[i];
    statement_index_ = static_cast<uint32_t>(i);
    starts.push_back(static_cast<uint32_t>(code_.instructions.size()));
    decode_statement();
  }
  starts.push_back(static_cast<uint32_t>(code_.instructions.size()));
  for (size_t i = 0; i < code_.instructions.size(); ++i) {
    Instruction& instruction = code_.instructions[i];
    instruction.slots = code_.slots.data() + slot_starts_[i];
    if (instruction.kind == Kind::kBranch) instruction.target = starts[instruction.target];
  }
  for (auto& table : code_.tables)
    for (uint32_t& target : table) target = starts[target];
  find_reconvergence();
  code_.effects.resize(code_.instructions.size());
  for (size_t r = 0; r < f.registers.size(); ++r)
    code_.registers.push_back({register_slots_[r], static_cast<uint8_t>(type_width(f.registers[r]))});
}

void Decoder::decode_statement() {
  const InstructionTable& table = instruction_table();
  // Names that integer and floating-point instructions share are told apart by the last type.
  bool floating = false;
  for (const std::string& modifier : statement_->modifiers) {
    const Type type = type_from_name(modifier);
    if (type != Type::kNone) floating = is_float(type) || type == Type::kF16x2 || type == Type::kBf16x2;
  }
  auto decoder = floating ? table.find(statement_->opcode + ".f") : table.end();
  if (decoder == table.end()) decoder = table.find(statement_->opcode);
  first_of_statement_ = true;
  addresses_.clear();
  const size_t before = code_.instructions.size();
  if (decoder == table.end()) fail("unknown instruction '" + statement_->opcode + "'");
  for (const Operand& pair : statement_->pairs)
    if (pair.kind != Operand::Kind::kSink && statement_->opcode != "setp" && statement_->opcode != "shfl" &&
        statement_->opcode != "match" && statement_->opcode != "elect")
      fail("unexpected '|'");
  Modifiers modifiers(*statement_);
  modifiers_ = &modifiers;
  decoder->second(*this);
  if (const std::string* extra = modifiers.untaken()) fail("unknown modifier '." + *extra + "'");
  modifiers_ = nullptr;
  if (code_.instructions.size() > before) describe_effects();
}

}  // namespace ptx_emulator
