// The text of a PTX module as a tree: names resolved, nothing interpreted yet.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx_emulator {

// An error in PTX text: what() has the line number and the offending text.
struct PtxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBf16,
  kF32,
  kF64,
  kTf32,
  kE4m3,
  kE5m2,
  kF16x2,
  kBf16x2,
  kU16x2,
  kS16x2,
  kE4m3x2,
  kE5m2x2,
  kU4,
  kS4,
  kB1,
};

Type type_from_name(std::string_view name);  // without the dot; kNone where it is no type
const char* type_name(Type type);
int type_bits(Type type);
inline int type_bytes(Type type) { return (type_bits(type) + 7) / 8; }
bool is_signed(Type type);
bool is_float(Type type);    // a scalar floating-point type
bool is_integer(Type type);  // signed or unsigned, not untyped bits

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

struct Variable;
struct Function;

// Bytes of an initialiser that hold an address, known only once the module is loaded.
struct Relocation {
  uint64_t offset;
  std::string symbol;
  int64_t addend;
  int bytes;
};

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  Type type = Type::kB8;
  uint32_t alignment = 1;
  uint64_t bytes = 0;
  bool external = false;
  std::vector<uint8_t> initial;  // empty: zeros
  std::vector<Relocation> relocations;
};

struct Operand {
  enum class Kind : uint8_t {
    kRegister,
    kInteger,
    kFloat,
    kSpecial,
    kVariable,
    kFunction,
    kLabel,
    kVector,
    kAddress,
    kSink,
    kName
  };
  Kind kind = Kind::kSink;
  bool negated = false;  // !predicate
  uint32_t reg = 0;      // kRegister: index into Function::registers; kLabel: statement index
  uint64_t bits = 0;     // kInteger: value; kFloat: bits of the literal
  int64_t offset = 0;    // kAddress: added to the base; kVariable: added to the address; kFloat: bytes of the literal
  const Variable* variable = nullptr;
  std::string name;               // kSpecial, kFunction, kName
  std::vector<Operand> elements;  // kVector; kAddress: the base (one element)
};

struct Statement {
  int line = 0;
  std::string text;
  std::string opcode;                  // before the first dot
  std::vector<std::string> modifiers;  // after it
  int guard = -1;                      // register index
  bool guard_negated = false;
  std::vector<Operand> operands;
  std::vector<Operand> pairs;  // second half of `a|b` operands, by position (kSink where there is none)
  int source_line = 0;         // from .loc, 0 where unknown
  int source_file = 0;
};

struct Function {
  std::string name;
  bool entry = false;
  bool declared_only = false;
  int line = 0;
  std::vector<const Variable*> parameters, returns;
  std::vector<Type> registers;
  std::vector<std::string> register_names;
  std::vector<std::unique_ptr<Variable>> variables;  // all that the function declares, parameters included
  std::vector<Statement> statements;
  std::unordered_map<std::string, std::vector<uint32_t>> branch_targets;  // .branchtargets tables, as statement indices
  uint32_t max_threads[3] = {0, 0, 0};
  uint32_t required_threads[3] = {0, 0, 0};
  uint32_t cluster[3] = {0, 0, 0};
  uint32_t blocks_per_sm = 0, most_registers = 0;  // .minnctapersm and .maxnreg; 0: not given
};

struct PtxModule {
  int version_major = 0, version_minor = 0;
  std::string target;
  int target_sm = 0;
  std::vector<std::unique_ptr<Function>> functions;
  std::vector<std::unique_ptr<Variable>> variables;
  std::unordered_map<int, std::string> files;
  const Function* find(std::string_view name) const;
};

PtxModule parse_ptx(std::string_view text);

}  // namespace ptx_emulator
