// The history of counted launches as text.
#pragma once

#include <string>

namespace ptx_emulator {

std::string counts_json();
std::string counts_text(bool annotate);

}  // namespace ptx_emulator
