// libFuzzer target (`make fuzz`): any bytes, as a file, are read or refused with a RecordingError.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "hostile.h"

using namespace dodoco;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

std::string folder() {
  const char* set = std::getenv("TMPDIR");
  return set != nullptr ? set : "/tmp";
}

// Rewritten for each input: TMPDIR should be in memory.
class Scratch {
 public:
  Scratch()
      : path_(folder() + "/input-" + std::to_string(::getpid()) + ".dodoco"),
        fd_(::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600)) {
    if (fd_ < 0) std::abort();
  }
  ~Scratch() { ::unlink(path_.c_str()); }

  const std::string& write(const std::uint8_t* data, std::size_t size) {
    if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) std::abort();
    if (::pwrite(fd_, data, size, 0) != static_cast<ssize_t>(size)) std::abort();
    ::flock(fd_, size % 2 != 0 ? LOCK_EX : LOCK_UN);  // odd sizes have a living owner
    return path_;
  }

 private:
  std::string path_;
  int fd_;
};

std::uint64_t value_at(const std::uint8_t* data, std::size_t size, std::size_t at) {
  std::uint64_t value = 0;
  if (at + 8 <= size) std::memcpy(&value, data + at, 8);
  return value;
}

// Where a word decides something: the header, a section's entry, or the first words of a section.
std::size_t interesting_offset(const std::uint8_t* data, std::size_t size,
                               std::minstd_rand* random) {
  const std::size_t section = offsetof(FileHeader, sections) + (*random)() % 12 * sizeof(Section);
  switch ((*random)() % 4) {
    case 0:
      return (*random)() % 22 * 4;
    case 1:
      return section + (*random)() % 10 * 4;
    default: {
      const std::uint64_t offset = value_at(data, size, section + offsetof(Section, offset));
      return static_cast<std::size_t>(offset % (size + 1)) + (*random)() % 64 * 4;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Scratch scratch;
  hostile::read_everything(scratch.write(data, size));
  return 0;
}

// Most bytes of a recording are counters, which decide nothing: half of the changes go to a field.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  if (random() % 2 == 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::size_t bytes = random() % 2 == 0 ? 4 : 8;
  const std::size_t at = interesting_offset(data, size, &random);
  if (at + bytes > size) return LLVMFuzzerMutate(data, size, max_size);
  std::uint64_t value = 0;
  std::memcpy(&value, data + at, bytes);
  const std::uint64_t values[] = {0,
                                  value + 1,
                                  value - 1,
                                  value + 64,
                                  value - 64,
                                  value ^ std::uint64_t{1} << random() % 64,
                                  std::uint64_t{1} << random() % 64,
                                  ~std::uint64_t{0} << random() % 64,
                                  ~std::uint64_t{0} >> random() % 64,
                                  size,
                                  size / 64 * 64,
                                  random() % 20,
                                  value_at(data, size, interesting_offset(data, size, &random))};
  value = values[random() % (sizeof(values) / sizeof(values[0]))];
  std::memcpy(data + at, &value, bytes);
  return size;
}
