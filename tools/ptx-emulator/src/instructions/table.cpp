// All semantics of one host instruction set in one table.
#include "lanes.h"

namespace pop::emulator {
namespace POP_ISA {
InstructionTable make_table() {
  InstructionTable table;
  register_integer(table);
  register_floating(table);
  register_conversion(table);
  register_memory(table);
  register_warp(table);
  register_tensor(table);
  register_control(table);
  return table;
}
}  // namespace POP_ISA
}  // namespace pop::emulator
