// A function: parameters, scopes, statements, directives.
#include <charconv>
#include <cmath>
#include <cstring>

#include "parse/parser.h"

namespace ptx_emulator {

void Parser::function(bool external) {
  auto owned = std::make_unique<Function>();
  Function& f = *owned;
  f.entry = is(".entry");
  f.line = token_.line;
  advance();
  scopes_.clear();
  scopes_.emplace_back();
  if (!f.entry && is("(")) parameters(f, f.returns);
  f.name = name();
  if (is("(")) parameters(f, f.parameters);
  for (;;) {
    const auto triple = [&](uint32_t (&out)[3]) {
      out[0] = static_cast<uint32_t>(integer(1u << 30));
      out[1] = out[2] = 1;
      for (int i = 1; i < 3 && accept(","); ++i) out[i] = static_cast<uint32_t>(integer(1u << 30));
    };
    if (accept(".maxntid"))
      triple(f.max_threads);
    else if (accept(".reqntid"))
      triple(f.required_threads);
    else if (accept(".reqnctapercluster"))
      triple(f.cluster);
    else if (accept(".minnctapersm") || accept(".maxnctapersm"))
      f.blocks_per_sm = static_cast<uint32_t>(integer(1u << 10));
    else if (accept(".maxnreg"))
      f.most_registers = static_cast<uint32_t>(integer(1u << 10));
    else if (accept(".maxclusterrank"))
      integer(1u << 10);
    else if (accept(".noreturn") || accept(".explicitcluster") || accept(".blocksareclusters"))
      continue;
    else if (accept(".pragma"))
      skip_to_semicolon();
    else if (accept(".abi_preserve") || accept(".abi_preserve_control"))
      integer(1u << 20);
    else
      break;
  }
  if (accept(";") || external) {
    f.declared_only = true;
    accept(";");
  } else {
    expect("{", true);
    body(f);
  }
  for (auto& known : module_.functions)
    if (known->name == f.name) {
      if (!known->declared_only && !f.declared_only) fail("'" + f.name + "' is defined twice", f.line);
      if (known->declared_only) known = std::move(owned);
      return;
    }
  module_.functions.push_back(std::move(owned));
}

void Parser::parameters(Function& f, std::vector<const Variable*>& out) {
  expect("(");
  while (!accept(")")) {
    if (is(".reg")) fail("register parameters are not supported");
    auto variable = std::make_unique<Variable>();
    space_and_type(*variable);
    declarator(*variable);
    out.push_back(variable.get());
    add_variable(&f, std::move(variable));
    if (!accept(",") && !is(")")) fail("expected ',' or ')' in the parameter list");
  }
}

void Parser::body(Function& f) {
  size_t depth = 1;
  scopes_.emplace_back();
  while (depth > 0) {
    if (token_.kind == Token::Kind::kEnd) fail("unterminated function '" + f.name + "'");
    if (accept("{", true)) {
      if (++depth > 1000) fail("blocks too deeply nested");
      scopes_.emplace_back();
    } else if (is("}")) {
      close_scope(f);
      // After the last brace a module-level token follows.
      advance(--depth > 0);
    } else if (accept(";", true)) {
    } else {
      statement(f);
    }
  }
  scopes_.clear();
}

void Parser::close_scope(Function& f) {
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (auto& use : scope.label_uses) {
    const auto label = scope.labels.find(use.name);
    if (label != scope.labels.end()) {
      if (!use.table.empty())
        f.branch_targets[use.table][use.element] = label->second;
      else
        f.statements[use.statement].operands[use.operand].reg = label->second;
    } else if (scopes_.size() > 1) {
      scopes_.back().label_uses.push_back(std::move(use));
    } else {
      fail("unknown name '" + use.name + "'", use.line);
    }
  }
}

void Parser::statement(Function& f) {
  if (token_.kind == Token::Kind::kDirective) return directive(f);
  Statement s;
  s.line = token_.line;
  s.source_line = source_line_;
  s.source_file = source_file_;
  const size_t start = static_cast<size_t>(token_.text.data() - source_.data());
  if (accept("@")) {
    s.guard_negated = accept("!");
    const std::string guard = name_opcode();
    s.guard = find_register(f, guard);
    if (s.guard < 0) fail("unknown predicate '" + guard + "'", s.line);
    if (f.registers[static_cast<size_t>(s.guard)] != Type::kPred) fail("guard '" + guard + "' is no predicate", s.line);
  }
  if (token_.kind != Token::Kind::kName)
    fail("expected an instruction before '" + std::string(token_.text.substr(0, 60)) + "'");
  const std::string opcode(token_.text);
  advance();
  if (s.guard < 0 && opcode.find('.') == std::string::npos && accept(":", true)) {
    label(f, opcode);
    return;
  }
  size_t from = 0;
  for (bool first = true; from <= opcode.size(); first = false) {
    size_t dot = opcode.find('.', from);
    if (dot == std::string::npos) dot = opcode.size();
    std::string part = opcode.substr(from, dot - from);
    if (first)
      s.opcode = std::move(part);
    else
      s.modifiers.push_back(std::move(part));
    from = dot + 1;
  }
  while (!is(";")) {
    if (token_.kind == Token::Kind::kEnd) fail("unterminated instruction");
    if (s.operands.size() > 300) fail("too many operands");
    Operand pair;
    s.operands.push_back(operand(f, s, s.operands.size(), pair));
    s.pairs.push_back(std::move(pair));
    if (!accept(",") && !is(";")) fail("expected ',' or ';' before '" + std::string(token_.text.substr(0, 60)) + "'");
  }
  s.text = std::string(source_.substr(start, end_ - start));
  if (s.text.size() > 300) s.text = s.text.substr(0, 300) + "...";
  for (char& c : s.text)
    if (c == '\n' || c == '\t' || c == '\r') c = ' ';
  while (!s.text.empty() && s.text.back() == ' ') s.text.pop_back();
  f.statements.push_back(std::move(s));
  advance(true);  // the semicolon
}

void Parser::label(Function& f, const std::string& name) {
  if (is(".branchtargets")) {
    advance();
    std::vector<uint32_t>& table = f.branch_targets[name];
    do {
      scopes_.back().label_uses.push_back({std::string::npos, 0, table.size(), this->name(), name, token_.line});
      table.push_back(0);
    } while (accept(","));
    if (!is(";")) fail("expected ';'");
    advance(true);
    return;
  }
  if (is(".callprototype") || is(".calltargets")) {
    prototypes_.insert_or_assign(name, true);
    while (token_.kind != Token::Kind::kEnd && !is(";")) advance();
    if (!is(";")) fail("expected ';'");
    advance(true);
    return;
  }
  if (!scopes_.back().labels.try_emplace(name, static_cast<uint32_t>(f.statements.size())).second)
    fail("label '" + name + "' is defined twice");
}

void Parser::directive(Function& f) {
  if (accept(".reg")) {
    if (token_.kind != Token::Kind::kDirective) fail("expected a type");
    int vector = 1;
    if (accept(".v2"))
      vector = 2;
    else if (accept(".v4"))
      vector = 4;
    if (vector != 1) fail("vector registers are not supported");
    const Type type = type_from_name(token_.text.substr(1));
    if (type == Type::kNone || (type_bits(type) < 8 && type != Type::kPred))
      fail("unknown register type '" + std::string(token_.text) + "'");
    advance();
    do {
      const std::string reg = name();
      uint32_t count = 1;
      const uint32_t first = static_cast<uint32_t>(f.registers.size());
      if (accept("<")) {
        count = static_cast<uint32_t>(integer(1u << 20));
        expect(">");
        scopes_.back().ranges[reg] = {first, count};
      } else {
        scopes_.back().registers[reg] = first;
      }
      if (f.registers.size() + count > (1u << 21)) fail("too many registers");
      f.registers.insert(f.registers.end(), count, type);
      for (uint32_t i = 0; i < count; ++i)
        f.register_names.push_back(count == 1 && !scopes_.back().ranges.contains(reg) ? reg : reg + std::to_string(i));
    } while (accept(","));
    if (!is(";")) fail("expected ';'");
    advance(true);
  } else if (is(".local") || is(".shared") || is(".param") || is(".const") || is(".global") || is(".extern")) {
    const bool external = accept(".extern");
    const bool lasting = is(".global") || is(".const");  // function-scope statics live as long as the module
    declare_variables(external, [&](std::unique_ptr<Variable> variable) {
      if (!lasting) return add_variable(&f, std::move(variable));
      if (accept("=")) initializer(*variable);
      scopes_.back().variables[variable->name] = variable.get();
      module_.variables.push_back(std::move(variable));
    });
    if (!is(";")) fail("expected ';'");
    advance(true);
  } else if (accept(".loc")) {
    source_file_ = static_cast<int>(integer(1u << 30));
    source_line_ = static_cast<int>(integer(1u << 30));
    integer(1u << 30);
    // `, function_name label, inlined_at file line column`
    while (accept(",")) {
      name();
      if (token_.kind == Token::Kind::kName) name();
      if (accept("+")) integer(~uint64_t{0});
      while (token_.kind == Token::Kind::kInteger) advance(true);
    }
    // The token after .loc was read without its modifiers: read it again as an opcode.
    reread_opcode();
  } else if (accept(".pragma")) {
    while (token_.kind != Token::Kind::kEnd && !is(";")) advance();
    if (!is(";")) fail("expected ';'");
    advance(true);
  } else {
    fail("unknown directive '" + std::string(token_.text.substr(0, 60)) + "'");
  }
}

}  // namespace ptx_emulator
