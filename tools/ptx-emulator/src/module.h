// A loaded module: its text, its variables in memory, its kernels.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace ptx_emulator {

struct Module {
  const std::shared_ptr<const bool> alive = std::make_shared<const bool>(true);  // gone with the module
  std::shared_ptr<const std::string> text;
  PtxModule ptx;
  std::unordered_map<const Variable*, uint8_t*> addresses;  // of .global and .const variables
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;
  std::mutex mutex;

  ~Module();
  // The kernel of that name, decoded on first use; null where there is none. Throws PtxError.
  Kernel* kernel(const std::string& name);
  void decode_all();
  const Variable* variable(const std::string& name) const;
};

// Throws PtxError for text that is no PTX, or no PTX for this device.
std::unique_ptr<Module> load_module(std::string_view text);

}  // namespace ptx_emulator
