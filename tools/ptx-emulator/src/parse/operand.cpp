// Operands of a statement.
#include <charconv>
#include <cmath>
#include <cstring>

#include "parse/parser.h"

namespace ptx_emulator {

void Parser::reread_opcode() {
  if (token_.kind != Token::Kind::kName) return;
  size_t end = static_cast<size_t>(token_.text.data() - source_.data()) + token_.text.size();
  if (end < source_.size() && source_[end] == '.') {
    // Continue the name over dots and double colons, exactly as the lexer would have.
    size_t stop = end;
    while (stop < source_.size() && (is_name(source_[stop]) || source_[stop] == '.' ||
                                     (source_[stop] == ':' && stop + 1 < source_.size() && source_[stop + 1] == ':')))
      stop += source_[stop] == ':' ? 2 : 1;
    const size_t start = static_cast<size_t>(token_.text.data() - source_.data());
    lexer_.seek(stop);
    token_.text = source_.substr(start, stop - start);
  }
}

int Parser::find_register(const Function&, const std::string& name) const {
  size_t digits = name.size();
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  const std::string prefix = name.substr(0, digits);
  uint64_t index = ~uint64_t{0};
  if (digits < name.size() && name.size() - digits < 9)
    std::from_chars(name.data() + digits, name.data() + name.size(), index);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto exact = scope->registers.find(name); exact != scope->registers.end())
      return static_cast<int>(exact->second);
    if (const auto range = scope->ranges.find(prefix); range != scope->ranges.end() && index < range->second.count)
      return static_cast<int>(range->second.first + index);
  }
  return -1;
}

Operand Parser::operand(Function& f, Statement& s, size_t position, Operand& pair) {
  Operand result;
  if (accept("!")) {
    result = simple(f, s, position);
    result.negated = true;
    return result;
  }
  if (accept("[")) {
    result.kind = Operand::Kind::kAddress;
    result.elements.push_back(simple(f, s, position));
    while (is("+") || is("-") || token_.kind == Token::Kind::kInteger) {
      const bool minus = is("-");
      if (!accept("+")) accept("-");
      const bool minus_after = accept("-");
      const int64_t value = static_cast<int64_t>(integer(~uint64_t{0}));
      result.offset = static_cast<int64_t>(
          static_cast<uint64_t>(result.offset) +
          (minus != minus_after ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value)));
    }
    // Tensor-copy addresses carry coordinates: [map, {c0, c1}]
    while (accept(",")) {
      if (++nesting_ > 4) fail("operands too deeply nested");
      Operand unused;
      if (result.elements.size() > 8) fail("too many parts of an address");
      result.elements.push_back(operand(f, s, position, unused));
      --nesting_;
    }
    expect("]");
    return result;
  }
  if (accept("{") || accept("(")) {
    if (++nesting_ > 4) fail("operands too deeply nested");
    result.kind = Operand::Kind::kVector;
    while (!is("}") && !is(")")) {
      if (result.elements.size() > 300) fail("too many elements");
      Operand unused;
      result.elements.push_back(operand(f, s, position, unused));
      if (!accept(",") && !is("}") && !is(")"))
        fail("expected ',' before '" + std::string(token_.text.substr(0, 60)) + "'");
    }
    advance();
    --nesting_;
    return result;
  }
  result = simple(f, s, position);
  if (accept("|")) pair = simple(f, s, position);
  return result;
}

Operand Parser::simple(Function& f, Statement& s, size_t position) {
  Operand result;
  if (is("-") || token_.kind == Token::Kind::kInteger) {
    const bool negative = accept("-");
    if (token_.kind == Token::Kind::kFloat) {
      const double value = -float_value();
      result.kind = Operand::Kind::kFloat;
      result.offset = 8;
      std::memcpy(&result.bits, &value, 8);
      return result;
    }
    result.kind = Operand::Kind::kInteger;
    const uint64_t value = integer(~uint64_t{0});
    result.bits = negative ? 0 - value : value;
    return result;
  }
  if (token_.kind == Token::Kind::kFloat) {
    result.kind = Operand::Kind::kFloat;
    // A NaN's payload would not survive a conversion: 0f literals stay as they are, and say their width.
    result.bits = token_.bits;
    result.offset = token_.single ? 4 : 8;
    advance();
    return result;
  }
  if (token_.kind != Token::Kind::kName)
    fail("unexpected '" + std::string(token_.text.substr(0, 60)) + "' in an operand");
  const int line = token_.line;
  const std::string identifier = name();
  if (identifier == "_") return result;
  if (const int reg = find_register(f, identifier); reg >= 0) {
    result.kind = Operand::Kind::kRegister;
    result.reg = static_cast<uint32_t>(reg);
    return result;
  }
  if (identifier[0] == '%') {
    result.kind = Operand::Kind::kSpecial;
    result.name = identifier;
    if (is(".x") || is(".y") || is(".z") || is(".w")) {
      result.name += std::string(token_.text);
      advance();
    }
    return result;
  }
  if (const Variable* variable = find_variable(identifier)) {
    result.kind = Operand::Kind::kVariable;
    result.variable = variable;
    result.name = identifier;
    if (is("+") || is("-")) {
      // mov accepts variable+constant; addresses handle their own offsets
      if (s.opcode == "mov") {
        const bool minus = is("-");
        advance();
        const uint64_t value = integer(~uint64_t{0});
        result.offset = static_cast<int64_t>(minus ? 0 - value : value);
      }
    }
    return result;
  }
  if (identifier == "WARP_SZ") {
    result.kind = Operand::Kind::kInteger;
    result.bits = 32;
    return result;
  }
  result.name = identifier;
  if (s.opcode == "bra") {
    result.kind = Operand::Kind::kLabel;
    scopes_.back().label_uses.push_back({f.statements.size(), position, 0, identifier, "", line});
    return result;
  }
  const bool known_function = identifier == f.name || module_.find(identifier) != nullptr;
  if (known_function) {
    result.kind = Operand::Kind::kFunction;
    return result;
  }
  if (f.branch_targets.contains(identifier) || prototypes_.contains(identifier) || s.opcode == "brx" ||
      s.opcode == "call") {
    result.kind = Operand::Kind::kName;
    return result;
  }
  fail("unknown name '" + identifier + "'", line);
}

}  // namespace ptx_emulator
