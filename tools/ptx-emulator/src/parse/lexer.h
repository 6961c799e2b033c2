// PTX text as tokens.
#pragma once

#include <cctype>
#include <cstdint>
#include <string_view>

#include "ptx.h"

namespace ptx_emulator {

inline bool is_name_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}
inline bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

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
  Token next(bool opcode = false);

 private:
  bool double_colon() const { return position_ + 1 < text_.size() && text_[position_ + 1] == ':'; }

  void skip_blank();

  void number(Token& token);

  std::string_view text_;
  size_t position_ = 0;
  int line_ = 1;
};

}  // namespace ptx_emulator
