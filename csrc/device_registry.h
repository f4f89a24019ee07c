// All device lanes of the process: which are open, which file is registered with the driver, and
// what a forked child may still do with them (nothing).
#pragma once

#include <cstdint>
#include <mutex>

namespace dodoco {

class DeviceLanes;

namespace device_registry {

// Lets launches find lanes by their sites. Lanes are never destroyed. Throws std::invalid_argument
// where 64 are open.
void open(DeviceLanes* lanes);

// Hides them from launches. Launches under way may still hold them.
void close(DeviceLanes* lanes);

// The open lanes with a site at an address; null: none. Waits for nobody.
DeviceLanes* of_site(std::uint64_t address);

// Whether lanes that are closed, and had to be kept, have a site at an address. What was let go of
// may be anything by now.
bool is_switched_off(std::uint64_t address);

// Devices that write to a file, by where it is mapped. Held while the driver registers it or lets
// go of it, so that the first one registers it and the last one takes that back.
class File {
 public:
  explicit File(const void* base);
  bool in_use() const;
  void add_user();
  bool remove_user();  // whether it was the last one

 private:
  std::unique_lock<std::mutex> lock_;
  const void* base_;
};

}  // namespace device_registry
}  // namespace dodoco
