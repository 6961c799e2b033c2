// All semantics of one host instruction set in one table.
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
InstructionTable make_table() {
  InstructionTable table;
  register_integer(table);
  register_bits(table);
  register_compare(table);
  register_move(table);
  register_floating(table);
  register_conversion(table);
  register_memory(table);
  register_atomic(table);
  register_async_copy(table);
  register_warp(table);
  register_tensor(table);
  register_mbarrier(table);
  register_warpgroup(table);
  register_control(table);
  return table;
}
}  // namespace PTX_ISA
}  // namespace ptx_emulator
