// Control flow, calls, barriers and traps (PTX ISA 9.7.12, 9.7.13.1, 9.7.19): decoded here, carried out by the
// scheduler.
#include <cstdio>

#include "decode.h"
#include "module.h"

namespace ptx_emulator {
namespace {

void branch(Decoder& d) {
  d.modifiers().take("uni");
  d.expect_operands(1, 1);
  if (d.operand(0).kind != Operand::Kind::kLabel) d.fail("bra needs a label");
  Instruction& i = d.emit(nullptr, {});
  i.kind = Kind::kBranch;
  i.target = d.operand(0).reg;
}

void branch_indexed(Decoder& d) {
  if (!d.modifiers().take("idx")) d.fail("only brx.idx is known");
  d.modifiers().take("uni");
  d.expect_operands(2, 2);
  const uint32_t index = d.source(0, Type::kU32);
  const auto table = d.function().branch_targets.find(d.operand(1).name);
  if (table == d.function().branch_targets.end() || table->second.empty())
    d.fail("unknown table '" + d.operand(1).name + "'");
  Instruction& i = d.emit(nullptr, {index});
  i.kind = Kind::kBranchIndirect;
  i.target = static_cast<uint32_t>(d.code().tables.size());
  d.code().tables.push_back(table->second);
}

void leave(Decoder& d) {
  d.modifiers().take("uni");
  d.expect_operands(0, 0);
  const bool exits = d.statement().opcode == "exit";
  d.emit(nullptr, {}).kind = exits ? Kind::kExit : Kind::kReturn;
}

Builtin builtin_of(const std::string& name) {
  if (name == "vprintf") return Builtin::kPrintf;
  if (name == "__assertfail") return Builtin::kAssertFail;
  if (name == "malloc") return Builtin::kMalloc;
  if (name == "free") return Builtin::kFree;
  return Builtin::kNone;
}

void call(Decoder& d) {
  d.modifiers().take("uni");
  const auto& operands = d.statement().operands;
  size_t at = 0;
  const Operand *results = nullptr, *arguments = nullptr;
  if (at < operands.size() && operands[at].kind == Operand::Kind::kVector) results = &operands[at++];
  if (at >= operands.size()) d.fail("a call needs a function");
  const Operand& target = operands[at++];
  if (at < operands.size() && operands[at].kind == Operand::Kind::kVector) arguments = &operands[at++];

  Call call;
  const Function* callee = nullptr;
  if (target.kind == Operand::Kind::kRegister) {
    call.pointer_slot = d.source(target, Type::kU64);
  } else {
    callee = d.module().ptx.find(target.name);
    if (!callee) d.fail("unknown function '" + target.name + "'");
    if (callee->entry) d.fail("a kernel cannot be called");
    if (callee->declared_only) {
      call.builtin = builtin_of(target.name);
      if (call.builtin == Builtin::kNone) d.fail("function '" + target.name + "' has no definition");
    } else {
      const auto code = d.kernel().codes.find(callee);
      if (code == d.kernel().codes.end()) d.fail("unknown function '" + target.name + "'");
      call.callee = code->second.get();
    }
  }
  // An indirect callee has the layout of its parameters alone: they come first, in order, in every frame (returns, then
  // parameters).
  const auto copies = [&](const Operand* list, const std::vector<const Variable*>* formal,
                          std::vector<ArgumentCopy>& out, bool result) {
    const size_t count = list ? list->elements.size() : 0;
    if (formal && formal->size() != count) d.fail("a call with the wrong number of arguments");
    for (size_t k = 0; k < count; ++k) {
      const Operand& actual = list->elements[k];
      if (actual.kind != Operand::Kind::kVariable || !d.code().local_offsets.contains(actual.variable))
        d.fail("arguments must be .param variables of the function");
      const uint32_t here = d.code().local_offsets.at(actual.variable);
      uint32_t there = 0, bytes = static_cast<uint32_t>(actual.variable->bytes);
      if (formal && call.callee) {
        if ((*formal)[k]->bytes < bytes) bytes = static_cast<uint32_t>((*formal)[k]->bytes);
        there = call.callee->local_offsets.at((*formal)[k]);
      }
      out.push_back(result ? ArgumentCopy{there, here, bytes} : ArgumentCopy{here, there, bytes});
    }
  };
  const bool known = callee && !callee->declared_only;
  copies(arguments, known ? &callee->parameters : nullptr, call.arguments, false);
  copies(results, known ? &callee->returns : nullptr, call.results, true);
  if (call.builtin == Builtin::kPrintf && (call.arguments.size() != 2 || call.results.size() != 1))
    d.fail("vprintf needs two arguments and a result");
  if (call.builtin == Builtin::kAssertFail && call.arguments.size() != 5) d.fail("__assertfail needs five arguments");
  if (call.builtin == Builtin::kMalloc && (call.arguments.size() != 1 || call.results.size() != 1))
    d.fail("malloc needs an argument and a result");
  if (call.builtin == Builtin::kFree && call.arguments.size() != 1) d.fail("free needs an argument");
  d.special(Special::kLocalBase, 8);
  Instruction& i = d.emit(nullptr, {});
  i.kind = Kind::kCall;
  i.target = static_cast<uint32_t>(d.code().calls.size());
  d.code().calls.push_back(std::move(call));
}

// Barriers; slots: id, count (or the id again), destination, source predicate. immediate: what it does.
void barrier(Decoder& d) {
  auto& m = d.modifiers();
  const bool named_barrier = d.statement().opcode == "barrier";
  if (m.take("cluster")) d.fail("cluster barriers are not supported");
  m.take("cta");
  if (m.take("warp")) {
    if (!m.take("sync")) d.fail("bar.warp needs .sync");
    d.expect_operands(1, 1);
    d.emit([](Warp&, const Instruction&) { std::atomic_thread_fence(std::memory_order_seq_cst); },
           {d.source(0, Type::kB32)})
        .kind = Kind::kWarpSync;
    return;
  }
  const int what = m.take_one({"sync", "arrive", "red"});
  if (what < 0) d.fail(named_barrier ? "barrier needs .sync, .arrive or .red" : "bar needs .sync, .arrive or .red");
  m.take("aligned");
  size_t at = 0;
  int reduction = 0;
  uint32_t destination = 0, predicate = d.constant(kAllLanes, 0);
  if (what == 2) {
    const int op = m.take_one({"popc", "and", "or"});
    const Type type = d.require_type();
    if (op < 0 || type != (op == 0 ? Type::kU32 : Type::kPred))
      d.fail("bar.red needs .popc.u32, .and.pred or .or.pred");
    reduction = op + 1;
    destination = d.destination(at++, type);
  }
  d.expect_operands(at + 1, at + 3);
  const uint32_t id = d.source(at++, Type::kU32);
  const size_t left = d.operand_count() - at - (what == 2 ? 1 : 0);
  if (left > 1 || (what == 1 && left != 1)) d.fail("wrong number of operands");
  const bool counted = left == 1;
  const uint32_t count = counted ? d.source(at++, Type::kU32) : id;
  if (what == 2) predicate = d.predicate(d.operand(at));
  Instruction& i = d.emit(nullptr, {id, count, destination, predicate}, reduction);
  i.kind = Kind::kBarrier;
  i.count = static_cast<uint16_t>((what == 1 ? 1 : 0) | (counted ? 2 : 0));
}

void trap(Decoder& d) {
  d.expect_operands(0, 0);
  d.emit([](Warp&, const Instruction&) { throw KernelFault{kLaunchFailure, "trap"}; }, {});
}
void breakpoint(Decoder& d) {
  d.expect_operands(0, 0);
  d.emit([](Warp&, const Instruction&) { throw KernelFault{kLaunchFailure, "breakpoint"}; }, {});
}

void sleep(Decoder& d) {
  if (d.require_type() != Type::kU32) d.fail("nanosleep needs .u32");
  d.expect_operands(1, 1);
  d.emit(nullptr, {d.source(0, Type::kU32)}).kind = Kind::kSleep;
}

void ignore(Decoder& d) {
  while (d.modifiers().untaken()) d.modifiers().take_next();
  d.emit([](Warp&, const Instruction&) {}, {});
}

// A warpgroup's registers; immediate: a thread's from now on, slots: none. count: 1 for more than before.
void set_registers(Decoder& d) {
  auto& m = d.modifiers();
  if (d.module_target() != "sm_90a") d.fail("setmaxnreg needs .target sm_90a");
  const int what = m.take_one({"dec", "inc"});
  if (what < 0 || !m.take("sync") || !m.take("aligned")) d.fail("setmaxnreg needs .inc or .dec, .sync and .aligned");
  if (d.require_type() != Type::kU32) d.fail("setmaxnreg needs .u32");
  d.expect_operands(1, 1);
  const Operand& count = d.operand(0);
  if (count.kind != Operand::Kind::kInteger || count.bits < 24 || count.bits > 256 || count.bits % 8)
    d.fail("the number of registers must be a multiple of 8 from 24 to 256");
  Instruction& i = d.emit(nullptr, {}, static_cast<int64_t>(count.bits));
  i.kind = Kind::kRegisters, i.count = static_cast<uint16_t>(what);
  d.kernel().sets_registers = true;
}

// Launches run one after another: the grids before this one are done.
void grid_dependency(Decoder& d) {
  if (d.modifiers().take_one({"launch_dependents", "wait"}) < 0)
    d.fail("griddepcontrol needs .launch_dependents or .wait");
  d.expect_operands(0, 0);
  d.emit([](Warp&, const Instruction&) {}, {});
}

}  // namespace

void register_control(InstructionTable& t) {
  t["bra"] = branch;
  t["brx"] = branch_indexed;
  t["ret"] = t["exit"] = leave;
  t["call"] = call;
  t["bar"] = t["barrier"] = barrier;
  t["trap"] = trap;
  t["brkpt"] = breakpoint;
  t["nanosleep"] = sleep;
  t["pmevent"] = ignore;
  t["setmaxnreg"] = set_registers;
  t["griddepcontrol"] = grid_dependency;
}

}  // namespace ptx_emulator
