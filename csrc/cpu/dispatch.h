#pragma once

#include <string>
#include <vector>

namespace pop::cpu {

/// Instruction sets that this build has kernels for and this processor runs, the fastest first. The last,
/// amx_bf16_emulated, is for tests: the code for tiles, on tiles in plain arithmetic. It is never in use unasked.
std::vector<std::string> instruction_sets();

/// The one in use; at first the fastest.
std::string instruction_set();

/// Chooses another, for tests and comparisons. Throws std::invalid_argument for one that is not in instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace pop::cpu
