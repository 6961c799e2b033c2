// Statements to instructions, and the slots of registers and constants.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "module.h"

namespace ptx_emulator {

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
