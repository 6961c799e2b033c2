// A module: its variables, with their initialisers, and linkage.
#include <charconv>
#include <cmath>
#include <cstring>

#include "parse/parser.h"

namespace ptx_emulator {

void Parser::module_item() {
  if (accept(".version")) {
    // 9.0 lexes as a floating-point number
    if (token_.kind == Token::Kind::kFloat) {
      const size_t dot = token_.text.find('.');
      std::from_chars(token_.text.data(), token_.text.data() + dot, module_.version_major);
      std::from_chars(token_.text.data() + dot + 1, token_.text.data() + token_.text.size(), module_.version_minor);
      advance();
    } else {
      module_.version_major = static_cast<int>(integer(99));
    }
  } else if (accept(".target")) {
    module_.target = name();
    if (module_.target.starts_with("sm_"))
      std::from_chars(module_.target.data() + 3, module_.target.data() + module_.target.size(), module_.target_sm);
    while (accept(",")) name();
  } else if (accept(".address_size")) {
    if (integer(64) != 64) fail("only .address_size 64 is supported");
  } else if (accept(".file")) {
    const int index = static_cast<int>(integer(1u << 30));
    module_.files[index] = std::string(token_.text);
    advance();
    while (accept(",")) advance();
  } else if (is(".section")) {
    while (token_.kind != Token::Kind::kEnd && !is("{")) advance();
    skip_braces();
  } else if (accept(".pragma")) {
    skip_to_semicolon();
  } else if (accept(".alias")) {
    fail(".alias is not supported");
  } else if (accept(";")) {
  } else if (is("@@") || is("@")) {
    fail("unexpected '@' outside a function");
  } else {
    linkage_item();
  }
}

void Parser::skip_braces() {
  int depth = 0;
  do {
    if (token_.kind == Token::Kind::kEnd) fail("unterminated '{'");
    if (is("{")) ++depth;
    if (is("}")) --depth;
    advance();
  } while (depth > 0);
}

void Parser::linkage_item() {
  bool external = false;
  for (;;) {
    if (accept(".extern"))
      external = true;
    else if (!accept(".visible") && !accept(".weak") && !accept(".common"))
      break;
  }
  if (is(".entry") || is(".func")) return function(external);
  if (is(".global") || is(".const") || is(".shared")) {
    declare_variables(external, [&](std::unique_ptr<Variable> variable) {
      if (accept("=")) initializer(*variable);
      add_variable(nullptr, std::move(variable));
    });
    expect(";");
    return;
  }
  fail("unknown directive '" + std::string(token_.text.substr(0, 60)) + "'");
}

void Parser::add_variable(Function* function, std::unique_ptr<Variable> variable) {
  const Variable* raw = variable.get();
  if (function) {
    scopes_.back().variables[variable->name] = raw;
    function->variables.push_back(std::move(variable));
  } else {
    auto [at, inserted] = globals_.try_emplace(variable->name, raw);
    if (!inserted) {
      if (!at->second->external && !variable->external) fail("'" + variable->name + "' is declared twice");
      if (at->second->external) at->second = raw;
      // A declaration first and its definition later: names seen so far point to the declaration, so it becomes the
      // definition.
      for (auto& known : module_.variables)
        if (known->name == variable->name && known->external && !variable->external) {
          *known = *variable;
          at->second = known.get();
          return;
        }
    }
    module_.variables.push_back(std::move(variable));
  }
}

void Parser::space_and_type(Variable& variable) {
  static const std::unordered_map<std::string_view, Space> spaces = {
      {".global", Space::kGlobal}, {".const", Space::kConst}, {".shared", Space::kShared},
      {".local", Space::kLocal},   {".param", Space::kParam}, {".shared::cta", Space::kShared}};
  const auto space = spaces.find(token_.text);
  if (space == spaces.end()) fail("expected a state space before '" + std::string(token_.text.substr(0, 60)) + "'");
  variable.space = space->second;
  advance();
  int vector = 1;
  variable.alignment = 0;
  for (;;) {
    if (accept(".align")) {
      variable.alignment = static_cast<uint32_t>(integer(1u << 20));
      if (variable.alignment == 0 || (variable.alignment & (variable.alignment - 1)))
        fail("alignment is no power of two");
    } else if (accept(".v2")) {
      vector = 2;
    } else if (accept(".v4")) {
      vector = 4;
    } else if (accept(".ptr")) {
      while (is(".global") || is(".shared") || is(".const") || is(".local")) advance();
    } else if (accept(".attribute")) {
      expect("(");
      while (!is(")") && token_.kind != Token::Kind::kEnd) advance();
      expect(")");
    } else if (token_.kind == Token::Kind::kDirective) {
      variable.type = type_from_name(token_.text.substr(1));
      if (variable.type == Type::kNone || variable.type == Type::kPred || type_bits(variable.type) < 8)
        fail("unknown type '" + std::string(token_.text) + "'");
      advance();
      if (accept(".ptr")) {
        while (is(".global") || is(".shared") || is(".const") || is(".local")) advance();
        if (accept(".align")) integer(1u << 20);
      }
      break;
    } else {
      fail("expected a type before '" + std::string(token_.text.substr(0, 60)) + "'");
    }
  }
  variable.bytes = static_cast<uint64_t>(type_bytes(variable.type) * vector);
  if (variable.alignment == 0) variable.alignment = static_cast<uint32_t>(variable.bytes);
}

void Parser::declarator(Variable& variable) {
  variable.name = name();
  open_dimension_ = false;
  while (accept("[")) {
    if (accept("]")) {
      open_dimension_ = true;
      continue;
    }
    const uint64_t count = integer(uint64_t{1} << 40);
    if (variable.bytes != 0 && count > (uint64_t{1} << 40) / variable.bytes)
      fail("'" + variable.name + "' is too large");
    variable.bytes *= count;
    expect("]");
  }
  if (open_dimension_) variable.bytes = 0;
}

void Parser::initializer(Variable& variable) {
  const int bytes = type_bytes(variable.type);
  int depth = 0;
  do {
    while (accept("{")) {
      if (++depth > 64) fail("initialiser too deeply nested");
    }
    if (!is("}")) initial_value(variable, bytes);
    while (depth > 0 && accept("}")) --depth;
    if (depth == 0) break;
    expect(",");
  } while (true);
  if (open_dimension_) variable.bytes = variable.initial.size();
  variable.initial.resize(variable.bytes);
}

void Parser::initial_value(Variable& variable, int bytes) {
  const bool negative = accept("-");
  if (token_.kind == Token::Kind::kInteger) {
    const uint64_t value = negative ? 0 - token_.bits : token_.bits;
    advance();
    // `0xff(symbol)` takes one byte of an address
    if (is("(")) fail("masked addresses in initialisers are not supported");
    if (is_float(variable.type))
      return put_initial(variable, float_bits(static_cast<double>(static_cast<int64_t>(value)), variable.type), bytes);
    return put_initial(variable, value, bytes);
  }
  if (token_.kind == Token::Kind::kFloat) {
    double value = float_value();
    if (negative) value = -value;
    return put_initial(variable, float_bits(value, variable.type), bytes);
  }
  std::string symbol = name();
  if (symbol == "generic") {
    expect("(");
    symbol = name();
    expect(")");
  }
  int64_t addend = 0;
  if (accept("+"))
    addend = static_cast<int64_t>(integer(uint64_t{1} << 62));
  else if (accept("-"))
    addend = -static_cast<int64_t>(integer(uint64_t{1} << 62));
  variable.relocations.push_back({variable.initial.size(), symbol, addend, bytes});
  put_initial(variable, 0, bytes);
}

double Parser::float_value() {
  double value;
  if (token_.single) {
    const uint32_t bits = static_cast<uint32_t>(token_.bits);
    float narrow;
    std::memcpy(&narrow, &bits, 4);
    value = narrow;
  } else {
    std::memcpy(&value, &token_.bits, 8);
  }
  advance();
  return value;
}

uint64_t Parser::float_bits(double value, Type type) const {
  uint64_t bits = 0;
  if (type == Type::kF32) {
    const float narrow = static_cast<float>(value);
    std::memcpy(&bits, &narrow, 4);
  } else if (type == Type::kF64) {
    std::memcpy(&bits, &value, 8);
  } else {
    fail("a floating-point initial value for type ." + std::string(type_name(type)));
  }
  return bits;
}

const Function* PtxModule::find(std::string_view name) const {
  for (const auto& function : functions)
    if (function->name == name) return function.get();
  return nullptr;
}

PtxModule parse_ptx(std::string_view text) { return Parser(text).run(); }

}  // namespace ptx_emulator
