// The modifiers of a statement, each taken once.
#include "decode.h"

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
}  // namespace ptx_emulator
