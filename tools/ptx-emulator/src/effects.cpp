#include "effects.h"

#include <algorithm>
#include <cstdio>

#include "decode.h"

namespace ptx_emulator {

const char* class_name(Class c) {
  static constexpr const char* kNames[] = {"integer",     "float",        "double",  "half",        "conversion",
                                           "move",        "predicate",    "control", "global_load", "global_store",
                                           "shared_load", "shared_store", "local",   "parameter",   "atomic",
                                           "async_copy",  "async_wait",   "matrix",  "tensor",      "barrier",
                                           "fence",       "warp",         "other"};
  return kNames[static_cast<int>(c)];
}

namespace {

bool has(const Statement& s, std::string_view name) {
  return std::find(s.modifiers.begin(), s.modifiers.end(), name) != s.modifiers.end();
}

std::vector<Type> types_of(const Statement& s) {
  std::vector<Type> types;
  for (const std::string& m : s.modifiers)
    if (const Type t = type_from_name(m); t != Type::kNone) types.push_back(t);
  return types;
}

bool integral(Type t) {
  return is_integer(t) || t == Type::kB8 || t == Type::kB16 || t == Type::kB32 || t == Type::kB64;
}

Class class_of(const Statement& s, const std::vector<Type>& types, Space space) {
  const std::string& op = s.opcode;
  const Type last = types.empty() ? Type::kNone : types.back();
  if (op == "ld" || op == "ldu" || op == "st") {
    const bool load = op != "st";
    if (space == Space::kShared) return load ? Class::kSharedLoad : Class::kSharedStore;
    if (space == Space::kLocal) return Class::kLocal;
    if (space == Space::kParam || space == Space::kConst) return Class::kParameter;
    return load ? Class::kGlobalLoad : Class::kGlobalStore;
  }
  if (op == "atom" || op == "red") return Class::kAtomic;
  if (op == "cp")
    return s.modifiers.size() > 1 && (has(s, "commit_group") || has(s, "wait_group") || has(s, "wait_all"))
               ? Class::kAsyncWait
               : Class::kAsyncCopy;
  if (op == "mma" || op == "wmma" || (op == "wgmma" && has(s, "mma_async"))) return Class::kTensor;
  if (op == "wgmma") return has(s, "fence") ? Class::kFence : Class::kAsyncWait;
  if (op == "mbarrier") return Class::kBarrier;
  if (op == "ldmatrix" || op == "stmatrix" || op == "movmatrix") return Class::kMatrix;
  if (op == "bar" || op == "barrier") return Class::kBarrier;
  if (op == "membar" || op == "fence") return Class::kFence;
  if (op == "shfl" || op == "vote" || op == "match" || op == "redux" || op == "activemask" || op == "elect")
    return Class::kWarp;
  if (op == "bra" || op == "brx" || op == "ret" || op == "exit" || op == "call" || op == "trap" || op == "brkpt" ||
      op == "nanosleep")
    return Class::kControl;
  if (op == "cvt") return Class::kConversion;
  if (op == "setp" || last == Type::kPred) return Class::kPredicate;
  if (op == "mov" || op == "selp" || op == "cvta" || op == "prmt") return Class::kMove;
  switch (last) {
    case Type::kF64:
      return Class::kDouble;
    case Type::kF32:
      return Class::kFloat;
    case Type::kF16:
    case Type::kBf16:
    case Type::kF16x2:
    case Type::kBf16x2:
      return Class::kHalf;
    case Type::kNone:
      return Class::kOther;
    default:
      return Class::kInteger;
  }
}

}  // namespace

// mbarriers, bulk copies, wgmma: what the general rules do not say of them. False for other instructions.
bool Decoder::describe_asynchronous(InstructionEffects& effects) {
  const Statement& s = *statement_;
  const auto place = [&](const Address& a) {
    effects.space = a.space, effects.narrow = a.narrow, effects.address = a.base, effects.offset = a.offset;
  };
  if (s.opcode == "mbarrier" && !addresses_.empty()) {
    place(addresses_[0]);
    for (const Operand& o : s.operands)
      if (o.kind == Operand::Kind::kAddress) effects.address_constant = o.elements[0].kind != Operand::Kind::kRegister;
    effects.touch = Touch::kMbarrier, effects.element = 8, effects.elements = 1;
    effects.release = !has(s, "relaxed"), effects.acquire = !has(s, "relaxed");
    if (effects.flow != Flow::kNone) effects.flow = Flow::kFine;
    kernel_.asynchronous = true;
    return true;
  }
  if (s.opcode == "wgmma") {
    kernel_.asynchronous = true;
    const auto number = [&] { return static_cast<int64_t>(s.operands[0].bits); };
    effects.flow = Flow::kNone;
    if (has(s, "fence")) effects.touch = Touch::kMultiplyFence;
    if (has(s, "commit_group")) effects.touch = Touch::kMultiplyCommit;
    if (has(s, "wait_group")) effects.touch = Touch::kMultiplyWait, effects.groups = number();
    if (!has(s, "mma_async")) return true;
    effects.touch = Touch::kMultiplyAsync;
    uint64_t m = 0, n = 0, k = 0;
    for (const std::string& name : s.modifiers) {
      int mm, nn, kk;
      if (std::sscanf(name.c_str(), "m%dn%dk%d", &mm, &nn, &kk) == 3)
        m = static_cast<uint64_t>(mm), n = static_cast<uint64_t>(nn), k = static_cast<uint64_t>(kk);
    }
    effects.operations = 2 * m / 4 * n * k;  // a warp's
    return true;
  }
  if (s.opcode != "cp" || (!has(s, "bulk") && !has(s, "mbarrier"))) return false;
  kernel_.asynchronous = true;
  std::vector<LaneSlot> operands = std::move(effects.sources);
  effects.sources.clear();
  if (has(s, "mbarrier")) {
    place(addresses_[0]);
    effects.touch = Touch::kMbarrier, effects.element = 8, effects.elements = 1, effects.release = true;
  } else if (has(s, "commit_group")) {
    effects.touch = Touch::kBulkCommit;
  } else if (has(s, "wait_group")) {
    effects.touch = Touch::kBulkWait, effects.groups = static_cast<int64_t>(s.operands[0].bits);
    effects.reads = has(s, "read");
  } else if (!has(s, "prefetch")) {
    effects.touch = Touch::kBulkCopy;
    effects.sources = std::move(operands);
    for (const Operand& o : s.operands)
      for (const Operand& e : o.elements)
        if (o.kind == Operand::Kind::kAddress) {
          if (e.kind == Operand::Kind::kRegister)
            effects.sources.push_back({register_slots_[e.reg], static_cast<uint8_t>(slot_width(e))});
          for (const Operand& c : e.elements)
            if (c.kind == Operand::Kind::kRegister)
              effects.sources.push_back({register_slots_[c.reg], static_cast<uint8_t>(slot_width(c))});
        }
  }
  return true;
}

// Called when the statement has been decoded into at least one instruction.
void Decoder::describe_effects() {
  const Statement& s = *statement_;
  const std::string& op = s.opcode;
  const std::vector<Type> types = types_of(s);
  InstructionEffects effects;
  effects.last = true;
  if (s.guard >= 0) effects.guard = register_slots_[static_cast<size_t>(s.guard)];
  const auto slot_of = [&](const Operand& o) {
    if (o.kind != Operand::Kind::kRegister) return LaneSlot{};
    return LaneSlot{register_slots_[o.reg], static_cast<uint8_t>(type_width(function().registers[o.reg]))};
  };
  const auto add = [&](std::vector<LaneSlot>& out, const Operand& o) {
    if (o.kind == Operand::Kind::kVector)
      for (const Operand& e : o.elements) out.push_back(slot_of(e));
    else if (o.kind != Operand::Kind::kAddress && o.kind != Operand::Kind::kLabel)
      out.push_back(slot_of(o));
  };
  static constexpr std::string_view kNoDestination[] = {
      "st",      "red",           "stmatrix", "cp",         "bra",           "brx",  "ret",   "exit",
      "call",    "membar",        "fence",    "prefetch",   "prefetchu",     "trap", "brkpt", "nanosleep",
      "discard", "applypriority", "pmevent",  "setmaxnreg", "griddepcontrol"};
  const bool barrier = op == "bar" || op == "barrier";
  const bool counts =
      op == "mbarrier" && (has(s, "init") || has(s, "inval") || s.modifiers[0] == "expect_tx" || has(s, "complete_tx"));
  const bool writes = std::find(std::begin(kNoDestination), std::end(kNoDestination), op) == std::end(kNoDestination) &&
                      !(barrier && !has(s, "red")) && !counts;
  for (size_t k = 0; k < s.operands.size(); ++k) {
    if (op == "call") break;  // arguments are local memory
    const bool destination = writes && k == 0;
    add(destination ? effects.destinations : effects.sources, s.operands[k]);
    if (k < s.pairs.size() && s.pairs[k].kind == Operand::Kind::kRegister)
      add(destination ? effects.destinations : effects.sources, s.pairs[k]);
  }
  if (op == "call" && !s.operands.empty())
    for (const Operand& o : s.operands)
      if (o.kind == Operand::Kind::kRegister) add(effects.sources, o);

  const Type last = types.empty() ? Type::kNone : types.back();
  if (writes) effects.flow = Flow::kUse;
  if (op == "mov" || op == "cvta" || (op == "not" && last != Type::kPred)) effects.flow = Flow::kCopy;
  if (op == "xor" || op == "lop3") effects.flow = Flow::kBytewise;
  if (op == "and") effects.flow = Flow::kAnd;
  if (op == "or") effects.flow = Flow::kOr;
  if (op == "not" && last == Type::kPred) effects.flow = Flow::kBytewise;
  if (op == "selp") effects.flow = Flow::kSelect;
  if (op == "setp" && effects.sources.size() == 3 && effects.sources[2].slot != ~0u && effects.sources[2].bytes == 0 &&
      (has(s, "and") || has(s, "or"))) {
    effects.flow = Flow::kCompare, effects.decides_zero = has(s, "and");
    effects.compare_slot = effects.sources[2].slot, effects.compare_negated = s.operands.back().negated;
  }
  if (op == "prmt" && s.operands.size() == 4 && s.operands[3].kind == Operand::Kind::kInteger &&
      s.modifiers.size() == 1)
    effects.flow = Flow::kPermute, effects.groups = static_cast<int64_t>(s.operands[3].bits);
  if ((op == "shl" || op == "shr") && s.operands[2].kind == Operand::Kind::kInteger && s.operands[2].bits < 64) {
    const auto bits = static_cast<int64_t>(s.operands[2].bits);
    effects.flow = Flow::kShift, effects.groups = op == "shl" ? bits : -bits, effects.sign = is_signed(last);
  }
  if (op == "shfl") effects.flow = Flow::kShuffle;
  if (op == "vote" || op == "match" || op == "redux" || op == "elect" || barrier)
    effects.flow = writes ? Flow::kAcross : Flow::kNone;
  if (op == "activemask" || op == "createpolicy") effects.flow = Flow::kFine;
  if (op == "cvt" && types.size() == 2 && integral(types[0]) && integral(types[1]) && !has(s, "sat"))
    effects.flow = Flow::kExtend, effects.sign = is_signed(types[1]),
    effects.element = static_cast<uint8_t>(type_bytes(types[1]));
  effects.control = op == "bra" || op == "brx" || op == "call" || barrier || op == "ret" || op == "exit";
  effects.aligned = has(s, "aligned") || (op == "bar" && !has(s, "warp"));

  // Memory.
  const auto place = [&](const Address& a) {
    effects.space = a.space, effects.narrow = a.narrow, effects.address = a.base, effects.offset = a.offset;
  };
  const auto order = [&](bool atomic) {
    const bool narrow = has(s, "cta");
    if (atomic || has(s, "volatile") || has(s, "relaxed") || has(s, "acquire") || has(s, "release") ||
        has(s, "acq_rel") || has(s, "mmio"))
      effects.strength = narrow ? Strength::kBlock : Strength::kDevice;
    effects.acquire = has(s, "acquire") || has(s, "acq_rel");
    effects.release = has(s, "release") || has(s, "acq_rel");
  };
  const auto elements_of = [&] {
    return static_cast<uint8_t>(has(s, "v8") ? 8 : has(s, "v4") ? 4 : has(s, "v2") ? 2 : 1);
  };
  Space counted_space = Space::kGeneric;
  if ((op == "ld" || op == "ldu" || op == "st") && !addresses_.empty()) {
    const Address& a = addresses_[0];
    place(a);
    counted_space = a.space;
    effects.element = static_cast<uint8_t>(type_bytes(last));
    effects.elements = elements_of();
    effects.sign = is_signed(last);
    order(false);
    if (a.kernel_parameter) {
      effects.flow = Flow::kFine;
      counted_space = Space::kParam;
    } else {
      effects.touch = op == "st" ? Touch::kStore : Touch::kLoad;
      if (op != "st") effects.flow = Flow::kMemory;
      if (has(s, "const")) counted_space = Space::kConst;
      if (s.operands[op == "st" ? 0 : 1].elements[0].kind != Operand::Kind::kRegister) effects.address_constant = true;
    }
    if (op != "st") effects.sources.clear();  // at most a cache policy
    if (op == "st" && effects.sources.size() > effects.elements) effects.sources.resize(effects.elements);
  } else if ((op == "atom" || op == "red") && !addresses_.empty()) {
    place(addresses_[0]);
    effects.narrow = false;  // a pseudo instruction has widened it
    effects.address = code_.slots[slot_starts_.back() + (op == "atom" ? 1 : 0)];
    effects.touch = Touch::kAtomic;
    effects.element = static_cast<uint8_t>(type_bytes(last)), effects.elements = 1;
    effects.reads = !has(s, "exch");
    if (op == "atom") effects.flow = Flow::kMemory;
    order(true);
  } else if (describe_asynchronous(effects)) {
    // mbarriers, bulk copies, wgmma
  } else if (op == "cp") {
    effects.sources.clear();
    if (has(s, "commit_group")) {
      effects.touch = Touch::kAsyncCommit;
    } else if (has(s, "wait_all")) {
      effects.touch = Touch::kAsyncWait, effects.groups = -1;
    } else if (has(s, "wait_group")) {
      effects.touch = Touch::kAsyncWait, effects.groups = static_cast<int64_t>(s.operands[0].bits);
    } else if (addresses_.size() == 2) {
      place(addresses_[0]);
      effects.touch = Touch::kAsyncCopy;
      effects.second_address = addresses_[1].base, effects.second_offset = addresses_[1].offset;
      effects.element = static_cast<uint8_t>(s.operands[2].bits), effects.elements = 1;
      if (s.operands.size() > 3) add(effects.sources, s.operands[3]);
    }
  } else if ((op == "ldmatrix" || op == "stmatrix") && !addresses_.empty()) {
    place(addresses_[0]);
    effects.space = Space::kShared;
    effects.touch = op == "ldmatrix" ? Touch::kMatrixLoad : Touch::kMatrixStore;
    if (op == "ldmatrix") effects.flow = Flow::kMemory;
    effects.element = 16, effects.elements = has(s, "x4") ? 4 : has(s, "x2") ? 2 : 1;
    effects.sign = has(s, "trans");
  } else if (op == "membar" || op == "fence") {
    if ((has(s, "proxy") && has(s, "async")) || has(s, "mbarrier_init")) {
      effects.touch = Touch::kProxyFence;
      kernel_.asynchronous = true;
    } else if (!has(s, "proxy")) {
      effects.touch = Touch::kFence;
      effects.strength = has(s, "cta") ? Strength::kBlock : Strength::kDevice;
      effects.acquire = !has(s, "release"), effects.release = !has(s, "acquire");
    }
  } else if (op == "mma") {
    effects.flow = Flow::kMultiply;
    for (const std::string& m : s.modifiers) {
      int mm, nn, kk;
      if (std::sscanf(m.c_str(), "m%dn%dk%d", &mm, &nn, &kk) == 3)
        effects.operations =
            uint64_t{2} * static_cast<uint64_t>(mm) * static_cast<uint64_t>(nn) * static_cast<uint64_t>(kk),
        effects.m = mm;
    }
    const auto count = [](const Operand& o) {
      return o.kind == Operand::Kind::kVector ? static_cast<int>(o.elements.size()) : 1;
    };
    effects.k_registers_a = count(s.operands[1]), effects.registers_b = count(s.operands[2]);
    effects.half_out = types.front() == Type::kF16, effects.half_in = types.back() == Type::kF16;
  }
  effects.counted = class_of(s, types, counted_space);

  code_.effects.resize(code_.instructions.size());
  code_.effects.back() = std::move(effects);
}

}  // namespace ptx_emulator
