// A recursive-descent parser. Registers, variables and labels are resolved here, in their scopes.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "parse/lexer.h"
#include "ptx.h"

namespace ptx_emulator {

struct RegisterRange {
  uint32_t first, count;
};

struct Scope {
  std::unordered_map<std::string, uint32_t> registers;
  std::unordered_map<std::string, RegisterRange> ranges;
  std::unordered_map<std::string, const Variable*> variables;
  std::unordered_map<std::string, uint32_t> labels;
  struct Use {
    size_t statement, operand, element;  // element: into a .branchtargets table where statement is npos
    std::string name, table;
    int line;
  };
  std::vector<Use> label_uses;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : lexer_(text), source_(text) {}

  PtxModule run() {
    advance();
    while (token_.kind != Token::Kind::kEnd) module_item();
    return std::move(module_);
  }

 private:
  [[noreturn]] void fail(const std::string& message, int line = 0) const {
    throw PtxError("line " + std::to_string(line ? line : token_.line) + ": " + message);
  }
  void advance(bool opcode = false) {
    end_ = lexer_.position();
    token_ = lexer_.next(opcode);
  }
  bool is(std::string_view text) const { return token_.kind != Token::Kind::kString && token_.text == text; }
  bool accept(std::string_view text, bool opcode = false) {
    if (!is(text)) return false;
    advance(opcode);
    return true;
  }
  void expect(std::string_view text, bool opcode = false) {
    if (!accept(text, opcode))
      fail("expected '" + std::string(text) + "' before '" + std::string(token_.text.substr(0, 60)) + "'");
  }
  std::string name() {
    if (token_.kind != Token::Kind::kName)
      fail("expected a name before '" + std::string(token_.text.substr(0, 60)) + "'");
    std::string result(token_.text);
    advance();
    return result;
  }
  uint64_t integer(uint64_t limit) {
    if (token_.kind != Token::Kind::kInteger)
      fail("expected a number before '" + std::string(token_.text.substr(0, 60)) + "'");
    const uint64_t value = token_.bits;
    if (value > limit) fail("number out of range: " + std::string(token_.text));
    advance();
    return value;
  }
  void skip_to_semicolon() {
    while (token_.kind != Token::Kind::kEnd && !is(";")) advance();
    accept(";");
  }

  void module_item();

  void skip_braces();

  void linkage_item();

  // `.space [.align n] [.vN] .type name[dims] [= init], ...` The token is the space directive. `place` takes each
  // variable after its declarator, and parses the initial value.
  template <class Place>
  void declare_variables(bool external, Place place) {
    Variable head;
    head.external = external;
    space_and_type(head);
    do {
      auto variable = std::make_unique<Variable>(head);
      declarator(*variable);
      place(std::move(variable));
    } while (accept(","));
  }

  void add_variable(Function* function, std::unique_ptr<Variable> variable);

  void space_and_type(Variable& variable);

  void declarator(Variable& variable);

  void put_initial(Variable& variable, uint64_t bits, int bytes) {
    if (!open_dimension_ && variable.initial.size() + static_cast<size_t>(bytes) > variable.bytes)
      fail("too many initial values for '" + variable.name + "'");
    for (int i = 0; i < bytes; ++i) variable.initial.push_back(static_cast<uint8_t>(bits >> (8 * i)));
  }

  void initializer(Variable& variable);

  void initial_value(Variable& variable, int bytes);

  double float_value();

  uint64_t float_bits(double value, Type type) const;

  void function(bool external);

  void parameters(Function& f, std::vector<const Variable*>& out);

  // Statements up to the closing brace of the function. Opcode tokens are read with their modifiers.
  void body(Function& f);

  void close_scope(Function& f);

  void statement(Function& f);

  std::string name_opcode() {
    // A guard's name, followed by an opcode.
    if (token_.kind != Token::Kind::kName) fail("expected a predicate");
    std::string result(token_.text);
    advance(true);
    return result;
  }

  void label(Function& f, const std::string& name);

  void directive(Function& f);

  void reread_opcode();

  int find_register(const Function&, const std::string& name) const;

  const Variable* find_variable(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto at = scope->variables.find(name); at != scope->variables.end()) return at->second;
    const auto global = globals_.find(name);
    return global == globals_.end() ? nullptr : global->second;
  }

  Operand operand(Function& f, Statement& s, size_t position, Operand& pair);

  Operand simple(Function& f, Statement& s, size_t position);

  Lexer lexer_;
  std::string_view source_;
  Token token_;
  size_t end_ = 0;
  bool open_dimension_ = false;
  int nesting_ = 0;
  PtxModule module_;
  std::unordered_map<std::string, const Variable*> globals_;
  std::unordered_map<std::string, bool> prototypes_;
  std::vector<Scope> scopes_;
  int source_line_ = 0, source_file_ = 0;
};

}  // namespace ptx_emulator
