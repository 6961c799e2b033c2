
#include "checks/transfers.h"

#include <algorithm>

#include "checks/places.h"
#include "checks/settings.h"

namespace ptx_emulator {

bool host_reads(const void* base, size_t bytes, const char* who) {
  if (!(launch_settings().checks & kCheckInit)) return true;
  const Memory& memory = Memory::instance();
  const void* const at = memory.first_unwritten(base, bytes);
  if (!at) return true;
  Finding f;
  f.rule = "uninitialized-copy", f.space = "global", f.address = reinterpret_cast<uint64_t>(at);
  for (const auto& region : memory.regions())
    if (region->holds(f.address, 1)) f.allocation = region_name(*region);
  f.message = std::string(who) + " reads byte " +
              std::to_string(static_cast<const char*>(at) - static_cast<const char*>(base)) + " of " +
              std::to_string(bytes) + " from '" + f.allocation + "', which was never written";
  Findings::instance().add(std::move(f));
  return false;
}

namespace {

bool meet(const Extent& a, const Extent& b) {
  for (size_t row = 0; row < a.height; ++row)
    if (meets(b, a.base + row * a.pitch, a.width)) return true;
  return false;
}

}  // namespace

void check_transfer(const std::string& what, std::vector<Extent> extents) {
  if (!(launch_settings().checks & kCheckRace)) return;
  Memory& memory = Memory::instance();
  // What the host owns is read and written before the call returns.
  std::erase_if(extents, [&](const Extent& e) { return !memory.find(reinterpret_cast<void*>(e.base)); });
  const auto found = [&](const Work& other, const Extent& e, uintptr_t at, bool writes, Spot second) {
    Finding f;
    f.rule = "race", f.spot.kernel = what, f.address = at, f.space = "global";
    for (const auto& region : memory.regions())
      if (region->holds(at, 1)) f.allocation = region_name(*region);
    f.message = what + (e.write ? " writes" : " reads") + " global address " + hex(at) + ", which " +
                (other.extents.empty() ? "another thread" : other.name) + (writes ? " writes" : " reads") +
                " on another stream, without order between them";
    f.second_role = writes ? "written at" : "read at", f.second = std::move(second);
    Findings::instance().add(std::move(f));
  };
  const auto concurrent = StreamOrder::instance().concurrent();
  bool launches = false;
  for (const auto& work : concurrent) {
    launches |= work->extents.empty();
    Spot second;
    second.kernel = work->name;
    for (const Extent& theirs : work->extents)
      for (const Extent& mine : extents)
        if ((mine.write || theirs.write) && meet(mine, theirs)) found(*work, mine, mine.base, theirs.write, second);
  }
  // The cells say which launches were there.
  if (launches)
    for (const auto& region : memory.regions()) {
      if (!region->cells.data()) continue;
      const auto* const cells = reinterpret_cast<const Cell*>(region->cells.data());
      const uintptr_t start = region->base & ~uintptr_t{3};
      for (const Extent& e : extents) {
        bool said = false;
        for (size_t row = 0; row < e.height && !said; ++row) {
          const uintptr_t low = std::max(e.base + row * e.pitch, region->base),
                          high = std::min(e.base + row * e.pitch + e.width, region->base + region->bytes);
          for (uintptr_t at = low & ~uintptr_t{3}; at < high && !said; at += 4)
            for (const Stamp& stamp : cells[(at - start) / 4].stamps) {
              uint32_t bytes = 0;
              for (uint32_t b = 0; b < 4; ++b) bytes |= uint32_t{at + b >= low && at + b < high} << b;
              if (!(stamp.info & bytes) || !(e.write || (stamp.info & kWrite))) continue;
              for (const auto& work : concurrent)
                if (stamp.warp >= work->warps.first && stamp.warp < work->warps.second && !said) {
                  found(*work, e, at, stamp.info & kWrite,
                        spot_of_work(*work, stamp.warp, stamp.info >> kIdShift, first(stamp.lanes)));
                  said = true;
                }
            }
        }
      }
    }
  Work work;
  work.name = what, work.extents = std::move(extents);
  StreamOrder::instance().done(std::move(work));
}

}  // namespace ptx_emulator
