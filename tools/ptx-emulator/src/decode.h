// From statements to instructions: what the semantics files (instructions/*) see of a statement, and how they say which
// handler runs it.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "ptx.h"

namespace ptx_emulator {

// The modifiers of one statement: each must be taken by the instruction's decoder, or the statement is an error.
class Modifiers {
 public:
  explicit Modifiers(const Statement& statement) : statement_(statement), taken_(statement.modifiers.size()) {}

  bool take(std::string_view name);
  // The first of `names` that is there, as its index; -1 for none.
  int take_one(std::initializer_list<std::string_view> names);
  // The next untaken modifier that is a type; kNone for none.
  Type take_type();
  // Cache hints, which change no result: .L1::evict_last, .L2::128B, .level::..., .ca, .nc and so on.
  void take_cache_hints();
  Space take_space();  // .global, .shared::cta, ...; kGeneric for none
  const std::string* untaken() const;
  std::string take_next();  // the first untaken modifier, empty for none

 private:
  const Statement& statement_;
  std::vector<bool> taken_;
};

class Decoder {
 public:
  Decoder(Module& module, Kernel& kernel, Code& code, const std::unordered_map<const Variable*, uint32_t>& shared);

  void run();

  // The statement at hand.
  const Statement& statement() const { return *statement_; }
  Modifiers& modifiers() { return *modifiers_; }
  [[noreturn]] void fail(const std::string& message) const;
  size_t operand_count() const { return statement_->operands.size(); }
  const Operand& operand(size_t index) const;
  void expect_operands(size_t at_least, size_t at_most) const;
  Type require_type();
  Type register_type(const Operand& operand) const;  // kNone if it is no register

  // Slots of operands. `width` is the lane's bytes that the handler will touch; 0 for predicates.
  uint32_t destination(const Operand& operand, int width);
  uint32_t source(const Operand& operand,
                  Type type);  // a register of the type's width, or an immediate converted to the type
  uint32_t destination(size_t index, Type type) { return destination(operand(index), type_width(type)); }
  uint32_t source(size_t index, Type type) { return source(operand(index), type); }
  uint32_t predicate(const Operand& operand);  // source predicate, negation resolved
  uint32_t constant(uint64_t bits, int width);
  uint32_t special(Special special, int width);
  uint32_t temporary(int width);
  int slot_width(const Operand& operand) const;  // lane bytes of a register operand; 0 predicate; -1 no register
  static int type_width(Type type) { return type == Type::kPred ? 0 : type_bytes(type); }

  struct Address {
    Space space;
    uint32_t base;  // slot of 64-bit (or 32-bit) lane addresses
    bool narrow;    // base is a 32-bit register
    int64_t offset;
    bool kernel_parameter;
  };
  Address address(const Operand& operand, Space space);

  const Variable* variable_of(const Operand& operand) const;
  uint64_t variable_address(const Variable& variable, Space& space);  // in its own space

  // Appends an instruction that stands for (a step of) the statement.
  Instruction& emit(Handler handler, std::initializer_list<uint32_t> slots, int64_t immediate = 0);
  // `hidden` leading slots are the handler's own, at negative indices.
  Instruction& emit(Handler handler, const std::vector<uint32_t>& slots, int64_t immediate = 0, size_t hidden = 0);

  Code& code() { return code_; }
  Kernel& kernel() { return kernel_; }
  const std::string& module_target() const;
  Module& module() { return module_; }
  const Function& function() const { return *code_.function; }

 private:
  void decode_statement();
  Address find_address(const Operand& operand, Space space);
  void describe_effects();  // effects.cpp
  bool describe_asynchronous(InstructionEffects& effects);
  void find_reconvergence();

  Module& module_;
  Kernel& kernel_;
  Code& code_;
  const std::unordered_map<const Variable*, uint32_t>& shared_;
  const Statement* statement_ = nullptr;
  uint32_t statement_index_ = 0;
  Modifiers* modifiers_ = nullptr;
  bool first_of_statement_ = true;
  uint32_t allocate(int width);

  uint32_t predicate_next_ = 0, predicate_end_ = 0;
  std::vector<uint32_t> register_slots_;
  std::unordered_map<uint64_t, uint32_t> constants_[17];
  std::unordered_map<uint32_t, uint32_t> specials_;
  std::vector<Address> addresses_;   // of the statement
  std::vector<size_t> slot_starts_;  // of each instruction in Code::slots, until that stops growing
};

using StatementDecoder = void (*)(Decoder&);
using InstructionTable = std::unordered_map<std::string_view, StatementDecoder>;

// The semantics, compiled once per instruction set of the host; this is the best that it has.
const InstructionTable& instruction_table();

std::unique_ptr<Kernel> decode_kernel(Module& module, const Function& function);

}  // namespace ptx_emulator
