#include "parse/lexer.h"

#include <charconv>
#include <cmath>
#include <cstring>

namespace ptx_emulator {

Token Lexer::next(bool opcode) {
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

void Lexer::skip_blank() {
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

void Lexer::number(Token& token) {
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

}  // namespace ptx_emulator
