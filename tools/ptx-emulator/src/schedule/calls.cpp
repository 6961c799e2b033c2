// Calls between functions. Arguments and results pass from one frame's local memory to the other's, lane by lane.
#include <algorithm>
#include <bit>
#include <cstring>

#include "schedule/block.h"

namespace ptx_emulator {

// The function that an indirect call's pointer names.
const Code& Block::function_at(uint64_t pointer, const Call& call) const {
  const auto& codes = grid->request.kernel->codes;
  const auto known = codes.find(reinterpret_cast<const Function*>(pointer));
  if (known == codes.end() || known->second->entry) throw KernelFault{kInvalidPc, "an indirect call to no function"};
  if (known->second->function->parameters.size() != call.arguments.size())
    throw KernelFault{kInvalidPc, "an indirect call to a function with other parameters"};
  return *known->second;
}

void Block::copy_local(Warp& w, uint32_t lanes, uint32_t to, uint32_t from, uint64_t bytes) {
  for (uint32_t m = lanes; m; m &= m - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(m));
    uint8_t* local = w.local + size_t{lane} * w.local_stride;
    std::memcpy(local + to, local + from, bytes);
    if (grid->checker) grid->checker->copy_local(w, lane, to, from, static_cast<uint32_t>(bytes));
  }
}

// The callee's frame, with its arguments.
Frame* Block::begin_call(Warp& w, const Call& call, const Code& callee, Frame* caller, uint32_t lanes) {
  Frame* frame = make_frame(w, callee);
  frame->caller = caller;
  frame->call = &call;
  frame->local_base = caller->local_base + caller->code->local_bytes;
  frame->lanes = lanes;
  if (uint64_t{frame->local_base} + callee.local_bytes > w.local_stride)
    throw KernelFault{kLaunchFailure, "stack overflow"};
  fill_presets(w, *frame);
  if (grid->checker) grid->checker->new_frame(w, *frame, lanes);
  const auto& formals = callee.function->parameters;
  for (size_t k = 0; k < call.arguments.size(); ++k)
    copy_local(w, lanes, frame->local_base + callee.local_offsets.at(formals[k]),
               caller->local_base + call.arguments[k].from,
               std::min<uint64_t>(call.arguments[k].bytes, formals[k]->bytes));
  return frame;
}

void Block::return_results(Warp& w, const Frame& callee, uint32_t lanes) {
  const Call& call = *callee.call;
  const auto& formals = callee.code->function->returns;
  for (size_t k = 0; k < call.results.size() && k < formals.size(); ++k)
    copy_local(w, lanes, callee.caller->local_base + call.results[k].to,
               callee.local_base + callee.code->local_offsets.at(formals[k]),
               std::min<uint64_t>(call.results[k].bytes, formals[k]->bytes));
}

}  // namespace ptx_emulator
