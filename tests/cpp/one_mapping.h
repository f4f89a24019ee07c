// ThreadSanitizer sees a race only where both threads use one mapping, and a RecordingReader has
// none: the kernel copies for it. Linked with -Wl,--wrap=mmap,--wrap=munmap,--wrap=pread, what a
// reader asks the kernel for comes word by word out of the writer's own mapping instead.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "words.h"

namespace one_mapping {

struct Mapping {
  const std::uint8_t* base;
  std::size_t bytes;
};
inline std::mutex mutex;
inline std::map<std::pair<dev_t, ino_t>, Mapping> mappings;

inline std::pair<dev_t, ino_t> file_of(int fd) {
  struct stat info{};
  ::fstat(fd, &info);
  return {info.st_dev, info.st_ino};
}

}  // namespace one_mapping

extern "C" {

void* __real_mmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t at);
ssize_t __real_pread(int fd, void* to, std::size_t bytes, off_t offset);

void* __wrap_mmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t at) {
  void* mapped = __real_mmap(address, bytes, protection, flags, fd, at);
  if (mapped != MAP_FAILED && (flags & MAP_SHARED) != 0) {
    const std::lock_guard<std::mutex> guard(one_mapping::mutex);
    one_mapping::mappings[one_mapping::file_of(fd)] = {static_cast<std::uint8_t*>(mapped), bytes};
  }
  return mapped;
}

// A reader may go on while the writer closes: the mapping stays.
int __wrap_munmap(void*, std::size_t) { return 0; }

ssize_t __wrap_pread(int fd, void* to, std::size_t bytes, off_t offset) {
  one_mapping::Mapping mapping{nullptr, 0};
  {
    const std::lock_guard<std::mutex> guard(one_mapping::mutex);
    const auto found = one_mapping::mappings.find(one_mapping::file_of(fd));
    if (found != one_mapping::mappings.end()) mapping = found->second;
  }
  const auto first = static_cast<std::size_t>(offset);
  if (mapping.base == nullptr || first % 8 != 0 || first > mapping.bytes)
    return __real_pread(fd, to, bytes, offset);
  bytes = std::min(bytes, mapping.bytes - first);
  auto* out = static_cast<std::uint8_t*>(to);
  for (std::size_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word =
        dodoco::load_word(reinterpret_cast<const std::uint64_t*>(mapping.base + first + i));
    std::memcpy(out + i, &word, std::min<std::size_t>(8, bytes - i));
  }
  return static_cast<ssize_t>(bytes);
}

}  // extern "C"
