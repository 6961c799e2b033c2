// PTX text to tree: a hand-written lexer and a recursive-descent parser. Registers, variables and labels are resolved
// here, in their scopes.
#include <charconv>
#include <cmath>
#include <cstring>

#include "ptx.h"

namespace pop::emulator {
namespace {

struct TypeInfo {
  const char* name;
  int bits;
};
constexpr TypeInfo kTypes[] = {
    {"", 0},     {"pred", 1},   {"b8", 8},      {"b16", 16},   {"b32", 32},   {"b64", 64},    {"b128", 128},
    {"u8", 8},   {"u16", 16},   {"u32", 32},    {"u64", 64},   {"s8", 8},     {"s16", 16},    {"s32", 32},
    {"s64", 64}, {"f16", 16},   {"bf16", 16},   {"f32", 32},   {"f64", 64},   {"tf32", 32},   {"e4m3", 8},
    {"e5m2", 8}, {"f16x2", 32}, {"bf16x2", 32}, {"u16x2", 32}, {"s16x2", 32}, {"e4m3x2", 16}, {"e5m2x2", 16},
    {"u4", 4},   {"s4", 4},     {"b1", 1},
};

bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }
bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

struct Token {
  enum class Kind : uint8_t { kEnd, kName, kDirective, kInteger, kFloat, kString, kPunctuation };
  Kind kind = Kind::kEnd;
  std::string_view text;
  uint64_t bits = 0;
  bool single = false;  // an 0f literal
  int line = 1;
};

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  size_t position() const { return position_; }
  void seek(size_t position) { position_ = position; }

  // The next token. Opcodes keep their modifiers: `opcode` makes a name swallow dots and colons, too.
  Token next(bool opcode = false) {
    skip_blank();
    Token token;
    token.line = line_;
    if (position_ >= text_.size()) return token;
    const size_t start = position_;
    const char c = text_[position_];
    if (is_name_start(c)) {
      ++position_;
      while (position_ < text_.size() &&
             (is_name(text_[position_]) ||
              (opcode && (text_[position_] == '.' || (text_[position_] == ':' && double_colon()))))) {
        position_ += text_[position_] == ':' ? 2 : 1;
      }
      position_ = std::min(position_, text_.size());
      token.kind = Token::Kind::kName;
    } else if (c == '.' && position_ + 1 < text_.size() && is_name(text_[position_ + 1])) {
      ++position_;
      while (position_ < text_.size() && (is_name(text_[position_]) || (text_[position_] == ':' && double_colon())))
        position_ += text_[position_] == ':' ? 2 : 1;
      position_ = std::min(position_, text_.size());
      token.kind = Token::Kind::kDirective;
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      number(token);
    } else if (c == '"') {
      ++position_;
      while (position_ < text_.size() && text_[position_] != '"') {
        if (text_[position_] == '\\') ++position_;
        if (position_ < text_.size() && text_[position_] == '\n') ++line_;
        ++position_;
      }
      position_ = std::min(position_ + 1, text_.size());
      token.kind = Token::Kind::kString;
    } else {
      ++position_;
      token.kind = Token::Kind::kPunctuation;
    }
    token.text = text_.substr(start, position_ - start);
    return token;
  }

 private:
  bool double_colon() const { return position_ + 1 < text_.size() && text_[position_ + 1] == ':'; }

  void skip_blank() {
    while (position_ < text_.size()) {
      const char c = text_[position_];
      if (c == '\n') {
        ++line_, ++position_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v' || c == '\0') {
        ++position_;
      } else if (c == '/' && position_ + 1 < text_.size() && text_[position_ + 1] == '/') {
        while (position_ < text_.size() && text_[position_] != '\n') ++position_;
      } else if (c == '/' && position_ + 1 < text_.size() && text_[position_ + 1] == '*') {
        const size_t end = text_.find("*/", position_ + 2);
        const size_t stop = end == std::string_view::npos ? text_.size() : end + 2;
        for (; position_ < stop; ++position_) line_ += text_[position_] == '\n';
      } else if (c == '#') {  // preprocessor line marks
        while (position_ < text_.size() && text_[position_] != '\n') ++position_;
      } else {
        return;
      }
    }
  }

  void number(Token& token) {
    const size_t start = position_;
    const auto hex_digits = [&](size_t count) {
      uint64_t bits = 0;
      for (size_t i = 0; i < count; ++i) {
        if (position_ >= text_.size() || !std::isxdigit(static_cast<unsigned char>(text_[position_])))
          throw PtxError("line " + std::to_string(line_) + ": malformed floating-point literal");
        const char c = text_[position_++];
        bits = bits * 16 + static_cast<uint64_t>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
      }
      return bits;
    };
    const char second = position_ + 1 < text_.size() ? static_cast<char>(text_[position_ + 1] | 32) : '\0';
    if (text_[position_] == '0' && second == 'f') {
      position_ += 2;
      token.bits = hex_digits(8);
      token.kind = Token::Kind::kFloat;
      token.single = true;
      return;
    }
    if (text_[position_] == '0' && second == 'd') {
      position_ += 2;
      token.bits = hex_digits(16);
      token.kind = Token::Kind::kFloat;
      return;
    }
    int base = 10;
    if (text_[position_] == '0' && second == 'x')
      base = 16, position_ += 2;
    else if (text_[position_] == '0' && second == 'b')
      base = 2, position_ += 2;
    else if (text_[position_] == '0')
      base = 8;
    const auto [end, error] = std::from_chars(text_.data() + position_, text_.data() + text_.size(), token.bits, base);
    const size_t after = static_cast<size_t>(end - text_.data());
    const bool decimal = base == 10 || base == 8;
    if (decimal && after < text_.size() && (text_[after] == '.' || (text_[after] | 32) == 'e')) {
      double value = 0;
      const auto parsed = std::from_chars(text_.data() + start, text_.data() + text_.size(), value);
      if (parsed.ec == std::errc() && parsed.ptr > end) {
        position_ = static_cast<size_t>(parsed.ptr - text_.data());
        std::memcpy(&token.bits, &value, 8);
        token.kind = Token::Kind::kFloat;
        return;
      }
    }
    if (error != std::errc()) throw PtxError("line " + std::to_string(line_) + ": malformed number");
    position_ = after;
    if (position_ < text_.size() && (text_[position_] == 'U' || text_[position_] == 'u')) ++position_;
    token.kind = Token::Kind::kInteger;
  }

  std::string_view text_;
  size_t position_ = 0;
  int line_ = 1;
};

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

  void module_item() {
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

  void skip_braces() {
    int depth = 0;
    do {
      if (token_.kind == Token::Kind::kEnd) fail("unterminated '{'");
      if (is("{")) ++depth;
      if (is("}")) --depth;
      advance();
    } while (depth > 0);
  }

  void linkage_item() {
    bool external = false;
    for (;;) {
      if (accept(".extern"))
        external = true;
      else if (!accept(".visible") && !accept(".weak") && !accept(".common"))
        break;
    }
    if (is(".entry") || is(".func")) return function(external);
    if (is(".global") || is(".const") || is(".shared")) {
      declare_variables(nullptr, external);
      return;
    }
    fail("unknown directive '" + std::string(token_.text.substr(0, 60)) + "'");
  }

  // `.space [.align n] [.vN] .type name[dims] [= init], ...;` The token is the space directive.
  void declare_variables(Function* function, bool external) {
    Variable head;
    head.external = external;
    space_and_type(head);
    do {
      auto variable = std::make_unique<Variable>(head);
      declarator(*variable);
      if (accept("=")) initializer(*variable);
      add_variable(function, std::move(variable));
    } while (accept(","));
    expect(";");
  }

  void add_variable(Function* function, std::unique_ptr<Variable> variable) {
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

  void space_and_type(Variable& variable) {
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

  void declarator(Variable& variable) {
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

  void put_initial(Variable& variable, uint64_t bits, int bytes) {
    if (!open_dimension_ && variable.initial.size() + static_cast<size_t>(bytes) > variable.bytes)
      fail("too many initial values for '" + variable.name + "'");
    for (int i = 0; i < bytes; ++i) variable.initial.push_back(static_cast<uint8_t>(bits >> (8 * i)));
  }

  void initializer(Variable& variable) {
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

  void initial_value(Variable& variable, int bytes) {
    const bool negative = accept("-");
    if (token_.kind == Token::Kind::kInteger) {
      const uint64_t value = negative ? 0 - token_.bits : token_.bits;
      advance();
      // `0xff(symbol)` takes one byte of an address
      if (is("(")) fail("masked addresses in initialisers are not supported");
      if (is_float(variable.type))
        return put_initial(variable, float_bits(static_cast<double>(static_cast<int64_t>(value)), variable.type),
                           bytes);
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

  double float_value() {
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

  uint64_t float_bits(double value, Type type) const {
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

  void function(bool external) {
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
      uint32_t ignored[3];
      if (accept(".maxntid"))
        triple(f.max_threads);
      else if (accept(".reqntid"))
        triple(f.required_threads);
      else if (accept(".reqnctapercluster"))
        triple(f.cluster);
      else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxnctapersm") || accept(".maxclusterrank"))
        triple(ignored);
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

  void parameters(Function& f, std::vector<const Variable*>& out) {
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

  // Statements up to the closing brace of the function. Opcode tokens are read with their modifiers.
  void body(Function& f) {
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

  void close_scope(Function& f) {
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

  void statement(Function& f) {
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
      if (f.registers[static_cast<size_t>(s.guard)] != Type::kPred)
        fail("guard '" + guard + "' is no predicate", s.line);
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

  std::string name_opcode() {
    // A guard's name, followed by an opcode.
    if (token_.kind != Token::Kind::kName) fail("expected a predicate");
    std::string result(token_.text);
    advance(true);
    return result;
  }

  void label(Function& f, const std::string& name) {
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

  void directive(Function& f) {
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
          f.register_names.push_back(count == 1 && !scopes_.back().ranges.contains(reg) ? reg
                                                                                        : reg + std::to_string(i));
      } while (accept(","));
      if (!is(";")) fail("expected ';'");
      advance(true);
    } else if (is(".local") || is(".shared") || is(".param") || is(".const") || is(".global") || is(".extern")) {
      const bool external = accept(".extern");
      if (is(".global") || is(".const")) {  // function-scope statics live as long as the module
        Variable head;
        head.external = external;
        space_and_type(head);
        do {
          auto variable = std::make_unique<Variable>(head);
          declarator(*variable);
          if (accept("=")) initializer(*variable);
          scopes_.back().variables[variable->name] = variable.get();
          module_.variables.push_back(std::move(variable));
        } while (accept(","));
        if (!is(";")) fail("expected ';'");
      } else {
        Variable head;
        head.external = external;
        space_and_type(head);
        do {
          auto variable = std::make_unique<Variable>(head);
          declarator(*variable);
          add_variable(&f, std::move(variable));
        } while (accept(","));
        if (!is(";")) fail("expected ';'");
      }
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

  void reread_opcode() {
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

  int find_register(const Function&, const std::string& name) const {
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

  const Variable* find_variable(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto at = scope->variables.find(name); at != scope->variables.end()) return at->second;
    const auto global = globals_.find(name);
    return global == globals_.end() ? nullptr : global->second;
  }

  Operand operand(Function& f, Statement& s, size_t position, Operand& pair) {
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

  Operand simple(Function& f, Statement& s, size_t position) {
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

}  // namespace

Type type_from_name(std::string_view name) {
  for (size_t i = 1; i < std::size(kTypes); ++i)
    if (name == kTypes[i].name) return static_cast<Type>(i);
  return Type::kNone;
}
const char* type_name(Type type) { return kTypes[static_cast<size_t>(type)].name; }
int type_bits(Type type) { return kTypes[static_cast<size_t>(type)].bits; }
bool is_signed(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
bool is_float(Type type) { return type >= Type::kF16 && type <= Type::kE5m2; }
bool is_integer(Type type) { return type >= Type::kU8 && type <= Type::kS64; }

const Function* PtxModule::find(std::string_view name) const {
  for (const auto& function : functions)
    if (function->name == name) return function.get();
  return nullptr;
}

PtxModule parse_ptx(std::string_view text) { return Parser(text).run(); }

}  // namespace pop::emulator
